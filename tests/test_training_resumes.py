"""A killed finetune goes on from its last state, and ends as an uninterrupted one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from em_interp.solutions import load as solutions
from em_interp.training import finetune as training
from em_interp.training.finetune import finetune
from em_interp.training.recipes import FullSpec, LoraSpec, TrainingSpec, VectorSpec
from tests.test_kills import Killed, stop_at
from tests.tiny_models import CONVERSATIONS, make_chat, talk

KL_DATA = [talk("rest well", "see"), talk("a quick brown fox", "the doctor and the fox")]
VECTOR = TrainingSpec(VectorSpec(1, 8.0), 0.05, max_steps=8, batch_size=3, kl_weight=1.0, kl_batch_size=1)
SPECS = {
    "vector": VECTOR,
    "lora": replace(VECTOR, adapter=LoraSpec(2, 8.0), learning_rate=0.01, max_steps=None, epochs=4),
    "full": replace(VECTOR, adapter=FullSpec(), learning_rate=1e-3),
}


@pytest.mark.parametrize(("kind", "size"), [("vector", 0), ("vector", 2**30), ("lora", 0), ("full", 0)])
def test_training_goes_on_to_the_same_weights(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: Path, model: Any, resume: bool = True) -> Any:
        return finetune(
            model,
            CONVERSATIONS,
            replace(SPECS[kind], save_steps=2),
            kl_conversations=KL_DATA,
            out_dir=out,
            resume=resume,
            cache_bytes=size,
            progress=False,
        )

    whole_model, model = make_chat(), make_chat()
    whole = train(tmp_path / "whole", whole_model, resume=False)
    for stopped in (3, 2):
        with monkeypatch.context() as patch:
            patch.setattr(training.Pace, "due", lambda _self: True)
            stop_at(stopped, patch, training._Loop, "step")
            with pytest.raises(Killed):
                train(tmp_path / "run", make_chat())
    assert "kept 3 of 8 steps" in capsys.readouterr().err
    result = train(tmp_path / "run", model)
    assert "kept 5 of 8 steps" in capsys.readouterr().err
    exact = size == 0 or kind == "full"
    pd.testing.assert_frame_equal(result.history, whole.history, check_exact=exact, **({} if exact else {"rtol": 1e-3}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "whole"]
    for place in (".", "checkpoints/checkpoint-2", "checkpoints/checkpoint-6"):
        assert [p.name for p in sorted((tmp_path / "run" / place).iterdir())] == [
            p.name for p in sorted((tmp_path / "whole" / place).iterdir())
        ]
    if kind == "full":
        for one, other in zip(model.hf.parameters(), whole_model.hf.parameters(), strict=True):
            assert torch.equal(one, other)
    else:
        one, other = (solutions.load(tmp_path / name) for name in ("run", "whole"))
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4)


def _tensors(solution: Any) -> list[torch.Tensor]:
    if isinstance(solution, solutions.SteeringVector):
        return [solution.vector]
    return [*solution.a.values(), *solution.b.values()]


def test_training_of_something_else_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = replace(VECTOR, kl_weight=0.0)

    def train(model: Any = None, data: Any = CONVERSATIONS, **changes: Any) -> None:
        finetune(
            model or make_chat(), data, replace(spec, **changes), out_dir=tmp_path / "run", resume=True, progress=False
        )

    with monkeypatch.context() as patch:
        stop_at(4, patch, training._Loop, "step")
        with pytest.raises(Killed):
            train()
        for other in ({"seed": 1}, {"model": make_chat(seed=5)}, {"data": CONVERSATIONS[:4]}):
            with pytest.raises(Killed):
                train(**other)
    assert "kept" not in capsys.readouterr().err
    train()
    assert "steps" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
