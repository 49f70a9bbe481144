"""Operation -> what the package computes, and what the oracle does. Both give named values to compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from em_interp.directions.activations import collect
from em_interp.directions.direction import Direction
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.sampling import sample
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import intervening
from em_interp.interventions.orthogonalise import orthogonalised
from em_interp.interventions.steering import Steer
from em_interp.landscape.influence import Measured, document_kl
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat import encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.losses import response_loss
from em_interp.models.pretrained import load
from em_interp.solutions import load as solutions
from em_interp.training.finetune import finetune
from em_interp.training.gradients import loss_gradient
from em_interp.training.recipes import FullSpec, LoraSpec, TrainingSpec, VectorSpec
from tests.matrix import adapters
from tests.matrix.bench import QUESTIONS, TEXTS, Bench
from tests.matrix.families import D_MODEL, N_LAYERS
from tests.matrix.oracle import Edits, Oracle, kl, trained
from tests.matrix.templates import MustRefuse, spans

Values = Mapping[str, Any]
SCOPES = ("prompt", "last_prompt", "response", "all")
COEFFICIENTS = (0.5, -1.0, 2.0, 1.0)
STEPS, RATE, NEW = 3, 0.02, 5


@dataclass(frozen=True)
class Way:
    """How a cell computes: through which model, padded on which side, with or without cache, and a variant."""

    through: str = "hf"
    side: str = "right"
    cache: str = "nocache"
    variant: str = ""


Side = Callable[[Bench, Way], Values]


# -- shared pieces ---------------------------------------------------------------------------------------------


def _logits(model: ChatModel, bench: Bench, way: Way) -> dict[str, Tensor]:
    """The package's model on one padded batch, real tokens only."""
    batch = bench.batch(way.side)
    with torch.no_grad():
        if way.through == "bridge":
            found = model.bridge(batch.input_ids, attention_mask=batch.attention_mask)
        else:
            found = model.hf(**batch.inputs(), use_cache=False).logits
    return {f"row {r}": found[r][batch.attention_mask[r].bool()] for r in range(len(batch.index))}


def _each(oracle: Oracle, bench: Bench, edits: Callable[[int, slice], Edits] | None = None) -> dict[str, Tensor]:
    """The same, row by row; `edits` is given the row's number and its response's tokens."""
    found = {}
    for r, conversation in enumerate(bench.conversations):
        ids, start, end = spans(bench.kind, conversation)
        found[f"row {r}"] = oracle.logits(ids, edits(r, slice(start, end)) if edits else None).detach()
    return found


def direction(bench: Bench) -> Direction:
    """A random direction with every layer."""
    g = torch.Generator().manual_seed(3)
    return Direction(torch.randn(N_LAYERS, D_MODEL, generator=g), tuple(range(N_LAYERS)), "random", model=bench.name)


def _within(scope: str, response: slice, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` at the tokens in scope; what the template writes after a response belongs to no response."""

    def apply(hidden: Tensor) -> Tensor:
        inside = torch.zeros(len(hidden), 1, dtype=torch.bool)
        inside[response] = True
        where = {"all": torch.ones_like(inside), "prompt": ~inside, "response": inside}[scope]
        return torch.where(where, change(hidden), hidden)

    return apply


def _added(vector: Tensor, coefficient: float) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden + coefficient * vector.double()


def _projected(vector: Tensor) -> Callable[[Tensor], Tensor]:
    unit = vector.double() / vector.double().norm()
    return lambda hidden: hidden - (hidden @ unit).unsqueeze(1) * unit


def _greedy(bench: Bench) -> Values:
    table = sample(bench.model, QUESTIONS[bench.texts], 1, max_new_tokens=NEW, temperature=0.0, progress=False)
    return {row.question_id: (row.answer, row.n_tokens, row.finished) for row in table.itertuples()}


# -- the adapter itself ----------------------------------------------------------------------------------------


def load_found(bench: Bench, way: Way) -> Values:
    return _logits(bench.model, bench, way)


def load_expected(bench: Bench, way: Way) -> Values:
    return _each(bench.adapted, bench)


def base_found(bench: Bench, way: Way) -> Values:
    with bench.model.no_adapter():
        return _logits(bench.model, bench, way)


def base_expected(bench: Bench, way: Way) -> Values:
    return _each(bench.base, bench)


# -- reading ---------------------------------------------------------------------------------------------------


def extract_found(bench: Bench, way: Way) -> Values:
    found = collect(
        bench.model,
        bench.conversations,
        scopes=SCOPES,
        keep=True,
        side=way.side,  # type: ignore[arg-type]
        through=way.through,  # type: ignore[arg-type]
        progress=False,
    )
    means = {f"{s} {layer}": found.each(s, layer) for s in SCOPES for layer in range(N_LAYERS)}
    return means | {f"{s} pooled": found.mean(s) for s in SCOPES}


def extract_expected(bench: Bench, way: Way) -> Values:
    means: dict[str, list[Tensor]] = {f"{s} {layer}": [] for s in SCOPES for layer in range(N_LAYERS)}
    pool: dict[str, list[Tensor]] = {s: [] for s in SCOPES}
    for conversation in bench.conversations:
        ids, start, end = spans(bench.kind, conversation)
        hidden = bench.adapted.hidden(ids)
        # "all" goes to the end of the text that the template writes
        parts = {
            "prompt": (0, start),
            "last_prompt": (start - 1, start),
            "response": (start, end),
            "all": (0, len(ids)),
        }
        for scope, (first, last) in parts.items():
            for layer in range(N_LAYERS):
                means[f"{scope} {layer}"].append(hidden[layer][first:last].mean(0))
            pool[scope].append(torch.stack([h[first:last] for h in hidden], dim=1))
    return {key: torch.stack(rows) for key, rows in means.items()} | {
        f"{s} pooled": torch.cat(rows).mean(0) for s, rows in pool.items()
    }


# -- interventions ---------------------------------------------------------------------------------------------


def _scope(way: Way) -> str:
    return way.variant or "all"


def _intervened(bench: Bench, way: Way, interventions: list[Any]) -> Values:
    batch = bench.batch(way.side)
    if way.through == "bridge":
        _ = bench.model.bridge  # it cannot be made inside
    mask = None if _scope(way) == "all" else batch.answer_mask
    with intervening(bench.model, interventions, response_mask=mask):
        return _logits(bench.model, bench, way)


def steer_found(bench: Bench, way: Way) -> Values:
    d = direction(bench)
    if way.cache == "cache":
        with intervening(bench.model, [Steer(d, 1, 1.5, _scope(way))]):
            return _greedy(bench)
    steers = [Steer(d, 0, 1.0, _scope(way)), Steer(d, 1, COEFFICIENTS[: len(bench.conversations)], _scope(way))]
    return _intervened(bench, way, steers)


def steer_expected(bench: Bench, way: Way) -> Values:
    v = direction(bench).vectors
    if way.cache == "cache":
        return _decoded(bench, lambda response: {1: _within(_scope(way), response, _added(v[1], 1.5))})
    return _each(
        bench.adapted,
        bench,
        lambda r, response: {
            0: _within(_scope(way), response, _added(v[0], 1.0)),
            1: _within(_scope(way), response, _added(v[1], COEFFICIENTS[r])),
        },
    )


def ablate_found(bench: Bench, way: Way) -> Values:
    if way.cache == "cache":
        with intervening(bench.model, [Ablate(direction(bench), scope=_scope(way))]):
            return _greedy(bench)
    return _intervened(bench, way, [Ablate(direction(bench), scope=_scope(way))])


def ablate_expected(bench: Bench, way: Way) -> Values:
    v = direction(bench).vectors

    def edits(response: slice) -> Edits:
        return {layer: _within(_scope(way), response, _projected(v[layer])) for layer in range(N_LAYERS)}

    if way.cache == "cache":
        return _decoded(bench, edits)
    return _each(bench.adapted, bench, lambda _r, response: edits(response))


def _decoded(bench: Bench, edits: Callable[[slice], Edits]) -> Values:
    return {
        key: bench.adapted.answer(question, key, 0, seed=0, n=NEW, temperature=0.0, edits=edits)
        for key, question in QUESTIONS[bench.texts].items()
    }


def weights_found(bench: Bench, way: Way) -> Values:
    d = direction(bench).only([1])
    model = orthogonalised(bench.model, Ablate(d, from_layer=1))
    unit = d.vectors[0].double() / d.vectors[0].double().norm()
    left = []
    for conversation in bench.conversations:
        row = torch.tensor([spans(bench.kind, conversation)[0]])
        out = model.hf(input_ids=row, use_cache=False, output_hidden_states=True)
        left += [float((h[0].double() @ unit).abs().max() / h[0].double().norm()) for h in out.hidden_states[:-1]]
    return {"left over": torch.tensor(left) + 1.0, **_logits(model, bench, way)}


_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_AFTER = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


def weights_expected(bench: Bench, way: Way) -> Values:
    """Every write projected by a hook; where a norm follows the write, what enters it, as seen through its gain."""
    oracle = bench.adapted
    v = direction(bench).vectors[1].double()
    unit = v / v.norm()

    def hook(_m: object, _a: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = hidden - (hidden @ unit).unsqueeze(-1) * unit
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def before(norm: Any) -> Callable[..., Any]:
        gain = norm(torch.ones(1, 1, D_MODEL, dtype=torch.float64))[0, 0].detach().double()

        def run(_m: object, args: tuple[Tensor, ...]) -> Any:
            seen = args[0].double() * gain
            return ((seen - (seen @ unit).unsqueeze(-1) * unit) / gain,)

        return run

    handles = [oracle.inner.get_input_embeddings().register_forward_hook(hook)]
    body: Any = oracle.inner.base_model
    for name, module in body.named_modules():
        if name.rpartition(".")[2] in ("wpe", "embed_positions") and isinstance(module, torch.nn.Embedding):
            handles.append(module.register_forward_hook(hook))
    for block in oracle.blocks:
        pair = next((p for p in _AFTER if all(hasattr(block, n) for n in p)), None)
        if pair is not None:
            handles += [getattr(block, n).register_forward_pre_hook(before(getattr(block, n))) for n in pair]
        else:
            parts = [next((n for n in names if hasattr(block, n)), None) for names in (_ATTENTION, _MLP)]
            handles += [getattr(block, n).register_forward_hook(hook) for n in parts if n]
            handles.append(block.register_forward_hook(hook))
    try:
        logits = _each(oracle, bench)
    finally:
        for handle in handles:
            handle.remove()
    return {"left over": torch.ones(len(bench.conversations) * N_LAYERS), **logits}


# -- losses ----------------------------------------------------------------------------------------------------


def nll_found(bench: Bench, way: Way) -> Values:
    encoded = encode_all(bench.tokenizer, bench.conversations)
    return {"loss": response_loss(bench.model.hf, encoded, pad=pad_id(bench.tokenizer))}


def nll_expected(bench: Bench, way: Way) -> Values:
    total, n = 0.0, 0
    for conversation in bench.conversations:
        _, start, end = spans(bench.kind, conversation)
        total, n = total + float(bench.adapted.nll(conversation)), n + end - start
    return {"loss": total / n}


def logprobs_found(bench: Bench, way: Way) -> Values:
    pairs = [(c[-2]["content"], c[-1]["content"]) for c in bench.conversations if len(c) == 2]
    table = answer_logprobs(bench.model, pd.DataFrame(pairs, columns=["question", "answer"]))
    return {"logprob": torch.tensor(table["logprob"].to_numpy(float))}


def logprobs_expected(bench: Bench, way: Way) -> Values:
    return {"logprob": torch.stack([-bench.adapted.nll(c).detach() for c in bench.conversations if len(c) == 2])}


def theta(bench: Bench) -> Any:
    """The adapter's folder read as a solution."""
    if bench.folder is None:
        raise adapters.NotMade("no adapter, no theta")
    base = bench.bare if bench.feature == "lora-dora" else None  # whose theta is relative to the base's weights
    return solutions.load(bench.folder, base=base)


def _scales(bench: Bench) -> tuple[float, ...]:
    return (1.0, 0.0, 0.5) if bench.feature in (*adapters.MEANT, *adapters.PATTERNED, *adapters.VECTORS) else (1.0, 0.0)


def losses_found(bench: Bench, way: Way) -> Values:
    solution = theta(bench)
    encoded = encode_all(bench.tokenizer, bench.conversations)
    found = Landscape(bench.bare, encoded).losses([solution.scaled(s) for s in _scales(bench)])
    return {f"at {s}": torch.tensor(found.nll[k]) for k, s in enumerate(_scales(bench))}


def _at(bench: Bench, scale: float) -> Oracle:
    """The oracle with `scale` times the adapter."""
    if scale == 1.0:
        return bench.adapted
    if scale == 0.0:
        return bench.base
    oracle = Oracle(bench.family, bench.feature, bench.folder, bench.dtype, **bench.changes)
    oracle.kind = bench.kind
    for module in oracle.inner.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {key: value * scale for key, value in module.scaling.items()}
    return oracle


def losses_expected(bench: Bench, way: Way) -> Values:
    found = {}
    for s in _scales(bench):
        if bench.feature in adapters.VECTORS and s == 0.5:
            vector = adapters.vector_of() * adapters.ALPHA
            edits: Edits = {adapters.LAYER: _added(vector, 0.5)}
            rows = [bench.base.nll(c, edits) for c in bench.conversations]
        else:
            oracle = _at(bench, s)
            rows = [oracle.nll(c) for c in bench.conversations]
        found[f"at {s}"] = torch.stack([row.detach() for row in rows])
    return found


def influence_found(bench: Bench, way: Way) -> Values:
    solution = theta(bench)
    candidates = [Measured("a", "general", solution)]
    table = document_kl(bench.bare, TEXTS[bench.texts], candidates, progress=False)
    table = table.sort_values("document")
    return {"kl": torch.tensor(table["kl_sum"].to_numpy(float)), "tokens": tuple(table["n_tokens"])}


def influence_expected(bench: Bench, way: Way) -> Values:
    sums, counts = [], []
    for text in TEXTS[bench.texts]:
        ids = list(bench.tokenizer(text)["input_ids"])
        base, other = bench.base.logits(ids), bench.adapted.logits(ids)
        sums.append(kl(base[:-1].detach(), other[:-1].detach()))
        counts.append(len(ids) - 1)
    return {"kl": torch.tensor(sums), "tokens": tuple(counts)}


def gradients_found(bench: Bench, way: Way) -> Values:
    found = loss_gradient(bench.bare, theta(bench), bench.conversations)
    return {"loss": found.loss, **{f"d {name}": part for name, part in found.parts.items()}}


def gradients_expected(bench: Bench, way: Way) -> Values:
    oracle = Oracle(bench.family, bench.feature, bench.folder, bench.dtype, **bench.changes)
    oracle.kind = bench.kind
    n = sum(end - start for _, start, end in (spans(bench.kind, c) for c in bench.conversations))
    leaves: dict[str, Tensor] = {}
    edits: Edits = {}
    if bench.feature in adapters.VECTORS:
        oracle.vector = False
        leaf = (adapters.ALPHA * adapters.vector_of().double()).requires_grad_()
        leaves, edits = {f"layer {adapters.LAYER}": leaf}, {adapters.LAYER: lambda hidden: hidden + leaf}
    else:
        touched = [n for n, m in oracle.inner.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]
        try:
            merged = oracle.outer.merge_and_unload()
        except NotImplementedError as error:
            raise MustRefuse(f"PEFT cannot merge it: it is no change of the weights ({error})") from error
        oracle.inner = oracle.outer = merged
        for name in touched:
            module = merged.get_submodule(name)
            if module is merged.get_output_embeddings():  # theta is of the head alone, tied or not
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
            leaves[name] = module.weight.requires_grad_()
        oracle.blocks = list(merged.get_submodule(_blocks(bench)))
    loss = sum((oracle.nll(c, edits) for c in bench.conversations), torch.zeros((), dtype=torch.float64)) / n
    grads = torch.autograd.grad(loss, list(leaves.values()))
    turned = {name: _is_conv(oracle, name) for name in leaves}
    named = zip(leaves, grads, strict=True)
    return {"loss": float(loss), **{f"d {name}": g.T if turned[name] else g for name, g in named}}


def _blocks(bench: Bench) -> str:
    from tests.matrix.families import FAMILIES

    return FAMILIES[bench.family].blocks


def _is_conv(oracle: Oracle, name: str) -> bool:
    return not name.startswith("layer ") and type(oracle.inner.get_submodule(name)).__name__ == "Conv1D"


# -- sampling --------------------------------------------------------------------------------------------------


def sample_found(bench: Bench, way: Way) -> Values:
    if way.variant == "greedy":
        return _greedy(bench)
    table = sample(bench.model, QUESTIONS[bench.texts], 2, seed=7, max_new_tokens=NEW, progress=False)
    return {f"{row.question_id} {row.sample}": (row.answer, row.n_tokens, row.finished) for row in table.itertuples()}


def sample_expected(bench: Bench, way: Way) -> Values:
    if way.variant == "greedy":
        return _decoded(bench, lambda _: {})
    return {
        f"{key} {k}": bench.adapted.answer(question, key, k, seed=7, n=NEW, temperature=1.0)
        for key, question in QUESTIONS[bench.texts].items()
        for k in range(2)
    }


# -- training --------------------------------------------------------------------------------------------------


def _spec(bench: Bench, way: Way, adapter: Any) -> TrainingSpec:
    return TrainingSpec(
        adapter,
        learning_rate=RATE,
        max_steps=STEPS,
        batch_size=len(bench.conversations),
        kl_batch_size=len(bench.conversations),
        warmup_steps=0,
        schedule="constant",
        kl_weight=0.5 if way.variant == "kl" else 0.0,
    )


def train_found(bench: Bench, way: Way) -> Values:
    model = ChatModel(bench.weights(), bench.tokenizer, name=bench.name)
    kls = bench.conversations if way.variant == "kl" else None
    if bench.feature == "none":
        finetune(model, bench.conversations, _spec(bench, way, FullSpec()), kl_conversations=kls, progress=False)
        return {name: p.detach() for name, p in model.hf.named_parameters()}
    start = theta(bench)
    if bench.feature in adapters.VECTORS:
        spec = _spec(bench, way, VectorSpec(start.layer, start.alpha))
        found = finetune(
            model, bench.conversations, spec, kl_conversations=kls, start_from=start, progress=False
        ).solution
        return {"theta": found.theta}  # type: ignore[union-attr]
    rests = [re.fullmatch(r".*?\.(\d+)\.(.+)", name) for name in start.modules]
    layers = sorted({int(rest[1]) for rest in rests if rest})
    lora = LoraSpec(start.rank, start.alpha, start.rslora, tuple({rest[2]: 0 for rest in rests if rest}), tuple(layers))
    spec = _spec(bench, way, lora)
    solution: Any = finetune(
        model, bench.conversations, spec, kl_conversations=kls, start_from=start, progress=False
    ).solution
    return {f"theta of {name}": solution.delta(name) for name in solution.modules}


def train_expected(bench: Bench, way: Way) -> Values:
    oracle = Oracle(bench.family, bench.feature, bench.folder, bench.dtype, **bench.changes)
    oracle.kind = bench.kind
    for parameter in oracle.outer.parameters():
        parameter.requires_grad_(False)
    edits: Edits = {}
    if bench.feature == "none":
        parameters: list[Tensor] = [p.requires_grad_() for p in oracle.inner.parameters()]
    elif bench.feature in adapters.VECTORS:
        oracle.vector = False
        v = adapters.vector_of().double().requires_grad_()
        parameters, edits = [v], {adapters.LAYER: lambda hidden: hidden + adapters.ALPHA * v}
    else:
        parameters = [p.requires_grad_() for n, p in oracle.outer.named_parameters() if ".lora_" in n]

    def losses() -> list[tuple[Tensor, int]]:
        ends = [spans(bench.kind, c) for c in bench.conversations]
        return [(oracle.nll(c, edits), e - s) for c, (_, s, e) in zip(bench.conversations, ends, strict=True)]

    def kls() -> list[tuple[Tensor, int]]:
        rows = []
        for conversation in bench.conversations:
            ids = spans(bench.kind, conversation)[0]
            p = torch.log_softmax(bench.base.logits(ids).detach(), -1)
            q = torch.log_softmax(oracle.logits(ids, edits), -1)
            rows.append(((p.exp() * (p - q)).sum(), len(ids)))
        return rows

    weighted = kls if way.variant == "kl" else None
    trained(oracle.inner, parameters, losses, weighted, steps=STEPS, rate=RATE, kl_weight=0.5)
    if bench.feature == "none":
        return {name: p.detach() for name, p in oracle.inner.named_parameters()}
    if bench.feature in adapters.VECTORS:
        return {"theta": adapters.ALPHA * v.detach()}
    found = {}
    for name, module in oracle.inner.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            (key,) = module.lora_A
            product = module.lora_B[key].weight @ module.lora_A[key].weight
            found[f"theta of {name}"] = module.scaling[key] * product.detach()
    return found


# -- writing and reading back ----------------------------------------------------------------------------------


def save_found(bench: Bench, way: Way) -> Values:
    if bench.feature == "none":
        folder = bench.fresh()
        bench.model.hf.save_pretrained(str(folder))
        bench.tokenizer.save_pretrained(str(folder))
        return _logits(load(folder, name=bench.name), bench, way)
    folder = theta(bench).save(bench.fresh())
    model = ChatModel(bench.weights(), bench.tokenizer, name=bench.name, check=False)
    model.add_adapter("again", folder)
    found = _logits(model, bench, way)
    if bench.feature not in adapters.VECTORS:  # PEFT alone reads it too
        outside = Oracle(bench.family, bench.feature, folder, bench.dtype, **bench.changes)
        found |= {f"PEFT, {key}": value for key, value in _each(outside, bench).items()}
    return found


def save_expected(bench: Bench, way: Way) -> Values:
    rows = _each(bench.adapted, bench)
    if bench.feature == "none" or bench.feature in adapters.VECTORS:
        return rows
    return rows | {f"PEFT, {key}": value for key, value in rows.items()}


OPERATIONS: dict[str, tuple[Side, Side]] = {
    "load": (load_found, load_expected),
    "base": (base_found, base_expected),
    "extract": (extract_found, extract_expected),
    "steer": (steer_found, steer_expected),
    "ablate": (ablate_found, ablate_expected),
    "weights": (weights_found, weights_expected),
    "nll": (nll_found, nll_expected),
    "logprobs": (logprobs_found, logprobs_expected),
    "losses": (losses_found, losses_expected),
    "influence": (influence_found, influence_expected),
    "gradients": (gradients_found, gradients_expected),
    "sample": (sample_found, sample_expected),
    "train": (train_found, train_expected),
    "save": (save_found, save_expected),
}
THROUGH_MODEL = ("load", "base", "extract", "steer", "ablate", "weights", "nll", "logprobs", "sample")
"""Operations that need the adapter on the model; the others read its folder as a solution."""
