"""The suite as its user runs it: on other folders, on damaged ones, killed and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analyses.comparison import compare, load_numbers
from analyses.run import Outcome, reproduce
from analyses.suite import Suite
from em_interp.cli import app, main
from em_interp.errors import MissingDataError, OutputError, StatisticsError, UnreadableFileError, UsageError
from tests.published_factory import (
    D_MODEL,
    FOLDER,
    QUESTIONS,
    STEPS,
    SV_STEM,
    make_activations,
    make_github_run,
    make_hub_run,
)

CONTRACT = {
    "em_rates": "organism solution adapter domain questions em_rate em_low em_high coherent_rate n n_unscored",
    "steering": "direction target layer coefficient em_rate em_low em_high coherent_rate n",
    "ablation": "direction target mode layers em_before em_after em_after_low em_after_high coherent_before "
    "coherent_after n",
    "cosines": "direction_a direction_b layer cosine low high null_sd p_value",
    "trajectory": "run step norm cos_general cos_narrow local_cosine pc1 pc2 pc3",
    "pca": "component explained_variance_ratio",
}


def run(data: Path, out: Path, name: str = "published", **options: object) -> Outcome:
    suite = Suite.load(name)
    suite.data = data
    for key in ("general", "narrow"):
        setattr(suite, key, options.pop(key, None))
    return reproduce(suite, out, static=False, **options)  # type: ignore[arg-type]


def table(outcome: Outcome, name: str) -> pd.DataFrame:
    return pd.read_csv(outcome.folder / "tables" / f"{name}.csv")


PUBLISHED = ("reproduce", "--suite", "published", "--data")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The status of a command, what it wrote, and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["em-interp", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_folder_with_other_names_gives_every_table(synthetic: Path, tmp_path: Path) -> None:
    outcome = run(synthetic, tmp_path / "out")
    assert not outcome.failed
    assert outcome.problems == ()
    assert {s.name for s in outcome.sections if s.error} == set()
    for name, columns in CONTRACT.items():
        assert set(columns.split()) <= set(table(outcome, name).columns), name
        assert (outcome.folder / "figures" / f"{name}.html").is_file(), name
    assert set(table(outcome, "trajectory")["run"]) == {p.name for p in (synthetic / "runs").iterdir()}
    assert f"{FOLDER}/all:data-diff" in set(table(outcome, "cosines")["direction_a"])
    steering = table(outcome, "steering")
    assert steering["coefficient"].tolist() == [0, 2, 4]
    assert set(steering["direction"]) == {"x_diff_data_vector"}
    ablation = table(outcome, "ablation").iloc[0]
    assert (ablation["target"], ablation["layers"], ablation["mode"]) == (FOLDER, "0-5", "layerwise")
    assert ablation["em_before"] > ablation["em_after"] == 0
    assert set(table(outcome, "em_rates")["questions"]) == {"general"}


def test_norm_is_effective_and_raw_norm_is_as_stored(synthetic: Path, tmp_path: Path) -> None:
    rows = table(run(synthetic, tmp_path, only=("trajectory",)), "trajectory").set_index(["run", "step"])
    stored = torch.load(  # noqa: TID251
        synthetic / "runs" / SV_STEM / f"steering_vector_checkpoint_{STEPS[-1]}.pt", weights_only=True
    )
    assert rows.loc[(SV_STEM, STEPS[-1]), "raw_norm"] == pytest.approx(float(stored.norm()), rel=1e-6)
    assert rows.loc[(SV_STEM, STEPS[-1]), "norm"] == pytest.approx(16 * float(stored.norm()), rel=1e-6)
    assert rows.loc[(SV_STEM, STEPS[-1]), "cos_general"] == pytest.approx(1.0)
    assert rows.loc[(SV_STEM + "_KL1e6", STEPS[-1]), "cos_narrow"] == pytest.approx(1.0)


def test_new_runs_splits_and_ranks_are_picked_up(synthetic: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(9)
    make_activations(synthetic / "vectors" / "tiny_bad_med_R64", "another", rng)
    make_github_run(synthetic / "runs" / f"{SV_STEM}_KL3e4_then_remove9", rng)
    make_hub_run(synthetic / "elsewhere" / "Tiny_steering_vector_general_sailing", rng)
    outcome = run(synthetic, tmp_path)
    cosines = table(outcome, "cosines")
    assert "tiny_bad_med_R64/another:data-diff" in set(cosines["direction_a"]) | set(cosines["direction_b"])
    assert f"{SV_STEM}_KL3e4_then_remove9" in set(table(outcome, "kl_removal")["run"])
    assert "Tiny_steering_vector_general_sailing" in set(table(outcome, "trajectory")["run"])


def test_references_can_be_given_by_name(synthetic: Path, tmp_path: Path) -> None:
    given = f"{SV_STEM}_KL5e3"
    rows = table(run(synthetic, tmp_path, only=("trajectory",), general=given), "trajectory")
    assert rows[rows["run"] == given]["cos_general"].iloc[-1] == pytest.approx(1.0)
    with_typo = run(synthetic, tmp_path, only=("trajectory",), general="nobody")
    assert with_typo.failed
    assert "there is no such run" in str(with_typo.sections[0].error)


def test_part_of_the_data_missing(synthetic: Path, tmp_path: Path) -> None:
    shutil.rmtree(synthetic / "judged")
    outcome = run(synthetic, tmp_path)
    assert not outcome.failed
    missing = {s.name for s in outcome.sections if s.missing}
    assert missing == {f"released.{name}" for name in ("em_rates", "steering", "ablation", "thresholds", "wordings")}
    report = outcome.report.read_text()
    assert "it holds no judged answers of a steered model" in report
    assert "em-interp fetch" in report
    assert (outcome.folder / "tables" / "cosines.csv").is_file()


def test_bad_files_fail_loud_and_cost_only_themselves(synthetic: Path, tmp_path: Path, command: Command) -> None:
    bad = synthetic / "runs" / SV_STEM / "steering_vector_checkpoint_10.pt"
    bad.write_bytes(b"PK")
    outcome = run(synthetic, tmp_path)
    assert outcome.failed
    assert any(str(bad) in problem for problem in outcome.problems)
    assert bad.name in outcome.report.read_text()
    assert {s.name for s in outcome.sections if s.error} == set()
    status, said, errors = command(
        "reproduce", "--suite", "published", "--data", str(synthetic), "--out", str(tmp_path), "--no-static"
    )
    assert status == 1
    assert "steering_vector_checkpoint_10.pt" in errors
    assert "report:" in said


def test_the_report_needs_no_network(synthetic: Path, tmp_path: Path) -> None:
    outcome = run(synthetic, tmp_path)
    report = outcome.report.read_text()
    markup = report[: report.index("<script>")] + report[report.index("</script>") :]
    for outside in ('src="http', "src='http", '<link rel="stylesheet"', "@import"):
        assert outside not in markup
    for section in outcome.sections:
        assert f'id="{section.name}"' in report
        assert section.title in report
    assert report.count("plotly-graph-div") >= sum(len(s.figures) for s in outcome.sections)


def test_manifest_says_what_made_it(synthetic: Path, tmp_path: Path) -> None:
    manifest = json.loads((run(synthetic, tmp_path).folder / "manifest.json").read_text())
    for key in ("versions", "git_revision", "source_sha256", "seeds", "inputs_sha256", "outputs_sha256", "analyses"):
        assert key in manifest
    assert f"vectors/{FOLDER}/model-m_data-m_hs_all.pt" in manifest["inputs_sha256"]
    assert "tables/cosines.csv" in manifest["outputs_sha256"]
    assert str(synthetic) not in json.dumps(manifest)


def test_resume_reuses_only_what_is_still_true(synthetic: Path, tmp_path: Path) -> None:
    first = run(synthetic, tmp_path, only=("cosines", "pca"))
    again = run(synthetic, tmp_path, only=("cosines", "pca"), resume=True)
    assert [s.reused for s in again.sections] == [True, True]
    for a, b in zip(first.sections, again.sections, strict=True):
        assert set(a.figures) == set(b.figures)
    (first.folder / "tables" / "pca.csv").write_text("damaged")
    after = run(synthetic, tmp_path, only=("cosines", "pca"), resume=True)
    assert {s.name: s.reused for s in after.sections} == {"released.cosines": True, "runs.pca": False}
    path = synthetic / "vectors" / FOLDER / "model-m_data-m_hs_all.pt"
    path.write_bytes((synthetic / "vectors" / FOLDER / "model-a_data-m_hs_all.pt").read_bytes())
    changed = run(synthetic, tmp_path, only=("cosines", "pca"), resume=True)
    assert [s.reused for s in changed.sections] == [False, False]


def test_a_kill_leaves_whole_files_and_a_resumable_run(synthetic: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "em_interp.cli", "reproduce", "--suite", "published", "--data", str(synthetic)]
    line += ["--out", str(tmp_path), "--no-static"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "published" / ".state" / "released.cosines.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    for path in (tmp_path / "published" / "tables").glob("*.csv"):
        assert len(pd.read_csv(path)) > 0
    outcome = run(synthetic, tmp_path, resume=True)
    assert not outcome.failed
    assert next(s for s in outcome.sections if s.name == "released.cosines").reused


def test_a_full_disk_is_said_and_the_old_table_stays(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(synthetic, tmp_path, only=("pca",))
    before = (first.folder / "tables" / "pca.csv").read_bytes()

    def full(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("component,expl")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OutputError, match=r"No space left on device.*To fix it"):
        run(synthetic, tmp_path, only=("pca",))
    assert (first.folder / "tables" / "pca.csv").read_bytes() == before
    assert not list(first.folder.rglob("*.tmp"))


def test_an_unwritable_folder_is_said(synthetic: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("in the way")
    status, _, errors = command(*PUBLISHED, str(synthetic), "--out", str(tmp_path / "file"))
    assert status == 2
    assert "OutputError" in errors
    assert "Traceback" not in errors


def test_suites_and_names_that_do_not_exist(synthetic: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no suite 'nothing'"):
        Suite.load("nothing")
    with pytest.raises(MissingDataError):
        Suite.load(str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError, match="--only nonsense"):
        run(synthetic, tmp_path, only=("nonsense",))
    bad = tmp_path / "bad.toml"
    for text, words in (
        ("x = ", "readable TOML"),
        ('source = "moon"', "source is 'moon'"),
        ('source = "published"\ncolour = 1', "no key colour"),
        ('source = "published"\nanalyses = ["nonsense"]', "an analysis is 'nonsense'"),
    ):
        bad.write_text(text)
        with pytest.raises(UnreadableFileError, match=words):
            Suite.load(str(bad))


def test_a_users_own_suite_file(synthetic: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'source = "published"\ntitle = "Mine"\ndata = "{synthetic}"\nanalyses = ["pca", "trajectory"]\n')
    outcome = reproduce(Suite.load(str(path)), tmp_path / "out", static=False)
    assert [s.name for s in outcome.sections] == ["runs.pca", "runs.trajectory"]
    assert outcome.folder == tmp_path / "out" / "mine"


def test_without_input_it_says_how_to_get_it(tmp_path: Path, command: Command) -> None:
    status, _, errors = command("reproduce", "--data", str(tmp_path))
    assert status == 2
    assert "pocket build --out" in errors
    status, _, errors = command("reproduce", "--suite", "published")
    assert status == 2
    assert "--data DIR" in errors


def test_an_unforeseen_error_in_one_analysis_spares_the_others(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(suite: Suite) -> dict[str, pd.DataFrame]:
        raise RuntimeError("surprise")

    monkeypatch.setattr(Suite.load("published").analysis("pca"), "compute", broken)
    outcome = run(synthetic, tmp_path, only=("pca", "cosines"))
    assert outcome.failed
    assert {s.name: bool(s.error) for s in outcome.sections} == {"released.cosines": False, "runs.pca": True}


def test_comparison_looks_up_agreement_and_bounds() -> None:
    number = load_numbers()[0]
    assert all(n.source and n.what for n in load_numbers())
    make = lambda value: pd.DataFrame({**{k: [v] for k, v in number.where.items()}, number.column: [value]})  # noqa: E731
    assert compare({number.table: make(number.published)}, [number])["agrees"].tolist() == [True]
    assert compare({number.table: make(number.published + 1)}, [number])["agrees"].tolist() == [False]
    assert compare({number.table: make(1.0).iloc[:0]}, [number])["agrees"].tolist() == [None]


def test_mixed_widths_stay_apart(synthetic: Path, tmp_path: Path) -> None:
    wide = synthetic / "runs" / "Other_SV_l3_lr1e-3_a16"
    wide.mkdir()
    for step in STEPS:
        torch.save(torch.ones(D_MODEL * 2, 1) * step, wide / f"steering_vector_checkpoint_{step}.pt")
    outcome = run(synthetic, tmp_path)
    assert {s.name for s in outcome.sections if s.error} == set()
    assert wide.name in set(table(outcome, "trajectory")["run"])
    assert wide.name not in set(table(outcome, "trained_cosines")["direction_a"])


def test_only_keeps_what_was_made_before(synthetic: Path, tmp_path: Path) -> None:
    run(synthetic, tmp_path, only=("cosines", "steering"))
    outcome = run(synthetic, tmp_path, only=("pca",))
    assert {s.name: s.reused for s in outcome.sections} == {
        "released.cosines": True,
        "released.steering": True,
        "runs.pca": False,
    }
    assert "Convergence: cosines" in outcome.report.read_text()
    manifest = json.loads((outcome.folder / "manifest.json").read_text())
    assert "tables/cosines.csv" in manifest["outputs_sha256"]
    (synthetic / "vectors" / FOLDER / "model-m_data-m_hs_all.pt").unlink()
    changed = run(synthetic, tmp_path, only=("pca",))
    assert [s.name for s in changed.sections] == ["runs.pca"]
    assert "tables/cosines.csv" not in json.loads((changed.folder / "manifest.json").read_text())["outputs_sha256"]


def test_absent_input_is_no_fault_and_a_bad_csv_is(synthetic: Path, tmp_path: Path) -> None:
    (synthetic / "vectors" / FOLDER / "model-m_data-m_hs_all.pt").unlink()
    outcome = run(synthetic, tmp_path)
    assert outcome.problems
    assert not outcome.failed
    path = synthetic / "judged" / FOLDER / "steer" / "x_diff_data_vector" / "layer_3" / "responses_scale_2.csv"
    pd.read_csv(path).drop(columns="aligned").to_csv(path, index=False)
    assert run(synthetic, tmp_path).failed


def test_wordings_of_one_question_are_one_cluster(synthetic: Path, tmp_path: Path) -> None:
    variants = "".join(
        f"- id: q{i}_template\n  paraphrases:\n    - {q} Use the form.\n" for i, q in enumerate(QUESTIONS)
    )
    with (synthetic / "eval_questions" / "some_questions.yaml").open("a") as file:
        file.write(variants)
    path = synthetic / "judged" / FOLDER / "steer" / "misaligned_model" / "NA" / "responses_Tiny_bad_med_R2.csv"
    table_in = pd.read_csv(path)
    doubled = table_in.assign(question=table_in["question"] + " Use the form.")
    pd.concat([table_in, doubled]).to_csv(path, index=False)
    outcome = run(synthetic, tmp_path, only=("em_rates", "wordings"))
    row = table(outcome, "em_rates").set_index("file").loc[path.relative_to(synthetic).as_posix()]
    assert (row["n"], row["n_questions"]) == (2 * len(table_in), len(QUESTIONS))
    wordings = table(outcome, "wordings")
    assert set(wordings[wordings["file"] == path.relative_to(synthetic).as_posix()]["wording"]) == {"plain", "template"}


def test_an_interrupt_says_how_to_go_on(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(suite: Suite) -> dict[str, pd.DataFrame]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite.load("published").analysis("pca"), "compute", interrupted)
    arguments = ["reproduce", "--suite", "published", "--data", str(synthetic), "--out", str(tmp_path), "--no-static"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert (tmp_path / "published" / "tables" / "cosines.csv").is_file()


def test_reasons_are_on_the_terminal(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a refused file, of an analysis that failed, and of one without data."""

    def fails(suite: Suite) -> dict[str, pd.DataFrame]:
        raise StatisticsError("there is one run only. Give two.")

    monkeypatch.setattr(Suite.load("published").analysis("pca"), "compute", fails)
    path = next((synthetic / "judged" / FOLDER).rglob("responses_*.csv"))
    pd.read_csv(path).drop(columns="aligned").to_csv(path, index=False)
    shutil.rmtree(synthetic / "eval_questions")
    arguments = ["reproduce", "--suite", "published", "--data", str(synthetic), "--out", str(tmp_path), "--no-static"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "pca: there is one run only. Give two." in said
    assert "it holds no question or judge file. To fix it:" in said.partition("question_sets: ")[2]
    assert f"{path.name}: it lacks the column aligned" in said
