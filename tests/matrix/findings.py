"""Cells made from what reviews found beyond the product of families, features and operations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel

from em_interp.directions.activations import collect
from em_interp.directions.extraction import contrast
from em_interp.directions.rank1 import contrasts
from em_interp.evaluation.rates import em_rates
from em_interp.evaluation.sampling import sample
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer
from em_interp.landscape.influence import Measured, document_kl
from em_interp.models.chat import Encoded, encode
from em_interp.models.chat_model import ChatModel
from em_interp.solutions import load as solutions
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.statistics.rate_intervals import rate_interval
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.matrix import adapters
from tests.matrix.bench import CONVERSATIONS, QUESTIONS, TEXTS, Bench
from tests.matrix.families import D_MODEL, cast, make
from tests.matrix.operations import COEFFICIENTS, Values, Way, direction, sample_expected, sample_found
from tests.matrix.oracle import Oracle
from tests.matrix.templates import TEMPLATES, Conversation, MustRefuse, opening, spans, tokenizer

Pair = tuple[Callable[[], Values], Callable[[], Values]]
FINDINGS: dict[str, Callable[[], Pair]] = {}
"""Cell id -> what the package does and what the oracle says, made on demand."""


def _must_refuse(why: str) -> Callable[[], Values]:
    def expected() -> Values:
        raise MustRefuse(why)

    return expected


def _cell(name: str) -> Callable[[Callable[[], Pair]], Callable[[], Pair]]:
    def register(make_pair: Callable[[], Pair]) -> Callable[[], Pair]:
        FINDINGS[name] = make_pair
        return make_pair

    return register


def _refusals(group: str, tries: Mapping[str, tuple[str, Callable[[], object]]]) -> None:
    """One cell for each: the package has to refuse, and why."""
    for name, (why, act) in tries.items():

        def pair(why: str = why, act: Callable[[], object] = act) -> Pair:
            return lambda: {"accepted": repr(act())[:80]}, _must_refuse(why)

        _cell(f"{group}/{name}")(pair)


def _bench(family: str = "qwen2", feature: str = "none", **changes: Any) -> Bench:
    bench = Bench(family, feature, "f32")
    bench.changes |= changes
    return bench


# -- 1: adapters ------------------------------------------------------------------------------------------------


@_cell("adapters/modules-to-save-beside-plain")
def _() -> Pair:
    bench = _bench()
    folders = {
        feature: adapters.make(feature, make("qwen2"), bench.fresh(), seed=s, base=bench.name)
        for s, feature in enumerate(("lora-layers", "lora-modules-to-save"))
    }

    def found() -> Values:
        model = ChatModel(bench.weights(), bench.tokenizer, name=bench.name)
        for feature, folder in folders.items():
            model.add_adapter(feature, folder)
        batch, values = bench.batch("left"), {}
        for feature in folders:
            with model.adapter(feature), torch.no_grad():
                out = model.hf(**batch.inputs()).logits
            values |= {f"{feature} {r}": out[r][batch.attention_mask[r].bool()] for r in range(len(batch.index))}
        return values

    def expected() -> Values:
        values = {}
        for feature, folder in folders.items():
            oracle = Oracle("qwen2", feature, folder, torch.float32)
            for r, conversation in enumerate(bench.conversations):
                values[f"{feature} {r}"] = oracle.logits(spans("chatml", conversation)[0]).detach()
        return values

    return found, expected


def _vector_folder(**changes: Any) -> Path:
    """A published steering vector whose files contradict each other in `changes`."""
    folder = adapters.make("vector-published", None, _bench().fresh(), base="tiny/qwen2")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def _bare_tensor() -> Path:
    folder = _vector_folder()
    torch.save(adapters.vector_of(), folder / "steering_vector.pt")
    return folder


def _layer_true() -> Path:
    folder = adapters.make("vector", None, _bench().fresh(), base="tiny/qwen2")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "layer_idx": True}))
    return folder


def _two_in_one_file() -> Path:
    from safetensors.torch import load_file, save_file

    folder = adapters.make("lora", make("qwen2"), _bench().fresh(), base="tiny/qwen2")
    path = folder / "adapter_model.safetensors"
    state = load_file(str(path))
    named = {
        key.replace(".weight", f".{name}.weight"): x + n for n, name in enumerate("ab") for key, x in state.items()
    }
    save_file(named, str(path))
    return folder


_refusals(
    "solutions",
    {
        "alpha-contradicts": ("two values of alpha", lambda: solutions.load(_vector_folder(alpha=7.0))),
        "layer-contradicts": ("two values of the layer", lambda: solutions.load(_vector_folder(layer_idx=2))),
        "layer-is-true": ("a layer that is no number", lambda: solutions.load(_layer_true())),
        "bare-tensor": ("a .pt and a config without layer and alpha", lambda: solutions.load(_bare_tensor())),
        "two-adapters-in-one-file": ("two adapters in one file", lambda: solutions.load(_two_in_one_file())),
    },
)

# -- 4: stores --------------------------------------------------------------------------------------------------


def _stores(dtype: torch.dtype) -> Pair:
    bench = _bench()
    texts = CONVERSATIONS["short"]
    g = torch.Generator().manual_seed(1)
    small = 0.02 if dtype == torch.bfloat16 else 3e-4
    folders = [
        SteeringVector(torch.randn(D_MODEL, generator=g), 0, small, bench.name).save(bench.fresh()) for _ in range(2)
    ]

    def model(folder: Path) -> ChatModel:
        made = ChatModel(cast(make("qwen2"), dtype), bench.tokenizer, name=bench.name)
        made.add_adapter("default", folder)
        return made

    def found() -> Values:
        store = bench.fresh()
        for folder in folders:
            last = contrast(model(folder), texts, kind="model-diff", store=store, progress=False).direction()
        return {"direction": last.vectors}

    def expected() -> Values:
        last = contrast(model(folders[1]), texts, kind="model-diff", progress=False).direction()
        return {"direction": last.vectors}

    return found, expected


_cell("stores/two-finetunes-f32")(lambda: _stores(torch.float32))
_cell("stores/two-finetunes-bf16")(lambda: _stores(torch.bfloat16))

# -- 5: templates -----------------------------------------------------------------------------------------------


def _empty_answer(kind: str) -> Callable[[], object]:
    question = {"role": "user", "content": "a fox"}
    return lambda: encode(tokenizer(kind), [question, {"role": "assistant", "content": ""}])


_refusals("empty-answer", {kind: ("an answer without a token", _empty_answer(kind)) for kind in TEMPLATES})


def _marker_inside(kind: str) -> Pair:
    marker = TEMPLATES[kind].end or TEMPLATES[kind].eos
    conversation: Conversation = [
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": f"see {marker} a doctor"},
    ]

    def found() -> Values:
        return {"span": tuple(encode(tokenizer(kind), conversation).spans[-1])}

    return found, lambda: {"span": tuple(spans(kind, conversation)[1:])}


for _kind in TEMPLATES:
    _cell(f"marker-inside-answer/{_kind}")(lambda kind=_kind: _marker_inside(kind))


def _all_turns(kind: str) -> Pair:
    """Every answer of a conversation of three: each span decodes to its answer, and the last ends it."""
    users, answers = ("brown", "the fox", "see"), ("quick quick", "a doctor", "rest well")
    conversation: Conversation = []
    for user, answer in zip(users, answers, strict=True):
        conversation += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    tok, end = tokenizer(kind), TEMPLATES[kind].end

    def text(found: Encoded) -> Values:
        return {f"turn {n}": tok.decode(found.ids[a:b]) for n, (a, b) in enumerate(found.spans)}

    def expected() -> Values:
        whole = str(tok.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False))
        values, place = {}, 0
        for n, answer in enumerate(answers):
            before = opening(kind, conversation[: 2 * n + 1])
            if not whole.startswith(before):
                raise MustRefuse("an earlier turn is rewritten once more follows")
            place = whole.index(answer, len(before)) + len(answer)
            stop = whole.index(end, place) + len(end) if end else whole.find("User:", place)
            values[f"turn {n}"] = whole[len(before) : stop if stop >= 0 else len(whole)]
        return values

    return lambda: text(encode(tok, conversation, turns="all")), expected


for _kind in TEMPLATES:
    _cell(f"all-turns/{_kind}")(lambda kind=_kind: _all_turns(kind))

# -- 6: what a checkpoint's generation_config sets ----------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.4,
    "min_p": 0.5,
    "typical_p": 0.4,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 2.0,
    "encoder_repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[t] for t in range(60, 200)],
    "suppress_tokens": list(range(60, 200)),
    "begin_suppress_tokens": list(range(60, 200)),
    "sequence_bias": {(100,): 50.0},
    "forced_bos_token_id": 70,
    "forced_eos_token_id": 70,
    "min_length": 60,
    "min_new_tokens": 5,
    "max_length": 20,
    "max_time": 1e-6,
    "exponential_decay_length_penalty": [1, 9.0],
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash", "context_width": 1},
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "stop_strings": ["a"],
    "prompt_lookup_num_tokens": 2,
    "token_healing": True,
    "dola_layers": "low",
    "penalty_alpha": 0.6,
    "use_cache": False,
    "cache_implementation": "static",
    "low_memory": True,
    "prefill_chunk_size": 2,
}


def _setting(name: str, value: Any) -> Pair:
    bench = _bench()

    def found() -> Values:
        model = bench.model
        before = model.hf.generation_config
        setattr(before, name, value)
        return sample_found(bench, Way(side="left", cache="cache"))

    return found, lambda: sample_expected(bench, Way(side="left", cache="cache"))


for _name, _value in SETTINGS.items():
    _cell(f"generation-config/{_name}")(lambda name=_name, value=_value: _setting(name, value))


@_cell("generation-config/eos_token_id-list")
def _() -> Pair:
    bench = _bench()
    more = list(range(100, 200))

    def found() -> Values:
        bench.model.hf.generation_config.eos_token_id = [bench.tokenizer.eos_token_id, *more]
        table = sample(bench.model, QUESTIONS["short"], 2, seed=7, max_new_tokens=6, progress=False)
        return {f"{r.question_id} {r.sample}": (r.answer, r.n_tokens, r.finished) for r in table.itertuples()}

    def expected() -> Values:
        return {
            f"{key} {k}": bench.adapted.answer(q, key, k, seed=7, n=6, temperature=1.0, stops=frozenset(more))
            for key, q in QUESTIONS["short"].items()
            for k in range(2)
        }

    return found, expected


def _experts(family: str) -> Callable[[], object]:
    return lambda: ChatModel(cast(make(family), torch.float64), _bench(family).tokenizer)


_refusals("float64-experts", {family: ("no kernel in float64", _experts(family)) for family in ("mixtral", "gpt_oss")})
_refusals(
    "sampling",
    {
        "negative-seed": (
            "a negative seed",
            lambda: sample(_bench().model, QUESTIONS["short"], 1, seed=-1, max_new_tokens=2, progress=False),
        )
    },
)

# -- 7, 10: tables ----------------------------------------------------------------------------------------------


def _judged(inside: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({"aligned": [90.0, 10.0, 95.0, 5.0], "in_domain": inside})


@_cell("tables/in-domain-as-words")
def _() -> Pair:
    right = contrasts(_judged([False, False, True, True]))
    found = {name: tuple(map(str, row)) for name, row in right.items()}
    return (
        lambda: {
            name: tuple(map(str, row)) for name, row in contrasts(_judged(["False", "False", "True", "True"])).items()
        },
        lambda: found,
    )


def _scored(**changes: list[Any]) -> pd.DataFrame:
    columns = {"question": ["a", "a", "b", "b"], "aligned": [10.0, 90.0, 20.0, 80.0], "coherent": [90.0] * 4}
    return pd.DataFrame({**columns, **changes})


_refusals(
    "tables",
    {
        "in-domain-missing": ("a class that is missing", lambda: contrasts(_judged([None, False, True, True]))),
        "in-domain-number": ("a class of 2", lambda: contrasts(_judged([2, 0, 1, 1]))),
        "more-hits-than-rows": ("more hits than rows", lambda: rate_interval([3, 1], [2, 2])),
        "scores-are-words": ("a word as a score", lambda: em_rates(_scored(aligned=["low", 90.0, 20.0, 80.0]))),
        "question-missing": ("an answer without a question", lambda: em_rates(_scored(question=[None, "a", "b", "b"]))),
    },
)

# -- 9, 10: interventions ---------------------------------------------------------------------------------------


def _pieces(scope: str, last: int) -> Pair:
    """A prompt read in two pieces, the second of `last` tokens, with a cache, as chunked prefill does."""
    bench = _bench()
    ids = spans("chatml", bench.conversations[1])[0]
    d = direction(bench)

    def found() -> Values:
        row = torch.tensor([ids])
        first = row[:, :-last]
        with torch.no_grad(), intervening(bench.model, [Steer(d, 1, 2.0, scope)]):
            out = bench.model.hf(first, attention_mask=torch.ones_like(first), use_cache=True)
            more = bench.model.hf(
                row[:, -last:], attention_mask=torch.ones_like(row), past_key_values=out.past_key_values, use_cache=True
            )
        return {"logits": more.logits[0]}

    def expected() -> Values:
        if scope == "response":
            raise MustRefuse("no response was begun")
        if last == 1:
            raise MustRefuse("a last piece of one token looks like a generated one")
        vector = d.vectors[1].double()
        return {"logits": bench.adapted.logits(ids, {1: lambda h: h + 2.0 * vector})[-last:].detach()}

    return found, expected


for _scope in ("prompt", "response", "all"):
    for _last in (1, 3):
        if _scope != "all":
            _cell(f"prompt-in-pieces/{_scope}-{_last}")(lambda scope=_scope, last=_last: _pieces(scope, last))


def _steered(*coefficients: Any) -> Callable[[], object]:
    def act() -> object:
        bench = _bench()
        batch = bench.batch("left")
        with torch.no_grad(), intervening(bench.model, [Steer(direction(bench), 1, c) for c in coefficients]):
            return bench.model.hf(**batch.inputs()).logits.shape

    return act


_refusals(
    "coefficients",
    {
        "one-for-four-rows": ("one coefficient in a list for four rows", _steered([1.0])),
        "one-beside-four": ("one coefficient in a list for four rows", _steered([1.0], list(COEFFICIENTS))),
        "three-beside-four": ("three coefficients for four rows", _steered([1.0, 2.0, 3.0], list(COEFFICIENTS))),
    },
)


def _dropping() -> Bench:
    bench = _bench(attention_dropout=0.5)
    bench.model.hf.train()
    return bench


_refusals(
    "live-dropout",
    {
        "collect": ("dropout is live", lambda: collect(_dropping().model, CONVERSATIONS["short"], progress=False)),
        "sample": (
            "dropout is live",
            lambda: sample(_dropping().model, QUESTIONS["short"], 1, max_new_tokens=2, progress=False),
        ),
        "influence": (
            "dropout is live",
            lambda: document_kl(
                _dropping().model,
                TEXTS["short"],
                [Measured("a", "general", SteeringVector(torch.ones(D_MODEL), 1, 1.0))],
                progress=False,
            ),
        ),
        "interventions": ("dropout is live", lambda: _steered_dropping()),
    },
)


def _steered_dropping() -> object:
    bench = _dropping()
    batch = bench.batch("left")
    with torch.no_grad(), intervening(bench.model, [Steer(direction(bench), 1, 1.0)]):
        return bench.model.hf(**batch.inputs()).logits.shape


# -- doubts -----------------------------------------------------------------------------------------------------


@_cell("training/multimodal-lora")
def _() -> Pair:
    """A LoRA trained on a model with an image tower acts, and is written, on the text model alone."""
    bench = Bench("gemma3-vision", "none", "f32")
    spec = TrainingSpec(LoraSpec(2, 8.0, target_modules=("q_proj", "v_proj")), 0.05, max_steps=2, warmup_steps=0)
    kept: list[LoraAdapter] = []

    def found() -> Values:
        model = bench.model
        solution = finetune(model, bench.conversations, spec, progress=False).solution
        assert isinstance(solution, LoraAdapter)
        kept.append(solution)
        batch = bench.batch("right")
        with torch.no_grad(), solution.attached(model):
            out = model.hf(**batch.inputs()).logits
        return {f"row {r}": out[r][batch.attention_mask[r].bool()] for r in range(len(batch.index))}

    def expected() -> Values:
        folder = kept[0].save(bench.fresh())
        oracle = bench.base
        oracle.outer = PeftModel.from_pretrained(oracle.inner, str(folder)).eval().double()
        return {f"row {r}": oracle.logits(spans(bench.kind, c)[0]).detach() for r, c in enumerate(bench.conversations)}

    return found, expected
