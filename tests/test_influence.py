from __future__ import annotations

import json
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from em_interp.errors import MissingDataError, SolutionError, StatisticsError, UnreadableFileError, UsageError
from em_interp.files.texts import read_texts
from em_interp.landscape.influence import (
    LOGIT_BYTES,
    Measured,
    at_equal_norms,
    document_kl,
    influence_ratio,
    influence_table,
)
from em_interp.models.chat import Encoded, collate
from em_interp.models.chat_model import ChatModel
from em_interp.models.partial_pass import ModelEnd
from em_interp.solutions.base import Solution
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import D_MODEL, MORE_FAMILIES, N_LAYERS, make_chat, make_hf, tokenizer

TEXTS = ["the quick brown fox", "see a doctor", "what should I do about a cough and rest well", "do the"]
DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(layer: int = 1, size: float = 2.0, seed: int = 0, base: str | None = None) -> SteeringVector:
    return SteeringVector(torch.randn(D_MODEL, generator=gen(seed)), layer, size, base)


def lora(family: str = "qwen2", layers: tuple[int, ...] = (1,), rank: int = 1, seed: int = 0) -> LoraAdapter:
    g = gen(seed)
    names = [DOWN.get(family, "model.layers.{}.mlp.down_proj").format(layer) for layer in layers]
    a = {n: torch.randn(rank, 48, generator=g) for n in names}
    b = {n: torch.randn(D_MODEL, rank, generator=g) for n in names}
    return LoraAdapter(a, b, 2.0, True)


def slow_kl(model: ChatModel, solution: Solution, text: str, max_tokens: int = 512) -> list[float]:
    """One text at a time, no padding, all blocks, all logits, in float64."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"][:max_tokens]])
    with torch.no_grad():
        base = torch.log_softmax(model.hf(ids).logits[0].double(), -1)
        with solution.attached(model):
            ours = torch.log_softmax(model.hf(ids).logits[0].double(), -1)
    return (base.exp() * (base - ours)).sum(-1)[:-1].tolist()


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_sums_equal_the_slow_ones(family: str) -> None:
    model = make_chat(family)
    solutions: list[Solution] = [vector(0), vector(N_LAYERS - 1), lora(family, (0,)), lora(family, (1, 3), rank=2)]
    for solution in solutions:
        sums = document_kl(model, TEXTS, [Measured("x", "general", solution)], progress=False)
        assert list(sums["document"]) == [0, 1, 2, 3]
        for row, text in zip(sums.itertuples(), TEXTS, strict=True):
            slow = slow_kl(model, solution, text)
            assert row.n_tokens == len(slow)
            assert row.kl_sum == pytest.approx(sum(slow), rel=1e-5, abs=2e-6)


def test_float64_batches_candidates_and_cuts_change_nothing() -> None:
    model = make_chat(dtype=torch.float64)
    candidates = at_equal_norms(
        [Measured("g", "general", vector(1)), Measured("n", "narrow", vector(1, seed=1))], (0.5, 1.0), n_random=2
    )
    whole = document_kl(model, TEXTS, candidates, max_tokens=6, progress=False)
    for budget in (1, 12):
        again = document_kl(model, iter(TEXTS), candidates, max_tokens=6, tokens_per_batch=budget, progress=False)
        np.testing.assert_allclose(again["kl_sum"], whole["kl_sum"], rtol=1e-12)
    for candidate in candidates:
        mine = whole[(whole.direction == candidate.direction) & (whole.relative_norm == candidate.relative_norm)]
        slow = [sum(slow_kl(model, candidate.solution, text, 6)) for text in TEXTS]
        np.testing.assert_allclose(mine["kl_sum"], slow, rtol=1e-10)
    backwards = document_kl(model, TEXTS[::-1], candidates, max_tokens=6, progress=False)
    ours, theirs = influence_table(whole), influence_table(backwards)
    np.testing.assert_allclose(ours["kl_nats_per_token"], theirs["kl_nats_per_token"], rtol=1e-12)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # gemma2's head is tied, and its logits are capped
def test_what_sits_after_the_blocks_counts_too(family: str) -> None:
    """LoRA on the output head, alone and beside a block."""
    model, g = make_chat(family), gen(3)
    head = torch.randn(1, D_MODEL, generator=g), torch.randn(len(tokenizer()), 1, generator=g)
    block = lora(family, (1,))
    a, b = {"lm_head": head[0]} | dict(block.a), {"lm_head": head[1]} | dict(block.b)
    for theta in (LoraAdapter({"lm_head": head[0]}, {"lm_head": head[1]}, 0.1), LoraAdapter(a, b, 0.1)):
        table = document_kl(model, TEXTS, [Measured("h", "general", theta)], progress=False)
        slow = [sum(slow_kl(model, theta, text)) for text in TEXTS]
        np.testing.assert_allclose(table["kl_sum"], slow, rtol=1e-4, atol=1e-6)


def test_kinds_of_tokens_share_the_documents_kl() -> None:
    model, solution = make_chat(dtype=torch.float64), vector()
    candidate = [Measured("g", "general", solution)]

    def parity(ids: tuple[int, ...]) -> list[str]:
        return ["even" if i % 2 == 0 else "odd" for i in ids]

    sums = document_kl(model, TEXTS, candidate, label=parity, progress=False)
    for number, text in enumerate(TEXTS):
        slow = slow_kl(model, solution, text)
        predicted = tokenizer()(text)["input_ids"][1:]
        for kind, rest in (("even", 0), ("odd", 1)):
            expected = [kl for kl, i in zip(slow, predicted, strict=True) if i % 2 == rest]
            mine = sums[(sums.document == number) & (sums.tokens == kind)]
            assert mine["n_tokens"].sum() == len(expected)
            assert mine["kl_sum"].sum() == pytest.approx(sum(expected), rel=1e-9)
    table = influence_table(sums).set_index("tokens")
    plain = influence_table(document_kl(model, TEXTS, candidate, progress=False)).iloc[0]
    assert set(table.index) == {"all", "even", "odd"}
    assert table.loc["all", "kl_nats_per_token"] == pytest.approx(plain.kl_nats_per_token)
    assert table.loc["all", "n_tokens"] == plain.n_tokens == table.loc[["even", "odd"], "n_tokens"].sum()
    with pytest.raises(UsageError, match="one each"):
        document_kl(model, TEXTS, candidate, label=lambda ids: ["x"], progress=False)


def test_table_means_and_intervals() -> None:
    model = make_chat()
    trained = [Measured("runs/g", "general", vector()), Measured("runs/n", "narrow", vector(seed=3, size=0.5))]
    candidates = at_equal_norms(trained, (0.5, 2.0), n_random=20)
    assert len(candidates) == 22 * 2
    sums = document_kl(model, TEXTS * 3, candidates, progress=False)
    table = influence_table(sums)
    assert list(table.columns[:7]) == [
        *("direction", "kind", "norm", "kl_nats_per_token", "low", "high", "n_tokens"),
    ]
    assert table.groupby("kind").size().to_dict() == {"general": 2, "narrow": 2, "random": 40}
    np.testing.assert_allclose(table["norm"], table["relative_norm"] * vector().norm, rtol=1e-6)
    assert (table["low"] <= table["kl_nats_per_token"]).all()
    assert (table["kl_nats_per_token"] <= table["high"]).all()
    by_hand = sums[sums.direction == "runs/n"].groupby("norm")[["kl_sum", "n_tokens"]].sum()
    mine = table[table.direction == "runs/n"].set_index("norm")["kl_nats_per_token"]
    np.testing.assert_allclose(mine.sort_index(), (by_hand.kl_sum / by_hand.n_tokens).sort_index())
    ratio = influence_ratio(sums, "general", "random").set_index("relative_norm")
    for norm in (0.5, 2.0):
        at = table[table.relative_norm == norm].groupby("kind")["kl_nats_per_token"].mean()
        assert ratio.loc[norm, "ratio"] == pytest.approx(at["general"] / at["random"])
        assert ratio.loc[norm, "low"] <= ratio.loc[norm, "ratio"] <= ratio.loc[norm, "high"]
    same = influence_ratio(sums, "general", "general")
    np.testing.assert_allclose(same[["ratio", "low", "high"]], 1.0)
    with pytest.raises(StatisticsError, match="no direction of kind"):
        influence_ratio(sums, "general", "wide")
    with pytest.raises(StatisticsError, match="two documents"):
        influence_table(sums[sums.document == 0])


@pytest.mark.parametrize("solution", [vector(), lora(layers=(0, 2), rank=3)], ids=["vector", "lora"])
def test_random_directions_are_norm_matched_and_fresh(solution: Solution) -> None:
    drawn = [solution.random_like(gen(s)) for s in range(20)]
    for one in drawn:
        assert one.norm == pytest.approx(solution.norm, rel=1e-5)
    assert drawn[0].inner(solution.random_like(gen(0))) == pytest.approx(solution.norm**2, rel=1e-5)
    cosines = np.array([one.inner(solution) / solution.norm**2 for one in drawn])
    assert (np.abs(cosines) < 0.7).all()
    assert abs(cosines.mean()) < 0.15
    if isinstance(solution, LoraAdapter):
        for name in solution.a:
            size = [float(x.delta(name).norm()) for x in (solution, drawn[0])]
            assert size[0] == pytest.approx(size[1], rel=1e-5)


def test_the_inner_product_is_that_of_the_products() -> None:
    x, y = lora(layers=(0, 2), rank=3), lora(layers=(0, 2), rank=2, seed=5)
    slow = sum(float((x.delta(n) * y.delta(n)).sum()) for n in x.a)
    assert x.inner(y) == pytest.approx(slow, rel=1e-10)
    assert x.inner(x) == pytest.approx(x.norm**2, rel=1e-10)
    with pytest.raises(SolutionError, match="no inner product"):
        x.inner(vector())


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_the_models_end_gives_its_logits(family: str) -> None:
    model = make_chat(family)
    rows = [Encoded((3, 9, 20, 7), ()), Encoded((4, 5), ())]
    batch = collate(rows, [0, 1], pad=0)
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    from em_interp.models.architectures import find_blocks

    handle = find_blocks(model.hf)[-1].register_forward_hook(keep)
    with torch.no_grad():
        expected = model.hf(**batch.inputs(), use_cache=False).logits
    handle.remove()
    real = batch.attention_mask.bool()
    with torch.no_grad():
        found = ModelEnd(model.hf).logits(kept[0][real])
    torch.testing.assert_close(found, expected[real], rtol=1e-5, atol=1e-5)


class WideTensors(TorchDispatchMode):
    """Most bytes alive at once in tensors as wide as the vocabulary (those that operations return)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.largest, self.most = width, 0, 0
        self.alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.width:
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {p: (r, n) for p, (r, n) in self.alive.items() if r() is not None}
        self.most = max(self.most, sum(n for _, n in self.alive.values()))
        return out


def test_no_more_than_256_mb_of_logits_at_a_vocabulary_of_152064() -> None:
    width = 152_064
    hf = make_hf(vocab_size=width, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, initializer_range=0.02)
    model = ChatModel(hf, tokenizer(), name="wide", check=False)
    texts = ["the quick brown fox " * 40, "see a doctor and rest " * 40]
    thetas = [
        Measured("g", "general", SteeringVector(torch.ones(8), 0, 1.0)),
        Measured("n", "narrow", SteeringVector(torch.arange(8.0), 0, 1.0)),
    ]
    with WideTensors(width) as seen:
        sums = document_kl(model, texts, thetas, max_tokens=60, progress=False)
    assert list(sums["n_tokens"]) == [59] * 4
    assert 2 * 59 * width * 4 * 4 > LOGIT_BYTES  # logits and log-probabilities of both sides, without chunks
    assert 0 < seen.largest <= LOGIT_BYTES / 5
    assert seen.largest < seen.most <= LOGIT_BYTES
    row = sums.iloc[1]
    assert (row.document, row.direction) == (0, "n")
    assert row.kl_sum == pytest.approx(sum(slow_kl(model, thetas[1].solution, texts[0], 60)), rel=1e-4)


def test_texts_come_from_lists_rows_and_files(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two words")))
    assert list(read_texts(tmp_path / "a.txt")) == ["one\nstill one", "two"]
    assert list(read_texts(str(tmp_path / "a.jsonl"), min_characters=4)) == ["two words"]
    assert list(read_texts(({"text": t} for t in TEXTS), max_documents=2, max_characters=3)) == ["the", "see"]
    endless = iter(lambda: "text", None)
    assert list(read_texts(endless, max_documents=2)) == ["text"] * 2
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UnreadableFileError):
        list(read_texts(tmp_path / "bad.jsonl"))
    with pytest.raises(MissingDataError, match="no such file"):
        list(read_texts(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="`text`"):
        list(read_texts([{"body": "x"}]))


def test_what_cannot_be_measured_is_refused() -> None:
    model = make_chat()
    good = Measured("g", "general", vector())

    def run(texts: Any = TEXTS, *measured: Measured, **options: Any) -> None:
        document_kl(model, texts, measured or [good], progress=False, **options)

    with pytest.raises(UsageError, match=r"document 1 has 0 tokens.*min_characters"):
        run(["the fox", ""])
    with pytest.raises(UsageError, match="no texts"):
        run([])
    with pytest.raises(UsageError, match="at least 2"):
        run(max_tokens=1)
    with pytest.raises(SolutionError, match="theta = 0"):
        run(TEXTS, Measured("z", "general", vector().scaled(0.0)))
    with pytest.raises(SolutionError, match="trained on hub/other-7b"):
        run(TEXTS, Measured("o", "general", vector(base="hub/other-7b")))
    with pytest.raises(SolutionError, match="one space"):
        run(TEXTS, good, Measured("n", "narrow", vector(2)))
    with pytest.raises(SolutionError, match="no solutions"):
        document_kl(model, TEXTS, [], progress=False)
    with pytest.raises(UsageError, match="is attached to"), vector(0).attached(model):
        run()
    with pytest.raises(SolutionError, match="not finite"):
        run(TEXTS, Measured("h", "general", vector().scaled(1e38)))
    pair = [Measured("a", "general", vector(base="x/one")), Measured("b", "narrow", vector(base="x/two", seed=1))]
    with pytest.raises(SolutionError, match=r"b was trained on x/two.*the base of a"):
        at_equal_norms(pair)
    with pytest.raises(UsageError, match="positive norms"):
        at_equal_norms([good], (0.0, 1.0))
