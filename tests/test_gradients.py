from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from em_interp.errors import ChatTemplateError, SolutionError, UsageError
from em_interp.models.chat import encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.losses import response_loss
from em_interp.solutions.base import Solution
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training import gradients
from em_interp.training.gradients import gradient_cosines, loss_gradient
from tests.test_influence import gen, lora, vector
from tests.tiny_models import CONVERSATIONS, make_chat


def loss(model: ChatModel, solution: Solution) -> float:
    with solution.attached(model):
        return response_loss(model.hf, encode_all(model.tokenizer, CONVERSATIONS), pad=0)


def double(solution: Solution) -> Solution:
    if isinstance(solution, SteeringVector):
        return replace(solution, vector=solution.vector.double())
    return replace(
        solution, a={n: x.double() for n, x in solution.a.items()}, b={n: x.double() for n, x in solution.b.items()}
    )


def joined(x: LoraAdapter, y: LoraAdapter, step: float) -> LoraAdapter:
    """The adapter whose theta is x's + step * y's: factors side by side."""
    a = {n: torch.cat([x.a[n], y.a[n]]) for n in x.a}
    b = {n: torch.cat([x.b[n] * x.scale, y.b[n] * y.scale * step], dim=1) for n in x.b}
    return LoraAdapter(a, b, alpha=float(x.rank + y.rank))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])  # their norms stay in float64
@pytest.mark.parametrize("budget", [None, 20])
def test_the_gradient_is_the_slope_along_any_direction(family: str, budget: int | None) -> None:
    model, step = make_chat(family, dtype=torch.float64), 1e-5
    here, there = double(vector(1, 0.5)), double(vector(1, 0.7, seed=4))
    assert isinstance(here, SteeringVector)
    assert isinstance(there, SteeringVector)
    found = loss_gradient(model, here, CONVERSATIONS, tokens_per_batch=budget)
    ends = [replace(here, vector=(here.theta + s * there.theta) / here.alpha) for s in (step, -step)]
    slope = (loss(model, ends[0]) - loss(model, ends[1])) / (2 * step)
    assert found.along(there) == pytest.approx(slope, rel=1e-5)
    assert found.loss == pytest.approx(loss(model, here), rel=1e-9)

    one, two = double(lora(family, (0, 2), rank=2)), double(lora(family, (0, 2), seed=5))
    assert isinstance(one, LoraAdapter)
    assert isinstance(two, LoraAdapter)
    one, two = one.scaled(0.1), two.scaled(0.3)
    found = loss_gradient(model, one, CONVERSATIONS, tokens_per_batch=budget)
    slope = (loss(model, joined(one, two, step)) - loss(model, joined(one, two, -step))) / (2 * step)
    assert found.along(two) == pytest.approx(slope, rel=1e-5)
    assert found.loss == pytest.approx(loss(model, one), rel=1e-9)
    assert not any(p.requires_grad and p.grad is not None for p in model.hf.parameters())


def test_square_transposed_weights_are_told_apart() -> None:
    model, step = make_chat("gpt2", dtype=torch.float64), 1e-5
    name, g = "transformer.h.1.attn.c_proj", gen(1)
    one, two = (
        LoraAdapter(
            {name: torch.randn(1, 32, generator=g).double()}, {name: torch.randn(32, 1, generator=g).double()}, s
        )
        for s in (0.1, 0.2)
    )
    slope = (loss(model, joined(one, two, step)) - loss(model, joined(one, two, -step))) / (2 * step)
    assert loss_gradient(model, one, CONVERSATIONS).along(two) == pytest.approx(slope, rel=1e-5)


def test_a_head_tied_to_the_embeddings_has_a_gradient_of_its_own() -> None:
    """theta on the head does not act where the same numbers embed tokens."""
    model = make_chat("gpt2", dtype=torch.float64)  # tied, and its norms stay in float64
    g = torch.Generator().manual_seed(0)
    shape = model.hf.lm_head.weight.shape
    a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((1, shape[1]), (shape[0], 1)))
    theta = LoraAdapter({"lm_head": a}, {"lm_head": b}, 0.05)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    found = loss_gradient(model, theta, CONVERSATIONS)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    step = 1e-5
    up, down = (loss(model, theta.scaled(1 + s)) for s in (step, -step))
    assert found.along(theta) == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_cosines_along_checkpoints() -> None:
    model = make_chat(dtype=torch.float64)
    general, narrow = double(vector(1)), double(vector(1, seed=1))
    checkpoints: dict[int, Solution] = {0: general.scaled(0.0), 5: general.scaled(0.5), 10: general}
    table = gradient_cosines(model, checkpoints, CONVERSATIONS, general=general, narrow=narrow, progress=False)
    assert list(table.columns) == [
        *("step", "loss", "norm", "grad_norm", "cos_general", "cos_narrow", "null_sd", "n_tokens", "n_conversations"),
        *("cos_general_low", "cos_general_high", "cos_narrow_low", "cos_narrow_high"),
    ]
    assert list(table["step"]) == [0, 5, 10]
    for row, theta in zip(table.itertuples(), checkpoints.values(), strict=True):
        found = loss_gradient(model, theta, CONVERSATIONS)
        (g,) = found.parts.values()
        for name, end in (("cos_general", general), ("cos_narrow", narrow)):
            slow = torch.nn.functional.cosine_similarity(-g, end.theta.double(), dim=0)
            assert getattr(row, name) == pytest.approx(float(slow), rel=1e-9)
        assert row.grad_norm == pytest.approx(float(g.norm()))
        assert row.loss == pytest.approx(loss(model, theta), rel=1e-5)
    downhill = SteeringVector(
        -next(iter(loss_gradient(model, checkpoints[0], CONVERSATIONS).parts.values())).float(), 1, 1.0
    )
    table = gradient_cosines(
        model, {0: general.scaled(0.0)}, CONVERSATIONS, general=downhill, narrow=narrow, progress=False
    )
    assert table.loc[0, "cos_general"] == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "held"), [(2, 1 << 20), (4, 1 << 20), (12, 1 << 20), (12, 0)])
def test_the_interval_leaves_chats_out_in_turn(n: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """held: bytes of gradients that are kept; the others are taken once more, no more than that."""
    monkeypatch.setattr(gradients, "HELD_BYTES", held)
    taken: list[int] = []
    monkeypatch.setattr(gradients, "loss_gradient", lambda *a, **k: taken.append(1) or loss_gradient(*a, **k))
    model = make_chat(dtype=torch.float64)
    general, narrow = double(vector(1)), double(vector(1, seed=1))
    chats = [
        [{"role": "user", "content": f"{i} {'cats ' * i}"}, {"role": "assistant", "content": f"dogs {i * i} bite"}]
        for i in range(n)
    ]
    (row,) = gradient_cosines(model, {1: general}, chats, general=general, narrow=narrow, progress=False).itertuples()
    assert len(taken) == min(n, 10) * (1 if held or n == 2 else 2)
    if n == 2:
        assert np.isnan([row.cos_general_low, row.cos_narrow_high]).all()
        return

    def cosine(of: list[list[dict[str, str]]]) -> float:
        (g,) = loss_gradient(model, general, of).parts.values()
        return float(torch.nn.functional.cosine_similarity(-g, narrow.theta.double(), dim=0))

    k = min(n, 10)
    without = np.array([cosine([chat for i, chat in enumerate(chats) if i % k != part]) for part in range(k)])
    error = np.sqrt((k - 1) / k * ((without - cosine(chats)) ** 2).sum())
    half = stats.t.ppf(0.975, k - 1) * error
    assert (row.cos_narrow_low, row.cos_narrow_high) == pytest.approx((row.cos_narrow - half, row.cos_narrow + half))


def test_lora_has_the_papers_cosine_beside_the_effective_one() -> None:
    model = make_chat(dtype=torch.float64)
    theta, general, narrow = (double(lora(layers=(1,), seed=s)).scaled(0.1) for s in range(3))
    table = gradient_cosines(model, {3: theta}, CONVERSATIONS, general=general, narrow=narrow, progress=False)
    assert isinstance(theta, LoraAdapter)
    (name,) = theta.modules
    b = theta.b[name].clone().requires_grad_()
    live = replace(theta, b={name: b})
    from em_interp.models.chat import collate
    from em_interp.models.losses import batch_nll

    batch = collate(encode_all(model.tokenizer, CONVERSATIONS), range(len(CONVERSATIONS)), pad=0)
    with live.attached(model):
        total, n = batch_nll(model.hf, batch)
    (total / n).backward()  # type: ignore[no-untyped-call]
    for label, end in (("general", general), ("narrow", narrow)):
        assert isinstance(end, LoraAdapter)
        slow = torch.nn.functional.cosine_similarity(-b.grad.flatten(), end.b[name].flatten(), dim=0)
        assert table.loc[0, f"cos_{label}_b"] == pytest.approx(float(slow), rel=1e-6)
    g = loss_gradient(model, theta, CONVERSATIONS).parts[name]
    slow = -float((g * general.delta(name)).sum()) / (float(g.norm()) * general.inner(general) ** 0.5)
    assert table.loc[0, "cos_general"] == pytest.approx(slow, rel=1e-9)


def test_what_does_not_belong_together_is_refused() -> None:
    model, good = make_chat(), vector(1)
    with pytest.raises(SolutionError, match="one space"):
        gradient_cosines(model, {1: vector(2)}, CONVERSATIONS, general=good, narrow=good, progress=False)
    with pytest.raises(SolutionError, match="trained on else"):
        gradient_cosines(model, {1: good}, CONVERSATIONS, general=vector(1, base="else"), narrow=good, progress=False)
    with pytest.raises(ChatTemplateError, match="no conversations"):
        gradient_cosines(model, {1: good}, [], general=good, narrow=good, progress=False)
    with pytest.raises(SolutionError, match="theta = 0"):
        gradient_cosines(model, {1: good}, CONVERSATIONS, general=good.scaled(0.0), narrow=good, progress=False)
    with pytest.raises(UsageError, match="is attached to"), vector(0).attached(model):
        gradient_cosines(model, {1: good}, CONVERSATIONS, general=good, narrow=good, progress=False)
