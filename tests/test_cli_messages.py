"""What a command says when something is wrong: the reason, in a line or two, and a remedy in options."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.released import cosines
from em_interp import cli
from em_interp.cli.remedies import brief, in_options
from em_interp.directions.direction import Direction
from em_interp.models import pretrained as models
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"\w\([^()]*[=.)]|\b\w+=\w|=\.\.\.|\bdataclasses\b|\bfrom_layer\b|`(adapter|layers|scope|base)=?`")
FOR_PYTHON = {
    "errors.py": "of a call, which no command makes",
    "inspect/": "options of Inspect's own command",
    "directions/activations.py: Activations(": "a repr",
    "directions/activations.py: per-response means": "commands ask for means alone",
    "directions/extraction.py: Contrast(": "a repr",
    "directions/direction.py: layers differ": "no command adds directions up",
    "files/adapters.py: Merge it into its base": "another package does it",
    "files/adapters.py: Save it again with PEFT": "another package does it",
    "interventions/ablation.py: Erase(": "a repr",
    "interventions/intervening.py: a pass outside": "commands generate with a KV cache",
    "interventions/steering.py: the residual norm is": "commands measure it",
    "landscape/influence.py: document": "suites cut their texts",
    "evaluation/comparison.py: Comparison(": "a repr",
    "files/given.py: X is a table": "commands are given files",
    "landscape/landscape.py": "suites leave nothing attached",
    "landscape/stability.py": "no command perturbs one factor",
    "models/adapters.py: X: brings its own": "another package does it",
    "models/adapters.py: the PeftModel has": "commands load no PeftModel",
    "figures/export.py: ": "pages: HTML and JavaScript",
    "models/chat_model.py: ChatModel(": "a repr",
    "models/chat_model.py: X: it changed": "what a check found",
    "models/checks.py: dropout": "commands load models in eval mode",
    "models/pretrained.py: X: no tokenizer": "another package does it",
    "face/plots.py: answers are not plotted": "commands draw rates alone",
    "pocket/world": "no command asks for single questions",
    "solutions/lora.py": "no command perturbs one factor",
    "solutions/steering_vector.py": "no command perturbs one factor",
    "solutions/weight_delta.py: on=": "no command perturbs one factor",
}
"""Messages with words of Python that no command shows, or that mean Python: file, their beginning, and why."""


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)  # type: ignore[attr-defined]


def messages() -> Iterator[str]:
    """FILE: TEXT of every text in the package that could be a message with Python in it."""
    for path in sorted((ROOT / "em_interp").rglob("*.py")):
        name, tree = path.relative_to(ROOT / "em_interp").as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        within = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in ast.walk(n) if v is not n}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and not {id(node)} & (statements | within):
                text = text_of(node)
                if not name.startswith("cli/") and len(text.split()) > 4 and PYTHON.search(text):
                    yield f"{name}: {text}"


def test_no_remedy_is_left_in_python() -> None:
    found = list(messages())
    assert len(found) > 30
    left = [message for message in found if PYTHON.search(in_options(message).partition(": ")[2])]
    assert [message for message in left if not message.startswith(tuple(FOR_PYTHON))] == []
    assert [known for known in FOR_PYTHON if not any(message.startswith(known) for message in found)] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it under another name, and directions."""
    tmp_path = tmp_path_factory.mktemp("made")
    save_chat(make_hf(), tmp_path / "tiny")
    base = models.load(tmp_path / "tiny", name="elsewhere/other")
    spec = TrainingSpec(LoraSpec(1, 4.0, True, ("down_proj",), (2,)), 0.1, max_steps=3, batch_size=2, warmup_steps=0)
    finetune(base, CONVERSATIONS, spec, out_dir=tmp_path / "tuned", progress=False)
    for solution, vector in (("general", torch.ones(32)), ("narrow", torch.arange(32.0))):
        SteeringVector(vector, 1, 1.0, base="elsewhere/other").save(tmp_path / solution)
    vectors = torch.ones(4, 32)
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny").save(tmp_path / "d.safetensors")
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="other").save(tmp_path / "other.safetensors")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    (tmp_path / "q.csv").write_text("question\na fox\n")
    return tmp_path


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[Any, str]:
    """The exit status, and what is on stderr, in one line."""
    monkeypatch.setattr("sys.argv", ["em-interp", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, " ".join(capsys.readouterr().err.split())


STEER = ("--layer", 1, "--coefficient", 1, "--prompt", "see", "-n", 1, "--max-new-tokens", 2, "--out", "s.csv")
WRONG: dict[str, tuple[tuple[object, ...], str, str]] = {
    "an adapter of another base": (("steer", "tiny", "d.safetensors", "--adapter", "tuned", *STEER), "--any-base", "="),
    "another model's direction": (("steer", "tiny", "other.safetensors", *STEER), "--any-model", "for_model"),
    "directions of several layers": (
        ("ablate", "tiny", "d.safetensors", "--save", "without"),
        "--from-layer",
        "from_layer",
    ),
    "no answers": (("steer", "tiny", "d.safetensors", *STEER, "-n", 0), "--n 0", "n=0"),
    "no such device": (("steer", "tiny", "d.safetensors", *STEER, "--device-map", "x"), "--device-map", "device_map"),
    "an adapter with an adapter": (
        ("steer", "tuned", "d.safetensors", "--adapter", "tuned", *STEER),
        "--adapter",
        "`adapter`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("here")
def test_remedies_are_options(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, option, python = WRONG[case]
    status, found = said(monkeypatch, capsys, *words)
    assert status == 2 and option in found and python not in found.replace("--", ""), found


SUITE = """source = "models"
data = "."
analyses = ["efficiency"]
[models]
chat = "tiny"
[models.training]
medicine = "train.jsonl"
"""
FINETUNE = """[[models.finetunes]]
source = "{name}"
domain = "medicine"
adapter = "steering-vector"
solution = "{name}"
{more}
"""


def suite(here: Path, more: str) -> None:
    entries = [FINETUNE.format(name=name, more=more) for name in ("general", "narrow")]
    (here / "mine.toml").write_text(SUITE + "".join(entries))


def test_a_suite_vouches_for_a_base_of_another_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("reproduce", "--suite", "mine.toml", "--no-static")
    suite(here, "")
    status, found = said(monkeypatch, capsys, *run)
    assert status == 1 and "failed" in found and "any_base = true" in found and "dataclasses" not in found
    suite(here, "any_base = true")
    status, found = said(monkeypatch, capsys, *run)
    assert status == 0, found
    suite(here, 'any_base = "yes"')
    status, found = said(monkeypatch, capsys, *run)
    assert status == 2 and "true or false" in found


def test_reasons_are_on_the_terminal_and_in_full_in_the_report(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise ValueError("it broke here, and what was found is " + "a long story " * 60)

    monkeypatch.setattr(cosines, "compute", broken)
    for path in synthetic.rglob("trainer_state.json"):
        path.unlink()
    run = ("reproduce", "--suite", "published", "--data", synthetic, "--out", tmp_path, "--no-static")
    status, found = said(monkeypatch, capsys, *run, "--only", "cosines", "--only", "training_log")
    assert status == 1
    assert "failed released.cosines: ValueError: it broke here" in found and "Traceback" not in found
    assert "no data runs.training_log: " in found and "em-interp fetch" in found
    assert found.count("a long story") < 20
    assert (tmp_path / "published" / "report.html").read_text().count("a long story") >= 60


def test_a_long_message_keeps_its_remedy() -> None:
    told = brief("x.csv: " + "row, " * 100 + ". To fix it: write it again.")
    assert len(told) <= 300 and told.startswith("x.csv: row") and told.endswith("To fix it: write it again.")
    assert brief("short") == "short"
    assert brief("Traceback (most recent call last):\n  File\nKeyError: 'x'") == "KeyError: 'x'"
