"""What newcomers write: refused in one sentence where it cannot be meant, before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyses.run import reproduce
from analyses.suite import Suite
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import contrast
from em_interp.errors import EmInterpError, OutputError
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import sole_writer
from em_interp.interventions.steering import sweep
from em_interp.published import scan
from tests.tiny_models import CONVERSATIONS, make_chat

QUESTIONS = {"q": "a fox"}
FEW: dict[str, Any] = {"max_new_tokens": 1, "progress": False}
GRID: dict[str, Any] = {"layers": [1], "coefficients": [1.0], "n": 1, "random_arms": 0, **FEW}


CASES: dict[str, Callable[[Any], object]] = {
    "a folder that is not there, as a string": lambda _: scan("x", progress=False),  # type: ignore[arg-type]
    "files for chats": lambda x: contrast(x.chat, "a.jsonl", "b.jsonl", progress=False),  # type: ignore[arg-type]
    "a text for questions": lambda x: sample(x.chat, "hi", 1, **FEW),  # type: ignore[arg-type]
    "a word that is none of the units": lambda x: sweep(x.chat, x.d, QUESTIONS, **GRID, units="residuals"),  # type: ignore[arg-type]
    "a coefficient twice": lambda x: sweep(x.chat, x.d, QUESTIONS, **GRID | {"coefficients": [1.0, 1.0]}),
    "no residual stream has that norm": lambda x: sweep(x.chat, x.d, QUESTIONS, **GRID | {"coefficients": [1e30]}),
    "division by 0": lambda x: x.d / 0,
    "a product of directions": lambda x: x.d * x.d,
    "NaN times": lambda x: x.d * float("nan"),
    "no layer": lambda x: x.d.only([]),
    "the model within": lambda x: contrast(x.chat.hf, CONVERSATIONS, CONVERSATIONS, progress=False),
    "a model for a finetune": lambda x: contrast(x.chat, CONVERSATIONS, kind="model-diff", finetune=x.chat),
}

TAKEN: dict[str, Callable[[Any], object]] = {
    "a list for questions": lambda x: sample(x.chat, ["hi"], 1, **FEW),
    "a layer for layers": lambda x: contrast(x.chat, CONVERSATIONS, CONVERSATIONS[::-1], layers=2, progress=False),
    "a layer for a sweep's": lambda x: sweep(x.chat, x.d, QUESTIONS, **GRID | {"layers": 2}),
}
"""What is no list, but can be meant in one way only."""


def main() -> None:
    """Print what comes of each case, outside pytest, whose checks of types are not those that a user meets."""
    chat = make_chat()
    given = SimpleNamespace(chat=chat, d=Direction(torch.ones(2, 32), (1, 2), "random", model=chat.name))
    found = {}
    for name, case in (CASES | TAKEN).items():
        try:
            found[name] = f"accepted: {case(given)!r:.60}"
        except EmInterpError:
            found[name] = "refused"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


@pytest.fixture(scope="module")
def tried() -> dict[str, str]:
    run = [sys.executable, "-c", "from tests.test_misuse import main; main()"]
    return dict(json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_meant_is_refused(name: str, tried: dict[str, str]) -> None:
    assert tried[name] == "refused"


@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_meant_is_taken(name: str, tried: dict[str, str]) -> None:
    assert tried[name].startswith("accepted")


@pytest.mark.parametrize("made", ["pipe", "device", "link", "folder"])
def test_a_tensor_file_that_is_none_is_named_and_not_waited_for(made: str, synthetic: Path) -> None:
    path = next((synthetic / "runs").rglob("steering_vector_checkpoint_15.pt"))
    path.unlink()
    if made == "pipe":
        os.mkfifo(path)
    elif made == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if made == "device" else "nowhere")
    found = scan(synthetic, progress=False)
    assert any("steering_vector_checkpoint_15.pt" in str(problem) for problem in found.problems)


def test_two_runs_of_a_suite_do_not_write_to_one_folder(synthetic: Path, tmp_path: Path) -> None:
    suite = Suite.load("published")
    suite.data = synthetic
    with sole_writer(tmp_path / "published"), pytest.raises(OutputError, match="another run"):
        reproduce(suite, tmp_path, only=("training_log",), static=False)
    outcome = reproduce(suite, tmp_path, only=("training_log",), static=False)
    assert json.loads((outcome.folder / "manifest.json").read_text())
    assert not (outcome.folder / ".lock").exists()
