"""The README's code runs as it stands, from an empty folder, and so does that of the released files' page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import em_interp.published
from em_interp.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONG = ("reproduce", "fetch")
"""Commands that take minutes, a network or files that are not ours: their options are looked at alone."""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("em-interp ")]


def fewer(command: list[str]) -> list[str]:
    """The command for one answer to each question."""
    return ["1" if before == "--n" else word for before, word in zip(["", *command], command, strict=False)]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_python_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(re.sub(r"\bn=\d+", "n=1", code), "README.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"direction.safetensors", "steering.html", "ablation.html"}


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = [command for command in commands() if command[0] not in LONG]
    assert {command[0] for command in ran} == {"evaluate", "extract", "steer", "ablate", "rates", "inspect"}
    for command in ran:
        done = CliRunner().invoke(app, fewer(command))
        assert done.exit_code == 0, f"{shlex.join(command)}: {done.output[-2000:]}{done.exception!r}"
    assert (tmp_path / "steered-rates.html").is_file()


def test_what_it_does_not_run_has_those_options() -> None:
    group = typer.main.get_command(app)
    asked = [command for command in commands() if command[0] in LONG]
    assert {command[0] for command in asked} == set(LONG)
    for name, *options in asked:
        group.commands[name].make_context(name, list(options), resilient_parsing=False)  # type: ignore[attr-defined]


def test_the_released_files_give_the_numbers_that_stand_beside_them(tmp_path: Path) -> None:
    given = os.environ.get("EM_INTERP_PUBLISHED")
    data = Path(given) if given else ROOT.parent / "shared" / "published"
    needed = "q14b_bad_med_bad_med_dpR1_15-17_21-23_27-29"
    if not data.is_dir() or not any(data.rglob(needed)):
        pytest.skip(f"the released activations ({needed}) are not below {data}; set EM_INTERP_PUBLISHED")
    (tmp_path / "released").symlink_to(data.resolve(), target_is_directory=True)
    (code,) = blocks("python", em_interp.published.__doc__ or "")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = re.findall(r"print\(.*\)  # (\d+\.\d+)", code)
    printed = done.stdout.split()
    assert len(expected) == len(printed) == 3
    for said, found in zip(expected, printed, strict=True):
        assert f"{float(found):.{len(said.split('.')[1])}f}" == said
    assert {p.name for p in tmp_path.iterdir()} >= {"cosine.html", "direction.safetensors"}


def test_every_analysis_table_is_told_of_and_no_machine() -> None:
    from analyses.suite import Suite

    tables_page = (ROOT / "analyses" / "README.md").read_text(encoding="utf-8")
    suites = [Suite.load(name) for name in ("published", "pocket")]
    tables = {table for suite in suites for name in suite.analyses for table in suite.analysis(name).TABLES}
    assert not [table for table in tables if f"`{table}`" not in tables_page]
    assert not re.search(r"/(home|work|root|tmp)/", README + tables_page)
