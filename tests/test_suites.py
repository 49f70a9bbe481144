"""Which analyses there are, what each needs, and which of them a suite can name."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from analyses.comparison import load_numbers
from analyses.suite import ANALYSES, SUITES, Need, Suite, full_name, load_analysis
from em_interp.errors import UnreadableFileError, UsageError

ROOT = Path(__file__).resolve().parents[1] / "analyses"
SHIPPED = sorted(path.stem for path in SUITES.glob("*.toml"))


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_says_what_it_needs(name: str) -> None:
    analysis = load_analysis(name)
    assert analysis.TITLE and analysis.TEXT and analysis.TABLES and analysis.NEEDS
    assert all(isinstance(need, Need) or need in ANALYSES for need in analysis.NEEDS)
    assert callable(analysis.compute) and callable(analysis.plot)


def test_every_analysis_is_in_a_shipped_suite_which_can_make_it() -> None:
    suites = [Suite.load(name) for name in SHIPPED]
    assert {name for suite in suites for name in suite.analyses} == set(ANALYSES)
    for suite in suites:
        assert [why for name in suite.analyses if (why := suite.lacking(name)) is not None] == []
        tables = [table for name in suite.analyses for table in suite.analysis(name).TABLES]
        assert len(set(tables)) == len(tables)
        short = [name.rpartition(".")[2] for name in suite.analyses]
        assert len(set(short)) == len(short)


def test_published_numbers_name_analyses_and_their_tables() -> None:
    for number in load_numbers():
        assert number.table in load_analysis(number.analysis).TABLES


@pytest.mark.parametrize("suite", ["pocket", "published"])
def test_only_takes_full_names_last_parts_and_tables(suite: str) -> None:
    loaded = Suite.load(suite)
    folder = "released" if suite == "published" else "finetunes"
    for name in ("steering", f"{folder}.steering"):
        assert loaded.only((name,)) == (f"{folder}.steering",)
    assert loaded.only(("pca_raw", "runs.trajectory")) == ("runs.pca", "runs.trajectory")
    other = "finetunes" if folder == "released" else "released"
    for name in (f"{other}.steering", "nonsense"):
        with pytest.raises(UsageError, match=f"--only {name}: .*no such analysis or table"):
            loaded.only((name,))


def test_a_last_part_that_several_have_is_not_guessed() -> None:
    assert full_name("pca", ANALYSES) == "runs.pca"
    with pytest.raises(UsageError, match=r"several are called so: released\.steering, finetunes\.steering"):
        full_name("steering", ANALYSES)


def suite_of(path: Path, source: str, *names: object, models: str = "") -> Suite:
    path.write_text(f'source = "{source}"\nanalyses = {list(names)}\n{models}')
    return Suite.load(str(path))


MODELS = '[models]\nchat = "chat"\n[[models.finetunes]]\nsource = "a"\n'


def test_short_names_are_those_of_the_source(tmp_path: Path) -> None:
    for source, folder in (("published", "released"), ("pocket", "finetunes")):
        loaded = suite_of(tmp_path / "s.toml", source, "steering", f"{folder}.ablation", "pca")
        assert loaded.analyses == (f"{folder}.steering", f"{folder}.ablation", "runs.pca")
    with pytest.raises(UnreadableFileError, match=r"an analysis is \['pca'\]"):
        suite_of(tmp_path / "s.toml", "pocket", ["pca"])
    with pytest.raises(UnreadableFileError, match="once"):
        suite_of(tmp_path / "s.toml", "pocket", "steering", "finetunes.steering")


def test_a_new_module_is_an_analysis_of_the_shipped_suites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Suite.load("pocket").analyses
    made = ModuleType("analyses.runs.made")
    vars(made).update(TABLES=("made",), NEEDS=(Need.CHECKPOINTS,))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr("analyses.suite.ANALYSES", (*ANALYSES, "runs.made"))
    assert Suite.load("pocket").analyses == (*before, "runs.made")
    assert Suite.load("published").only(("made",)) == ("runs.made",)
    assert suite_of(tmp_path / "s.toml", "models", "runs.*", "runs.pca", models=MODELS).analyses[0] == "runs.pca"
    assert "runs.training_log" not in suite_of(tmp_path / "s.toml", "models", "runs.*", models=MODELS).analyses
    with pytest.raises(UnreadableFileError, match=r"an analysis is 'run\.\*'"):
        suite_of(tmp_path / "s.toml", "pocket", "run.*")


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("published", "efficiency", "general_vs_narrow.efficiency needs losses on training chats: released files hold"),
        ("published", "finetunes.steering", "no model that can be run"),
        (
            "published",
            "claims",
            "general_vs_narrow.claims needs general_vs_narrow.efficiency; general_vs_narrow.efficiency needs losses",
        ),
        ("pocket", "released.steering", "needs released files"),
        ("pocket", "thresholds", "needs released files"),
        ("models", "kl_sweep", "needs tables of sweeps"),
        ("models", "register", "needs finetunes of a second task"),
    ],
)
def test_a_suite_that_lacks_what_an_analysis_needs_says_so_at_once(
    source: str, name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnreadableFileError, match=said):
        suite_of(tmp_path / "s.toml", source, name, models=MODELS if source == "models" else "")


def test_what_a_suite_file_leaves_out_is_said_before_anything_is_read(tmp_path: Path) -> None:
    suite = suite_of(tmp_path / "s.toml", "models", "influence", "pca", models=MODELS)
    assert suite.lacking("runs.pca") is None
    assert "name a file as texts" in str(suite.lacking("general_vs_narrow.influence"))


def test_no_analysis_knows_the_pocket_world() -> None:
    """Only its input does."""
    importing = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("em_interp.pocket") for name in named):
                importing.add(path.relative_to(ROOT).as_posix())
    assert {name for name in importing if not name.startswith("benchmarks/")} == {"inputs/pocket.py"}


def test_a_finetune_is_called_what_its_suite_says(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    finetune = 'source = "runs/checkpoint-10"\ndomain = "medicine"\nadapter = "full"\nsolution = "{}"\n'
    first, second = (f"[[models.finetunes]]\n{finetune.format(kind)}" for kind in ("general", "narrow"))

    def names(*more: str) -> list[str]:
        texts = [one + told for one, told in zip((first, second), more, strict=True)]
        models = f'[models]\nchat = "tiny"\n{"".join(texts)}'
        suite = suite_of(tmp_path / "mine.toml", "models", "em_rates", models=models)
        suite.data = tmp_path
        return [organism.name for organism in suite.finetunes.organisms]

    assert names('name = "insecure"\n', "") == ["insecure", "checkpoint-10"]
    for more, says in ((("", ""), "name of its own"), (('name = "run/1"\n', ""), "without a slash")):
        with pytest.raises(UsageError, match=says):
            names(*more)
