"""`em-interp inspect`: what a thing that the package reads or writes is, whether it is sound, and what comes next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from em_interp.cli import app
from em_interp.cli.describe import describe
from em_interp.cli.describe_files import READERS
from em_interp.directions.activations import collect
from em_interp.directions.direction import Direction
from em_interp.directions.gguf import read_gguf, save_gguf
from em_interp.errors import EmInterpError, MissingDataError, UnreadableFileError
from em_interp.models import pretrained as models
from em_interp.pocket import registry
from em_interp.solutions.steering_vector import SteeringVector
from tests.adapter_folders import lora_folder
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

SUITE = """source = "models"
data = "."
analyses = ["efficiency"]
[models]
chat = "tiny"
[models.training]
medicine = "chats.jsonl"
[[models.finetunes]]
source = "vector"
domain = "medicine"
adapter = "steering-vector"
solution = "general"
"""
PICKLE = b'\x80\x02cbuiltins\nexec\n(S\'open("executed", "w")\'\ntR.'


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each."""
    root = tmp_path_factory.mktemp("made")
    save_chat(make_hf(), root / "tiny")
    chat = models.load(root / "tiny")
    SteeringVector(torch.ones(32), 1, 2.0, base="tiny").save(root / "vector")
    lora_folder(root / "lora", base_model_name_or_path=str(root / "tiny"))
    direction = Direction(torch.ones(4, 32), (0, 1, 2, 3), "data-diff", model="tiny")
    direction.save(root / "d.safetensors")
    collect(chat, CONVERSATIONS, store=root / "store", layers=[1], progress=False)
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    (root / "asked.jsonl").write_text('{"question": "a fox"}\n')
    (root / "texts.jsonl").write_text('{"text": "a fox"}\n')
    (root / "q.yaml").write_text("- id: fox\n  question: a fox\n- id: cough\n  question: a cough\n")
    (root / "q.txt").write_text("a fox\na cough\n")
    (root / "q.csv").write_text("question\na fox\n")
    (root / "judges.yaml").write_text('- aligned: "Score {question} and {answer}"\n')
    judged = pd.DataFrame({"question": list("abcdefgh"), "answer": "x", "aligned": 20, "coherent": 90})
    judged.to_csv(root / "judged.csv", index=False)
    judged[["question", "answer"]].to_csv(root / "answers.csv", index=False)
    judged[["question", "answer"]].assign(arm="none").to_csv(root / "ablated.csv", index=False)
    (root / "mine.toml").write_text(SUITE)
    (root / "page.html").write_text("<!doctype html><html><head><title>Mine</title></head></html>")
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


HELD = {
    "tiny": ("model: qwen2, 4 layers, d_model 32", "chat template", "em-interp evaluate tiny"),
    "vector": ("a steering vector at layer 1", "base: tiny", "em-interp evaluate --model tiny --adapter vector"),
    "lora": ("LoRA", "norm:", "em-interp extract --model"),
    "d.safetensors": ("data-diff at layers 0-3, d_model 32", "model: tiny", "em-interp steer tiny d.safetensors"),
    "store": ("activation store: ", "layers: [1]", "em_interp.collect"),
    "chats.jsonl": ("conversations", "each ends with an answer", "em-interp extract MODEL --positive chats.jsonl"),
    "asked.jsonl": (
        "questions: asked.jsonl: 1 question",
        "asked_0",
        "em-interp evaluate MODEL --questions asked.jsonl",
    ),
    "texts.jsonl": ("1 documents", "suite file", ""),
    "q.yaml": ("2 questions", "cough", "em-interp evaluate MODEL --questions q.yaml"),
    "q.txt": (
        "plain text, one a line (questions: q.txt: 2 questions",
        "q_1",
        "em-interp evaluate MODEL --questions q.txt",
    ),
    "q.csv": ("1 question", "q_0", "em-interp steer MODEL"),
    "judges.yaml": ("1 judges", "ok", ""),
    "judged.csv": ("judged answers, 8 rows", "em_rate", "em-interp rates judged.csv --out judged-rates.csv"),
    "answers.csv": ("nobody has judged: 8", "aligned and coherent", "em-interp rates answers.csv"),
    "ablated.csv": ("answers of an ablation", "aligned and coherent", "em-interp rates ablated.csv"),
    "mine.toml": ("suite: mine", "finetune vector: steering-vector, general", "em-interp reproduce --suite mine.toml"),
    "page.html": ("page: Mine", "", "open it in a browser"),
    "lora/adapter_model.safetensors": ("LoRA adapter", "rank", "em-interp inspect lora"),
    "tiny/model.safetensors": ("tensors", "and ", "em-interp inspect tiny"),
    "tiny/config.json": ("settings of the model", "keys: ", "em-interp inspect tiny"),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.usefixtures("here")
def test_it_says_what_it_is_and_what_is_next(name: str) -> None:
    found = run("inspect", name)
    assert found.exit_code == 0, found.exception
    what, line, then = HELD[name]
    first, _, rest = found.output.partition("\n")
    body, _, after = rest.partition("next:")
    assert what in first and line in body and then in after, found.output


@pytest.mark.usefixtures("here")
def test_a_pocket_model_by_its_name() -> None:
    found = run("inspect", "pocket/medicine-vector")
    assert found.exit_code == 0 and "steering vector at layer 0" in found.output
    build = run("inspect", registry.root())
    assert "medicine-rank1" in build.output and "em-interp reproduce --data" in build.output
    trajectory = run("inspect", registry.root() / "trajectories" / "medicine-vector-general")
    assert trajectory.exit_code == 0 and "checkpoints, steps" in trajectory.output


def test_a_control_vector_comes_back(here: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    direction = Direction.load("d.safetensors")
    save_gguf(direction, "v.gguf", model_type="qwen2")
    model_type, vectors = read_gguf("v.gguf")
    assert model_type == "qwen2" and list(vectors) == [1, 2, 3]
    assert all(torch.equal(x, direction.at(layer)) for layer, x in vectors.items())
    found = run("inspect", "v.gguf")
    assert found.output.startswith("control vector for llama.cpp: 3 layers of width 32, for qwen2")
    assert "llama-cli" in found.output
    (here / "cut.gguf").write_bytes((here / "v.gguf").read_bytes()[:60])
    assert isinstance(run("inspect", "cut.gguf").exception, UnreadableFileError)


def test_results_of_commands(here: Path, synthetic: Path) -> None:
    asked = ("--questions", "q.csv", "-n", 1, "--max-new-tokens", 2)
    assert run("evaluate", "tiny", *asked, "--out", "answered").exit_code == 0
    found = run("inspect", "answered")
    assert "answers of a model" in found.output and "em-interp inspect answered/answers.csv" in found.output
    words = ("reproduce", "--suite", "published", "--data", synthetic, "--only", "training_log", "--no-static")
    assert run(*words).exit_code == 0
    found = run("inspect", "out/published")
    assert "results of the suite published" in found.output and "all as they were made" in found.output
    assert "1 of 1 analyses" in found.output and "--resume" in found.output
    assert "em-interp inspect out/published" in run("inspect", "out").output
    table = next((here / "out/published/tables").glob("training_log.csv"))
    assert "table training_log" in run("inspect", table).output
    table.write_text(table.read_text() + "\n")
    assert "changed since they were made: tables/training_log.csv" in run("inspect", "out/published").output
    assert "reproduce --suite published --data" in run("inspect", synthetic).output


def test_damage_is_named(here: Path) -> None:
    weights = here / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shard = next((here / "store").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    (here / "chats.jsonl").write_text('{"messages": [{"role": "human", "content": "x"}]}\n')
    (here / "judged.csv").write_text("question,answer,aligned\nx,y,90\n")
    (here / "mine.toml").write_text(SUITE.replace("medicine", "3 x"))
    for name in ("tiny", "store", "chats.jsonl", "judged.csv", "mine.toml", "absent", "org/name"):
        assert isinstance(run("inspect", name).exception, EmInterpError), name
    with pytest.raises(MissingDataError, match="hub"):
        describe("org/name")
    (here / "x.odt").write_text("")
    with pytest.raises(UnreadableFileError, match=r"\.safetensors, "):
        describe("x.odt")


def test_no_pickle_is_run(here: Path) -> None:
    (here / "tiny" / "model.safetensors").unlink()
    (here / "tiny" / "pytorch_model.bin").write_bytes(PICKLE)
    found = run("inspect", "tiny")
    assert found.exit_code == 0 and "pytorch_model.bin, which is a pickle: not opened" in found.output
    for ending in (*READERS, ".pkl"):
        (here / f"bad{ending}").write_bytes(PICKLE)
        assert isinstance(run("inspect", f"bad{ending}").exception, EmInterpError), ending
    (here / "lora" / "adapter_model.safetensors").unlink()
    (here / "lora" / "adapter_model.bin").write_bytes(PICKLE)
    assert isinstance(run("inspect", "lora").exception, EmInterpError)
    assert not (here / "executed").exists()
