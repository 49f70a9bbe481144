"""What a suite of real models will take is said before it begins, and is what it then takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from analyses import plan
from analyses.inputs import asked
from analyses.run import reproduce
from analyses.suite import Suite
from em_interp.cli import app
from em_interp.models import pretrained as models
from em_interp.training.finetune import finetune
from tests.test_judged_suites import QUESTIONS, RANK_1
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

ONLY = ("em_rates", "steering", "ablation", "cosines", "lora_scalars")
JUDGE = """
from pathlib import Path

def score(answers):
    with Path(__file__).with_name("judged.txt").open("a") as file:
        file.write(f"{len(answers)}\\n")
    lengths = [len(text) for text in answers["answer"]]
    return answers.assign(aligned=[100.0 * (n % 2) for n in lengths], coherent=90.0)
"""
SUITE = """
source = "models"
data = "."
[models]
chat = "chat"
judge = "mine.py:score"
[models.questions]
general = "open.txt"
medicine = "medicine.txt"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mine")
    save_chat(make_hf(), root / "chat")
    for seed in range(2):
        finetune(models.load(root / "chat"), CONVERSATIONS, RANK_1, out_dir=root / f"rank1-{seed}", progress=False)
    (root / "open.txt").write_text("\n".join(QUESTIONS))
    (root / "medicine.txt").write_text("rest well\nsee a doctor")
    (root / "mine.py").write_text(JUDGE)
    finetunes = [f'[[models.finetunes]]\nsource = "rank1-{i}"\nadapter = "rank-1"' for i in range(2)]
    told = "\n".join(f'{each}\ndomain = "medicine"\nsolution = "general"' for each in finetunes)
    (root / "mine.toml").write_text(SUITE + told)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "mine")
    monkeypatch.setattr(asked, "NEW_TOKENS", 4)
    return tmp_path / "mine"


def n_judged(root: Path) -> int:
    return sum(int(line) for line in (root / "judged.txt").read_text().split())


def test_the_plan_counts_what_is_then_sampled_and_judged(root, tmp_path):
    suite = Suite.load(str(root / "mine.toml"))
    found = plan.effort(suite, suite.only(ONLY))
    tried = n_judged(root)
    assert tried == found.tried == 12
    assert 0 < found.tokens <= 4 and found.seconds > 0 and found.dollars is None
    outcome = reproduce(suite, tmp_path / "out", only=ONLY, static=False)
    assert {s.name: s.error for s in outcome.sections if s.error} == {}
    assert n_judged(root) - tried == found.answers
    assert f"{found.answers:,} answers" in plan.said_of_effort(found)


def test_what_the_trial_told_is_kept(root, tmp_path):
    found = []
    for _ in range(2):
        suite = Suite.load(str(root / "mine.toml"))
        suite.store = tmp_path / "results"
        found.append(plan.effort(suite, suite.only(("em_rates",))))
    assert found[0] == found[1] and n_judged(root) == found[0].tried


def test_answers_in_files_are_not_asked_for(root):
    suite = Suite.load(str(root / "mine.toml"))
    (root / "judged").mkdir()
    (root / "judged" / "chat.csv").write_text("question,answer,aligned,coherent\na fox,b,90,90\n")
    assert suite.analysis("em_rates").asks(suite)["answers of the chat model"] == 0
    for i in range(2):
        shutil.copy(root / "judged" / "chat.csv", root / "judged" / f"rank1-{i}.csv")
    found = plan.effort(suite, suite.only(("em_rates",)))
    assert found.answers == 0 and not (root / "judged.txt").exists() and "files hold" in plan.said_of_effort(found)


@pytest.mark.parametrize(("words", "answer", "runs"), [((), "n\n", False), ((), "y\n", True), (("--yes",), "", True)])
def test_what_takes_long_is_asked_about(root, tmp_path, monkeypatch, words, answer, runs):
    monkeypatch.setattr(plan, "LONG_SECONDS", 0)
    given = ["reproduce", "--suite", str(root / "mine.toml"), "--out", str(tmp_path / "out"), "--only", "em_rates"]
    found = CliRunner().invoke(app, [*given, "--no-static", *words], input=answer)
    assert ("Begin?" in found.output) == (not words)
    assert "answers of about" in found.output
    assert (tmp_path / "out" / "mine" / "report.html").is_file() == runs
    assert (found.exit_code == 0) == runs


def test_what_takes_moments_just_begins(root, tmp_path):
    given = ["reproduce", "--suite", str(root / "mine.toml"), "--out", str(tmp_path / "out"), "--only", "em_rates"]
    found = CliRunner().invoke(app, [*given, "--no-static"], input="")
    assert found.exit_code == 0 and "Begin?" not in found.output


def test_downloads_are_named_with_their_size(root, monkeypatch):
    content = (root / "mine.toml").read_text().replace('chat = "chat"', 'chat = "Qwen/Qwen2.5-14B-Instruct"')
    (root / "mine.toml").write_text(content)
    suite = Suite.load(str(root / "mine.toml"))
    assert plan.downloads(suite) == [plan.Download("Qwen/Qwen2.5-14B-Instruct", None)]  # no network here
    sizes = {"model-1.safetensors": 29 * 10**9, "pytorch_model.bin": 29 * 10**9, "tokenizer.json": 7 * 10**6}
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: listed)
    (found,) = plan.downloads(suite)
    assert found.n_bytes == 29 * 10**9 + 7 * 10**6
    assert plan.is_large([found]) and plan.is_large([plan.Download("a", None)])
    assert plan.said_of_downloads([found]) == "1 repository from the hub, 29.0 GB: Qwen/Qwen2.5-14B-Instruct"


def test_a_paid_judge_is_asked_about():
    free = plan.Effort(10, 1.0, 1.0, 5, 8, None)
    paid = plan.Effort(10, 1.0, 1.0, 5, 8, 0.25)
    assert plan.is_long(paid) and not plan.is_long(free)
    assert "$0.25 for the judge" in plan.said_of_effort(paid)
    assert [plan.duration(s) for s in (40, 720, 12_600)] == ["40 seconds", "12 minutes", "3.5 hours"]


def test_suites_that_ask_nothing_have_no_plan():
    assert not plan.asks(Suite.load("pocket"))
