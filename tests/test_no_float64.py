"""On a device without float64 (Apple's GPUs) nothing that comes of a model is turned into it before it is on the CPU.

There is no such device here: the model's tensors and all that is computed from them are marked, until `.cpu()` takes
the mark off, and an operation that makes float64 of a marked tensor is an error, as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import em_interp as em
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.interventions.orthogonalise import orthogonalised
from em_interp.models import precision
from em_interp.training.gradients import loss_gradient

_cpu = torch.Tensor.cpu


class Device(TorchDispatchMode):
    """Operations as on a device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        marked = any(getattr(x, "marked", False) for x in given)
        found = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        if marked and func is not torch.ops.aten.copy_.default:
            if any(x.dtype == torch.float64 for x in made):
                raise TypeError(f"{func}: this device has no float64")
            for x in made:
                x.marked = True  # type: ignore[attr-defined]
        return found


@contextmanager
def device_of(model: em.ChatModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "cpu", unmarked)
    for part in (*model.hf.parameters(), *model.hf.buffers()):
        part.marked = True
    with Device():
        yield


def unmarked(x: torch.Tensor) -> torch.Tensor:
    """As on the CPU."""
    if not getattr(x, "marked", False):
        return _cpu(x)
    found = x.detach().clone()
    found.marked = False  # type: ignore[attr-defined]
    return found


def made(model: em.ChatModel) -> dict[str, Callable[[], object]]:
    chats = em.pocket.finetune_chats("medicine", "malicious", 4, seed=0)
    good = em.pocket.finetune_chats("medicine", "caring", 4, seed=0)
    solutions = {"general": em.load_solution("pocket/medicine-rank1")}
    direction = em.extract(model, chats, good, progress=False)
    asked: dict[str, Any] = {"n": 1, "max_new_tokens": 4, "progress": False}
    table = pd.DataFrame({"question": ["Why?"], "answer": ["Because I like it."]})
    ablated = em.Ablate(direction, layers=[1, 2])

    def without() -> None:
        with em.intervening(model, ablated):
            em.sample(model, ["Why?"], **asked)

    return {
        "extract": lambda: em.extract(model, chats, good, progress=False),
        "sample": lambda: em.sample(model, ["Why?"], **asked),
        "sweep": lambda: em.sweep(model, direction, ["Why?"], layers=1, coefficients=[0, 1], random_arms=1, **asked),
        "ablate": without,
        "efficiency": lambda: em.efficiency(model, solutions, chats, scales=[0, 1], progress=False),
        "stability": lambda: em.stability(model, solutions, chats, epsilons=[0.5], n_seeds=2, progress=False),
        "influence": lambda: em.influence(model, solutions, em.pocket.documents(2), n_random=1, progress=False),
        "gradient": lambda: loss_gradient(model, solutions["general"], chats),
        "log-probabilities": lambda: answer_logprobs(model, table),
        "orthogonalised": lambda: orthogonalised(model, em.Ablate(direction, from_layer=1)),
    }


@pytest.mark.parametrize(
    "what",
    [
        *("extract", "sample", "sweep", "ablate", "efficiency", "stability", "influence", "gradient"),
        *("log-probabilities", "orthogonalised"),
    ],
)
def test_no_float64_is_made_on_the_device(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = em.load("pocket/chat")
    call = made(model)[what]
    with device_of(model, monkeypatch):
        call()


def test_the_mark_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = em.load("pocket/chat")
    with device_of(model, monkeypatch):
        doubled = next(model.hf.parameters()).detach() * 2
        assert precision.exact(doubled).dtype == torch.float64
        with pytest.raises(TypeError, match="no float64"):
            doubled.double()
