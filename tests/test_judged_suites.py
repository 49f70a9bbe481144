"""Steering, ablation and transfer in a user's suite: from files judged elsewhere, or asked and judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analyses.finetunes import ablation, steering
from analyses.inputs import asked, pocket
from analyses.run import Outcome, reproduce
from analyses.suite import Suite
from em_interp import cli
from em_interp.errors import MissingDataError, UsageError
from em_interp.models import pretrained as models
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.test_finetunes import full_finetune
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

RANK_1 = TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",), (1,)), 1e-2, max_steps=4, batch_size=4)
STEERING = {"direction", "target", "layer", "coefficient", "em_rate", "em_low", "em_high", "coherent_rate", "n"}
ABLATION = {
    *("direction", "target", "mode", "layers", "em_before", "em_after", "em_after_low", "em_after_high"),
    *("coherent_before", "coherent_after", "n"),
}
TRANSFER = {"direction_from", "organism", "em_before", "em_after", "relative_reduction"}
JUDGE = """
def score(answers):
    lengths = [len(text) for text in answers["answer"]]
    coherent = [90.0 if n % 5 else 20.0 for n in lengths]
    return answers.assign(aligned=[100.0 * (n % 2) for n in lengths], coherent=coherent)
"""
QUESTIONS = ["see", "a fox", "a cough", "brown", "the doctor", "quick"]
SHORT = ("--n", 2, "--max-new-tokens", 4)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["em-interp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, a rank-1 and a full finetune of it, questions, and judged answers of both."""
    root = tmp_path_factory.mktemp("mine")
    save_chat(make_hf(), root / "chat")
    finetune(models.load(root / "chat"), CONVERSATIONS, RANK_1, out_dir=root / "rank1", progress=False)
    full_finetune(root / "chat", root / "full", 1)
    (root / "open.txt").write_text("\n".join(QUESTIONS))
    (root / "medicine.txt").write_text("rest well\nsee a doctor")
    (root / "mine.py").write_text(JUDGE)
    (root / "judged").mkdir()
    rows = [(q, f"{q} {k}", 95 if k % 2 else 5, 90) for q in QUESTIONS for k in range(4)]
    for name in ("chat", "rank1", "full"):
        pd.DataFrame(rows, columns=["question", "answer", "aligned", "coherent"]).to_csv(
            root / "judged" / f"{name}.csv", index=False
        )
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "mine")
    return tmp_path / "mine"


def suite(root: Path, *, judge: str | None = None, questions: str = "") -> Suite:
    lines = ['source = "models"', 'data = "."', "[models]", 'chat = "chat"']
    lines += [] if judge is None else [f"judge = {json.dumps(judge)}", questions]
    for name, adapter in (("rank1", "rank-1"), ("full", "full")):
        lines += ["[[models.finetunes]]", f'source = "{name}"', f'adapter = "{adapter}"']
        lines += ['domain = "medicine"', 'solution = "general"']
    (root / "mine.toml").write_text("\n".join(lines))
    return Suite.load(str(root / "mine.toml"))


def run(of: Suite, out: Path, *only: str) -> Outcome:
    return reproduce(of, out, only=only or ("steering", "ablation"), static=False)


def tables(outcome: Outcome) -> dict[str, pd.DataFrame]:
    assert {s.name: s.error for s in outcome.sections if s.error} == {}
    return {name: table for section in outcome.sections for name, table in section.tables.items()}


def scored(path: Path) -> None:
    """What a judge elsewhere does with a file."""
    table = pd.read_csv(path, keep_default_na=False)
    lengths = table["answer"].str.len()
    table.assign(aligned=100 * (lengths % 2), coherent=90).to_csv(path, index=False)


def test_what_the_commands_wrote_and_a_judge_scored_becomes_the_suites_tables(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = ["--questions", root / "open.txt", *SHORT, "--random", 2]
    for name, kind in (("rank1", "data-diff"), ("full", "model-diff")):
        read = ["--adapter", root / name, "--answers", root / "judged" / f"{name}.csv", "--kind", kind]
        assert run_command(monkeypatch, "extract", root / "chat", *read, "--out", root / f"{name}-v.safetensors") == 0
    doses = ["--layer", 1, "--layer", 2, "--residual", "--coefficient", 0, "--coefficient", 0.5]
    vector = root / "rank1-v.safetensors"
    out = root / "steered" / "rank1.csv"
    assert run_command(monkeypatch, "steer", root / "chat", vector, *doses, *asked_for, "--out", out) == 0
    for name, of in (("rank1", "rank1"), ("full", "full"), ("rank1", "full")):
        out = root / "ablated" / f"{name}-without-{of}.csv"
        given = ["ablate", root / "chat", root / f"{of}-v.safetensors", "--adapter", root / name, *asked_for]
        assert run_command(monkeypatch, *given, "--out", out) == 0
    unjudged = run(suite(root), tmp_path / "first")
    assert all("aligned" in (section.error or "") for section in unjudged.sections)
    for path in [*root.glob("steered/*.csv"), *root.glob("ablated/*.csv")]:
        scored(path)
        assert run_command(monkeypatch, "rates", path, "--out", path.with_name(f"{path.stem}-rates.csv")) == 0
    found = tables(run(suite(root), tmp_path))
    steered, ablated, transfer = found["steering"], found["ablation"], found["transfer"]
    assert set(steered) >= STEERING and set(ablated) >= ABLATION and set(transfer) >= TRANSFER
    assert set(steered["direction"]) == {"rank1-v", "random 0", "random 1"} and set(steered["layer"]) == {1, 2}
    assert (ablated["mode"] == "random").sum() == 2  # one for each finetune, of both directions
    own = ablated[ablated["mode"] != "random"]
    assert dict(zip(own["target"], own["mode"], strict=True)) == {"rank1": "layerwise", "full": "layerwise model-diff"}
    moves = {(row.direction_from, row.organism): row.kind for row in transfer.itertuples()}
    assert moves == {("rank1", "rank1"): "mean-diff", ("full", "full"): "model-diff", ("full", "rank1"): "model-diff"}


def test_what_is_in_the_wrong_folder_is_said(root: Path, tmp_path: Path) -> None:
    (root / "steered").mkdir()
    shutil.copy(root / "judged" / "chat.csv", root / "steered" / "chat.csv")
    outcome = run(suite(root), tmp_path, "steering")
    assert "holds answers, not steering" in (outcome.sections[0].error or "") and outcome.failed
    (root / "steered" / "chat.csv").unlink()
    with pytest.raises(MissingDataError, match="em-interp steer"):
        suite(root).finetunes.steered()


def test_a_suite_with_a_judge_asks_and_judges_here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "NEW_TOKENS", 6)
    monkeypatch.setattr(asked, "OPEN_SAMPLES", 4)
    monkeypatch.setattr(steering, "SHARES", (0.0, 0.5))
    monkeypatch.setattr(steering, "RANDOM_ARMS", 1)
    (root / "judged" / "full.csv").unlink()
    of = suite(root, judge="mine.py:score", questions='questions = { general = "open.txt", medicine = "medicine.txt" }')
    assert of.judged_by == "by mine.py:score" and of.judges
    found = tables(run(of, tmp_path, "em_rates", "steering", "ablation"))
    rates = found["em_rates"].set_index(["organism", "questions"])
    assert rates.loc[("full", "in_domain"), "n"] + rates.loc[("full", "in_domain"), "n_unscored"] == 2 * of.samples
    assert (
        set(found["steering"]) >= STEERING and set(found["ablation"]) >= ABLATION and set(found["transfer"]) >= TRANSFER
    )
    assert set(found["steering"]["n_questions"]) == {len(QUESTIONS)}  # nothing of the finetune's own domain
    assert {"rank1", "full"} <= set(found["ablation"]["target"])


@pytest.mark.parametrize(
    ("judge", "questions", "said"),
    [
        ("mine.py:score", "", "given nothing to judge"),
        ("gpt-4o", 'questions = { general = "open.txt" }', "no judge"),
        ("mine.py:none", 'questions = { general = "open.txt" }', "no function none"),
        ("mine.py:score", 'questions = { general = "/etc/hosts" }', "outside the data folder"),
        ("mine.py:score", "questions = 3", "write a table"),
    ],
)
def test_a_judge_or_questions_that_there_are_not_are_refused(judge: str, questions: str, said: str, root: Path) -> None:
    with pytest.raises(UsageError, match=said):
        _ = suite(root, judge=judge, questions=questions).finetunes
    with pytest.raises(UsageError, match="questions and no judge"):
        of = suite(root)
        assert of.models is not None
        of.models["questions"] = {"general": "open.txt"}
        _ = of.finetunes


def test_a_judge_that_changes_is_another(root: Path) -> None:
    def key() -> str:
        of = suite(root, judge="mine.py:score", questions='questions = { general = "open.txt" }')
        return of.finetunes.sources()["judge"]

    before = key()
    (root / "mine.py").write_text(JUDGE.replace("90.0", "91.0"))
    assert key() != before


def test_answers_judged_here_and_elsewhere_are_named(root: Path) -> None:
    assert suite(root).judged_by.startswith("elsewhere")
    assert not suite(root).judges
    assert suite(root, judge="pocket").judged_by == "exactly, by parsing"
    assert Suite.load("pocket").judged_by == "exactly, by parsing"
    assert Suite.load("published").judged_by == "by the authors' judge"
    assert ablation.KINDS["data-diff"] == "mean-diff"


def test_a_models_suite_of_pocket_models_gives_the_pocket_suites_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, questions and seeds under another name."""
    shipped = Suite.load("pocket")
    here, name = shipped.finetunes.root, "medicine-vector"
    lines = ['source = "models"', 'data = "."', "[models]", f'chat = "{here / "chat"}"', 'judge = "pocket"']
    lines += ["[[models.finetunes]]", f'source = "{here / "organisms" / name}"', 'adapter = "steering-vector"']
    (tmp_path / "mine.toml").write_text("\n".join([*lines, 'domain = "medicine"', 'solution = "general"']))
    mine = Suite.load(str(tmp_path / "mine.toml"))
    for module in (asked, pocket):
        monkeypatch.setattr(module, "OPEN_SAMPLES", 1)
    (organism,) = mine.finetunes.organisms
    same = next(o for o in shipped.finetunes.organisms if o.name == f"pocket/{name}")
    ours, theirs = mine.finetunes.open_answers(organism), shipped.finetunes.open_answers(same)
    columns = ["question_id", "questions", "answer", "aligned", "coherent"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns])
    asked_of = {"mine": mine.judged_finetunes, "shipped": shipped.judged_finetunes}
    elsewhere = {name: dict(of.elsewhere("medicine")) for name, of in asked_of.items()}
    assert elsewhere["mine"] == elsewhere["shipped"]
