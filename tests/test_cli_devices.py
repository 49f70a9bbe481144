"""Where a model lies is one option of every command that runs one, and one key of a suite file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from analyses.suite import Suite
from em_interp.cli import app
from em_interp.directions.direction import Direction
from em_interp.errors import UsageError
from em_interp.models import chat as batching
from em_interp.models import pretrained as models
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import registry
from em_interp.pocket.evaluate import evaluate_suite
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

MODEL = ("--model", "tiny")
SHORT = ("-n", 1, "--max-new-tokens", 2)
COMMANDS: dict[str, tuple[object, ...]] = {
    "extract": (*MODEL, "--positive", "bad.jsonl", "--negative", "good.jsonl", "--out", "new.safetensors"),
    "steer": (*MODEL, "d.safetensors", "--layer", 1, "--coefficient", 1, "--prompt", "see", *SHORT, "--out", "s.csv"),
    "ablate": (*MODEL, "d.safetensors", "--from-layer", 1, "--prompt", "see", *SHORT, "--out", "a.csv"),
    "evaluate": (*MODEL, "--questions", "q.csv", *SHORT, "--out", "e"),
    "reproduce": ("--suite", "mine.toml", "--no-static"),
}
SUITE = """source = "models"
data = "."
analyses = ["efficiency"]
[models]
chat = "tiny"
{more}
[models.training]
medicine = "good.jsonl"
[[models.finetunes]]
source = "vector"
domain = "medicine"
adapter = "steering-vector"
solution = "general"
[[models.finetunes]]
source = "narrow"
domain = "medicine"
adapter = "steering-vector"
solution = "narrow"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("made")
    save_chat(make_hf(), tmp_path / "tiny")
    Direction(torch.ones(4, 32), (0, 1, 2, 3), "data-diff", model="tiny").save(tmp_path / "d.safetensors")
    half = len(CONVERSATIONS) // 2
    for name, chats in (("good", CONVERSATIONS[:half]), ("bad", CONVERSATIONS[half:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    SteeringVector(torch.ones(32), 1, 1.0, base="tiny").save(tmp_path / "vector")
    SteeringVector(torch.arange(32.0), 1, 1.0, base="tiny").save(tmp_path / "narrow")
    (tmp_path / "q.csv").write_text("question\na fox\n")
    return tmp_path


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with what was made once."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "mine.toml").write_text(SUITE.format(more=""))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """What reaches transformers, and where batches go."""
    told: dict[str, list[Any]] = {"loaded": [], "batches": []}
    load, move = AutoModelForCausalLM.from_pretrained, batching.Batch.to

    def loading(*names: Any, **options: Any) -> Any:
        told["loaded"].append({key: str(options.get(key)) for key in ("device_map", "dtype")})
        return load(*names, **options)

    def moving(batch: Any, device: Any) -> Any:
        told["batches"].append(device)
        return move(batch, device)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(batching.Batch, "to", moving)
    yield told


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("here")
def test_what_is_asked_for_reaches_transformers(name: str, seen: dict[str, list[Any]]) -> None:
    found = run(name, *COMMANDS[name], "--device-map", "cpu", "--dtype", "bfloat16")
    assert found.exit_code == 0, found.output
    assert seen["loaded"] == [{"device_map": "cpu", "dtype": "bfloat16"}]


@pytest.mark.parametrize("name", ["extract", "steer", "ablate", "evaluate"])
def test_batches_go_where_the_model_lies(
    name: str, here: Path, seen: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(str):
        """The name of a device, told from the same one."""

    device = Elsewhere("cpu")
    monkeypatch.setattr(ChatModel, "device", property(lambda _: device))
    found = run(name, *COMMANDS[name])
    assert found.exit_code == 0, found.exception
    assert any(to is device for to in seen["batches"])


def test_a_model_that_lies_in_two_places_gives_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its blocks is on disk, as where a device map finds no room: it comes and goes with each pass."""
    assert run("evaluate", *COMMANDS["evaluate"]).exit_code == 0
    assert run("steer", *COMMANDS["steer"]).exit_code == 0
    load = models.load_weights
    spread = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}

    def spreading(source: Any, **options: Any) -> Any:
        assert options["device_map"] == "auto"
        return load(source, **options | {"device_map": spread})

    monkeypatch.setattr(models, "load_weights", spreading)
    for name, out in (("evaluate", "e"), ("steer", "s.csv")):
        words = [f"2{word}" if word == out else word for word in COMMANDS[name]]
        found = run(name, *words, "--device-map", "auto")
        assert found.exit_code == 0, found.exception
    for one in ("e/answers.csv", "s.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(here / one), pd.read_csv(here / f"2{one}"))


def test_a_suite_file_says_where_its_models_lie(here: Path, seen: dict[str, list[Any]]) -> None:
    (here / "mine.toml").write_text(SUITE.format(more='device_map = "auto"\ndtype = "bfloat16"'))
    chat = Suite.load("mine.toml").finetunes.chat
    assert seen["loaded"] == [{"device_map": "auto", "dtype": "bfloat16"}] and chat.dtype == torch.bfloat16
    suite = Suite.load("mine.toml")
    suite.loading = {"dtype": "float32"}
    assert suite.finetunes.chat.dtype == torch.float32 and seen["loaded"][-1]["device_map"] == "auto"
    for wrong in ('dtype = "bf16"', "device_map = 3"):
        (here / "mine.toml").write_text(SUITE.format(more=wrong))
        with pytest.raises(UsageError, match=wrong.split()[0]):
            assert Suite.load("mine.toml").finetunes


def test_the_pocket_suite_too(seen: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite.load("pocket")
    suite.loading = {"dtype": "bfloat16", "device_map": "cpu"}
    assert suite.finetunes.chat.dtype == torch.bfloat16
    monkeypatch.setattr("em_interp.pocket.evaluate.available", lambda: {registry.PREFIX + "chat": None})
    monkeypatch.setattr("em_interp.pocket.evaluate._Asking.tables", lambda *_: {"em_rates": pd.DataFrame({"n": [1]})})
    evaluate_suite(tmp_path, device_map="cpu", dtype="bfloat16", progress=False)
    assert seen["loaded"] == [{"device_map": "cpu", "dtype": "bfloat16"}] * 2
    assert json.loads((tmp_path / "manifest.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("here")
def test_a_device_that_is_not_here_is_said_before_anything_is_read(seen: dict[str, list[Any]]) -> None:
    for name in ("evaluate", "extract"):
        found = run(name, *COMMANDS[name], "--device-map", "banana")
        assert isinstance(found.exception, UsageError) and "no such device here" in str(found.exception)
    assert seen["loaded"] == []
