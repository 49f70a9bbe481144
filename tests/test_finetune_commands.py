"""Every command takes every kind of finetune, and an adapter whose recorded base cannot be loaded by --base."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from em_interp import cli
from em_interp.directions.activations import collect
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import contrast
from em_interp.models import pretrained as models
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.test_finetunes import full_finetune
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat, tokenizer

RANK_1 = TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",), (1,)), 1e-2, max_steps=4, batch_size=4)
SHORT = ("--n", 1, "--max-new-tokens", 2)
BASES = {"relative": "../elsewhere/chat", "quantised": "unsloth/mine-bnb-4bit", "unnamed": None, "renamed": "org/other"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, a full finetune of it, a rank-1 adapter with each kind of recorded base, texts and a direction."""
    root = tmp_path_factory.mktemp("mine")
    save_chat(make_hf(), root / "chat")
    full_finetune(root / "chat", root / "full", 1)
    chat = models.load(root / "chat")
    for name, base in {"rank1": str(root / "chat"), **BASES}.items():
        finetune(chat, CONVERSATIONS, RANK_1, out_dir=root / name, progress=False)
        config = json.loads((root / name / "adapter_config.json").read_text())
        (root / name / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    contrast(chat, CONVERSATIONS, CONVERSATIONS[:2], progress=False).direction().save(root / "d.safetensors")
    return root


def commands(root: Path, out: Path, *model: object) -> dict[str, list[object]]:
    asked = ["--prompt", "a fox", *SHORT, "--random", 0]
    first, *more = model
    (out / "asked.txt").write_text("a fox\n")
    return {
        "extract": ["extract", *model, "--kind", "model-diff", "--positive", root / "chats.jsonl"],
        "steer": ["steer", first, root / "d.safetensors", *more, "--layer", 1, "--coefficient", 1, *asked],
        "ablate": ["ablate", first, root / "d.safetensors", *more, *asked],
        "evaluate": ["evaluate", *model, "--questions", out / "asked.txt", *SHORT],
    }


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[object]) -> int:
    monkeypatch.setattr("sys.argv", ["em-interp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def all_run(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *model: object) -> None:
    for name, given in commands(root, out, *model).items():
        path = out / {"extract": "v.safetensors", "evaluate": "answers"}.get(name, f"{name}.csv")
        assert run(monkeypatch, [*given, "--out", path]) == 0, name


@pytest.mark.parametrize("kind", ["full", "rank1"])
def test_every_command_takes_a_finetune_of_every_kind(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_run(root, tmp_path, monkeypatch, root / "chat", "--adapter", root / kind)
    made = Direction.load(tmp_path / "v.safetensors")
    assert made.kind == "model-diff" and f"/{kind}" in made.sources[0].partition(" with ")[2]
    inside = models.load(root / "full") if kind == "full" else models.load(root / "chat", adapter=root / kind)
    chat = models.load(root / "chat")
    read = [collect(m, CONVERSATIONS, progress=False).pooled["response"] for m in (inside, chat)]
    shift = (read[0] - read[1])[list(made.layers)]
    torch.testing.assert_close(made.vectors.double(), shift.double(), rtol=0, atol=1e-4)
    assert run(monkeypatch, ["inspect", root / kind, "--base", root / "chat"]) == 0
    assert "norm" in capsys.readouterr().out


def test_a_full_finetune_is_a_model_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["ablate", root / "full", root / "d.safetensors", "--any-model", "--prompt", "a fox", *SHORT]
    assert run(monkeypatch, [*given, "--random", 0, "--out", tmp_path / "a.csv"]) == 0
    beside = [*given[:1], root / "chat", root / "d.safetensors", "--adapter", root / "full", *given[4:]]
    assert run(monkeypatch, [*beside, "--random", 0, "--out", tmp_path / "b.csv"]) == 0
    alone, attached = (pd.read_csv(tmp_path / name, keep_default_na=False) for name in ("a.csv", "b.csv"))
    assert list(alone["answer"]) == list(attached["answer"])


@pytest.mark.parametrize("kind", BASES)
def test_a_base_that_is_given_stands_for_the_recorded_one(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_run(root, tmp_path, monkeypatch, root / kind, "--base", root / "chat")
    assert run(monkeypatch, ["inspect", root / kind, "--base", root / "chat"]) == 0
    beside = commands(root, tmp_path, root / "chat", "--adapter", root / kind, "--base", root / "chat")["steer"]
    assert run(monkeypatch, [*beside, "--out", tmp_path / "beside.csv"]) == 0
    capsys.readouterr()
    alone = commands(root, tmp_path, root / kind)["steer"]
    assert run(monkeypatch, [*alone, "--out", tmp_path / "alone.csv"]) == 2
    assert kind == "renamed" or "--base" in capsys.readouterr().err


def test_another_base_than_the_model_beside_it_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = commands(root, tmp_path, root / "chat", "--adapter", root / "renamed", "--base", root / "full")["steer"]
    assert run(monkeypatch, [*given, "--out", tmp_path / "a.csv"]) == 2
    assert "--any-base" in capsys.readouterr().err


def joins_white_space(folder: Path, root: Path) -> Path:
    """The chat model with a vocabulary that joins white space to what stands before it, as real ones do."""
    make_hf().save_pretrained(folder)
    words = tokenizer()
    own = type(words.backend_tokenizer).from_str(words.backend_tokenizer.to_str())
    own.add_tokens(["assistant\n\n"])
    before, words._tokenizer = words._tokenizer, own
    words.save_pretrained(folder)
    words._tokenizer = before
    return folder


def test_an_answer_that_begins_with_a_line_costs_only_itself(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = joins_white_space(tmp_path / "chat", root)
    rows = [("see", f"{lead}rest {k} {score}", score, 90) for k, lead in enumerate(("", "\n", "")) for score in (5, 95)]
    judged = pd.DataFrame(rows, columns=["question", "answer", "aligned", "coherent"])
    judged.to_csv(tmp_path / "judged.csv", index=False)
    given = ["extract", chat, "--answers", tmp_path / "judged.csv", "--kind", "data-diff-in-chat"]
    assert run(monkeypatch, [*given, "--out", tmp_path / "d.safetensors"]) == 0
    assert "judged.csv: 1 of 3 answers are left out" in capsys.readouterr().err
    assert Direction.load(tmp_path / "d.safetensors").n_positive == 2
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a, *_ in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    given = [
        "extract",
        chat,
        "--positive",
        tmp_path / "mine.jsonl",
        "--kind",
        "model-diff",
        "--adapter",
        root / "rank1",
    ]
    assert run(monkeypatch, [*given, "--any-base", "--out", tmp_path / "e.safetensors"]) == 2
    assert "mine.jsonl: conversation 3" in capsys.readouterr().err
    for side, said in (
        (judged[judged["aligned"] > 50], "that is misaligned"),
        (judged.assign(coherent=1), "misaligned"),
    ):
        side.to_csv(tmp_path / "none.csv", index=False)
        given = ["extract", chat, "--answers", tmp_path / "none.csv"]
        assert run(monkeypatch, [*given, "--out", tmp_path / "f.safetensors"]) == 2
        assert said in capsys.readouterr().err
