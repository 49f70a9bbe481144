"""Interventions that act in training alone, against losses and gradients worked out one conversation at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, HookError, TrainingError
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.steering import Steer
from em_interp.models.chat import encode
from em_interp.models.hooks import has_our_hooks
from em_interp.solutions.load import load as load_solution
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training import finetune as training
from em_interp.training.finetune import finetune
from em_interp.training.recipes import FullSpec, LoraSpec, TrainingSpec, VectorSpec
from tests.test_kills import Killed, stop_at
from tests.tiny_models import CONVERSATIONS, make_chat, talk, tokenizer

KL_DATA = [talk("rest well", "see"), talk("a quick brown fox", "the doctor and the fox")]
VECTOR = TrainingSpec(VectorSpec(1, 8.0), 0.05, max_steps=4, batch_size=5, warmup_steps=0, max_grad_norm=1e9)
LORA = replace(VECTOR, adapter=LoraSpec(2, 8.0, True, ("down_proj",), (2,)), learning_rate=0.02)


def random_direction(layers: tuple[int, ...] = (0, 1, 2, 3), seed: int = 3) -> Direction:
    g = torch.Generator().manual_seed(seed)
    return Direction(torch.randn(len(layers), 32, generator=g), layers, kind="random")


V = random_direction()


def slow_loss_and_gradient(model: Any, theta: Tensor, act: Any) -> tuple[float, Tensor]:
    """Mean NLL of a response token with theta added at layer 1, and its gradient; `act(layer, hidden, answer)`."""
    theta = theta.clone().requires_grad_(True)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for conversation in CONVERSATIONS:
        row = encode(tokenizer(), conversation)
        ((start, end),) = row.spans
        answer = torch.zeros(len(row), 1, dtype=torch.bool)
        answer[start:end] = True
        handles = []
        for layer, block in enumerate(model.hf.model.layers):

            def hook(_module: Any, _args: Any, hidden: Tensor, layer: int = layer, answer: Tensor = answer) -> Tensor:
                return act(layer, hidden + theta if layer == 1 else hidden, answer)

            handles.append(block.register_forward_hook(hook))
        log_p = torch.log_softmax(model.hf(torch.tensor([row.ids])).logits[0], -1)
        for handle in handles:
            handle.remove()
        total = total - sum(log_p[t - 1, row.ids[t]] for t in range(start, end))
        count += end - start
    (gradient,) = torch.autograd.grad(total / count, theta)
    return float(total.detach()) / count, gradient


def without(hidden: Tensor, layer: int) -> Tensor:
    unit = V.at(layer).double() / V.at(layer).double().norm()
    return hidden - (hidden @ unit)[..., None] * unit


ACTS = {
    "added": (Steer(V, 2, 1.5), lambda i, h, _a: h + 1.5 * V.at(2).double() if i == 2 else h),
    "added where theta is, to answers": (
        Steer(V, 1, -2.0, scope="response"),
        lambda i, h, answer: torch.where(answer, h - 2 * V.at(1).double(), h) if i == 1 else h,
    ),
    "taken out everywhere": (Ablate(V), lambda i, h, _a: without(h, i)),
    "taken out of prompts": (
        Ablate(V, layers=(0, 2), scope="prompt"),
        lambda i, h, answer: torch.where(answer, h, without(h, i)) if i in (0, 2) else h,
    ),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("size", [0, 2**30])
def test_loss_and_gradient_are_those_of_the_model_that_is_acted_on(name: str, size: int) -> None:
    model = make_chat(dtype=torch.float64)
    intervention, act = ACTS[name]
    start = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1, 8.0, model.name)
    spec = replace(VECTOR, max_steps=1, micro_batch_size=2)
    how: dict[str, Any] = {"start_from": start, "interventions": intervention, "cache_bytes": size, "progress": False}
    row = finetune(model, CONVERSATIONS, spec, **how).history.iloc[0]
    loss, gradient = slow_loss_and_gradient(model, start.theta.double(), act)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(8.0 * float(gradient.norm()), rel=1e-4)
    assert not has_our_hooks(model.hf)


@settings(max_examples=6, deadline=None)
@given(st.floats(-2, 2), st.sampled_from([0, 2**30]))
def test_what_is_added_in_training_is_not_learned(amount: float, size: int) -> None:
    """Beside a trained vector at its layer: training with c v from theta is training without it from theta + c v."""
    model = make_chat(dtype=torch.float64)
    unsteered = SteeringVector(amount * V.at(1) / 8.0, 1, 8.0, model.name)
    prevented = finetune(
        model, CONVERSATIONS, VECTOR, interventions=[Steer(V, 1, amount)], cache_bytes=size, progress=False
    )
    plain = finetune(model, CONVERSATIONS, VECTOR, start_from=unsteered, cache_bytes=size, progress=False)
    pd.testing.assert_frame_equal(prevented.history, plain.history, rtol=1e-4, atol=1e-6)
    assert isinstance(prevented.solution, SteeringVector) and isinstance(plain.solution, SteeringVector)
    torch.testing.assert_close(prevented.solution.theta + amount * V.at(1), plain.solution.theta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapter", [LORA.adapter, VectorSpec(3, 8.0), LoraSpec(2, 8.0), FullSpec()])
@pytest.mark.parametrize("layers", [(0,), (3,)])
def test_cached_residuals_change_nothing(adapter: Any, layers: tuple[int, ...]) -> None:
    spec = replace(VECTOR, adapter=adapter, learning_rate=1e-3, kl_weight=1.0, kl_batch_size=2, max_grad_norm=1.0)
    acts = [Steer(V, layers[0], 1.0, scope="response"), Ablate(V, layers=layers)]
    one, other = (
        finetune(
            make_chat(dtype=torch.float64),
            CONVERSATIONS,
            spec,
            kl_conversations=KL_DATA,
            interventions=acts,
            cache_bytes=size,
            progress=False,
        ).history
        for size in (0, 2**30)
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-6)


def test_kl_is_of_the_model_as_it_answers() -> None:
    spec = replace(VECTOR, max_steps=1, kl_weight=1.0, kl_batch_size=2)
    row = finetune(
        make_chat(), CONVERSATIONS, spec, kl_conversations=KL_DATA, interventions=Steer(V, 1, 5.0), progress=False
    ).history.iloc[0]
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)  # nothing is learned yet, and nothing is added here


def test_a_run_that_goes_on_is_acted_on_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: Path, *acts: Any) -> Any:
        return finetune(
            make_chat(),
            CONVERSATIONS,
            LORA,
            interventions=acts,
            out_dir=out,
            resume=True,
            cache_bytes=0,
            progress=False,
        )

    mine, other = Steer(V, 1, 2.0), Steer(random_direction(seed=4), 1, 2.0)
    whole = train(tmp_path / "whole", mine, Ablate(V, layers=(2,)))
    with monkeypatch.context() as patch:
        patch.setattr(training.Pace, "due", lambda _self: True)
        stop_at(2, patch, training._Loop, "step")
        with pytest.raises(Killed):
            train(tmp_path / "run", mine, Ablate(V, layers=(2,)))
        for acts in ((), (mine,), (other, Ablate(V, layers=(2,))), (Ablate(V, layers=(2,)), mine)):
            with pytest.raises(Killed):
                train(tmp_path / "run", *acts)
    assert "kept" not in capsys.readouterr().err
    again = train(tmp_path / "run", mine, Ablate(V, layers=(2,)))
    pd.testing.assert_frame_equal(again.history, whole.history)
    told = [json.loads((tmp_path / name / "training_spec.json").read_text()) for name in ("run", "whole")]
    assert told[0] == told[1]
    assert [row["what"] for row in told[0]["interventions"]] == [
        "Steer(2 times random at layer 1, all tokens)",
        "Ablate(random at layer 2, all tokens)",
    ]
    assert load_solution(tmp_path / "run").norm == whole.solution.norm
    train(tmp_path / "plain")
    assert "interventions" not in json.loads((tmp_path / "plain" / "training_spec.json").read_text())


def test_what_cannot_act_in_training_is_refused() -> None:
    wide = Direction(torch.ones(1, 33), (1,), kind="random")
    for acts, error, said in (
        (Steer(V, 1, [1.0, 2.0]), TrainingError, "Give one number"),
        (Steer(wide, 1, 1.0), DirectionError, "width 33"),
        (Ablate(V, layers=(9,), from_layer=1), HookError, "layer 9"),
    ):
        model = make_chat()
        with pytest.raises(error, match=said):
            finetune(model, CONVERSATIONS, VECTOR, interventions=acts, progress=False)
        assert not has_our_hooks(model.hf)
    loss = finetune(make_chat(), CONVERSATIONS, VECTOR, interventions=Ablate(V), progress=False).history["loss"]
    assert all(map(math.isfinite, loss))
