"""A killed run goes on where it stopped, ends as an uninterrupted one does, says what it kept, and leaves nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analyses.run import reproduce
from analyses.suite import Suite
from em_interp.cli import app
from em_interp.directions.direction import Direction
from em_interp.errors import OutputError
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import write_text
from em_interp.files.tables import Parts, claimed, remove_parts, work_folder
from em_interp.interventions.ablation import arms
from em_interp.interventions.intervening import answers_by_arm
from em_interp.interventions.steering import sweep
from em_interp.pocket import models as loading
from em_interp.pocket import organisms
from tests.tiny_models import make_chat, talk
from tests.tiny_pocket import make_pocket

QUICK = ("efficiency", "influence")
"""Analyses that ask nobody."""
QUESTIONS = {f"q{i}": text for i, text in enumerate(("a fox", "see the doctor", "rest", "what should I do"))}


class Killed(BaseException):
    pass


def stop_at(calls: int, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Let a method be called so many times, and end the run at the next call. Returns the count."""
    count, method = [0], getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if count[0] == calls:
            raise Killed
        count[0] += 1
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return count


def ask(kind: str, parts: Parts | None) -> pd.DataFrame:
    model = make_chat()
    direction = Direction(torch.ones(2, 32), (1, 2), "random", model=model.name)
    settings: dict[str, Any] = {"seed": 3, "max_new_tokens": 4, "tokens_per_batch": 80, "progress": False}
    if kind == "sample":
        return sample(model, QUESTIONS, 5, parts=parts, **settings)
    if kind == "sweep":
        grid: dict[str, Any] = {"layers": [1, 2], "coefficients": [0.0, 3.0], "random_arms": 1}
        return sweep(model, direction, QUESTIONS, n=1, parts=parts, **grid, **settings)
    return answers_by_arm(model, arms(direction, random_arms=1), QUESTIONS, 2, parts=parts, **settings)


@pytest.mark.parametrize("kind", ["sample", "sweep", "arms"])
def test_answers_are_kept_by_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen2ForCausalLM

    from em_interp.files import tables as resume

    with monkeypatch.context() as patch:
        total = stop_at(-1, patch, Qwen2ForCausalLM, "generate")
        whole = ask(kind, None)
    assert total[0] > 3
    out = tmp_path / "answers.csv"
    with monkeypatch.context() as patch:
        stop_at(3, patch, Qwen2ForCausalLM, "generate")
        with pytest.raises(Killed), work_folder(out) as folder:
            ask(kind, Parts(folder))
    (left,) = tmp_path.iterdir()
    assert len(list(left.glob("*.json"))) == 3
    with monkeypatch.context() as patch, work_folder(out) as folder:
        count = stop_at(-1, patch, Qwen2ForCausalLM, "generate")
        again = ask(kind, Parts(folder))
        assert count[0] == total[0] - 3
        patch.setattr(resume, "code_hash", lambda: "other code")
        ask(kind, Parts(folder))
        assert count[0] == 2 * total[0] - 3
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    assert "kept" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_arm_of_which_all_is_kept_needs_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2ForCausalLM

    whole, out = ask("arms", None), tmp_path / "answers.csv"
    with work_folder(out) as folder:
        ask("arms", Parts(folder))
        with monkeypatch.context() as patch:
            stop_at(0, patch, Qwen2ForCausalLM, "generate")
            pd.testing.assert_frame_equal(ask("arms", Parts(folder)), whole, check_exact=True)


@pytest.mark.parametrize("stop", [2, 5])
def test_extraction_keeps_its_totals(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from em_interp.directions import activations
    from em_interp.directions.extraction import contrast
    from em_interp.files import tables as resume

    positive, negative = [talk(f"fox {i}", "see " * i) for i in range(1, 7)], [talk("a fox", "rest " * 9)] * 6

    def read(folder: Path | None) -> Direction:
        options: dict[str, Any] = {"keep": False, "tokens_per_batch": 60, "progress": False}
        return contrast(make_chat(), positive, negative, resume_in=folder, **options).direction()

    monkeypatch.setattr(resume.Pace, "due", lambda _self: True)
    with monkeypatch.context() as patch:
        total = stop_at(-1, patch, activations._Collector, "forward")
        whole = read(None)
    with monkeypatch.context() as patch:
        stop_at(stop, patch, activations._Collector, "forward")
        with pytest.raises(Killed):
            read(tmp_path)
    with monkeypatch.context() as patch:
        count = stop_at(-1, patch, activations._Collector, "forward")
        again = read(tmp_path)
    assert total[0] > 5 and count[0] == total[0] - stop
    assert torch.equal(again.vectors, whole.vectors)
    assert "of 6 conversations" in capsys.readouterr().err


def test_a_kill_while_kept_work_is_removed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is written and whole: the next run refuses to replace it, and removes what lies beside it."""
    out, asked = tmp_path / "a.csv", {"n": 1}
    kinds: dict[str, Any] = {"inputs": (), "endings": (".csv",)}

    def half(folder: str, ignore_errors: bool = False) -> None:
        next(path for path in Path(folder).iterdir() if path.name not in (".lock", "part.json")).unlink()
        raise Killed

    for again in ("claimed", "remove_parts"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(Killed),
            claimed(out, asked, force=True, **kinds) as folder,
        ):
            patch.setattr("shutil.rmtree", half)
            write_text(folder / "part.json", "[]")
            write_text(out, "whole")
        assert len(list(tmp_path.iterdir())) > 1
        if again == "remove_parts":
            remove_parts(out)
        else:
            with pytest.raises(OutputError, match="was left as it is"), claimed(out, asked, force=False, **kinds):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """SIGKILL as soon as something was kept; the command line again; the same file, and nothing beside it."""
    from tests import kill_sweep

    kill_sweep.prepare_texts(tmp_path)
    (case,) = (case for case in kill_sweep.cases(long=False) if case.name == "steer")
    process = kill_sweep.start(case, "out", tmp_path)
    while process.poll() is None and not [p for p in (tmp_path / "out").glob(".*.parts/*.*") if p.name[0] != "."]:
        time.sleep(0.01)
    assert kill_sweep.kill(process)
    rerun = kill_sweep.start(case, "out", tmp_path)
    _, said = rerun.communicate()
    assert rerun.returncode == 0 and "kept" in said, said
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert CliRunner().invoke(app, case.run("whole")[3:]).exit_code == 0
    assert kill_sweep.wrong(case, tmp_path / "whole", tmp_path / "out") == []


@pytest.fixture(scope="module")
def little_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pocket of two organisms, and the tables of an uninterrupted run."""
    root = tmp_path_factory.mktemp("kills")
    chat = loading.load_chat(make_pocket(root / "pocket"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organisms, "SPECS", {a: replace(s, max_steps=2) for a, s in organisms.SPECS.items()})
        patch.setattr(organisms, "N_CHATS", 8)
        for kind in ("general", "narrow"):
            made = organisms.Organism("medicine", "rank-1", kind)
            organisms.make(made, chat, root / "pocket" / "organisms", progress=False)
    suite = Suite.load("pocket")
    suite.data = root / "pocket"
    assert not reproduce(suite, root / "whole", only=QUICK, static=False).failed
    return root


@pytest.mark.search
def test_a_killed_reproduce_goes_on(little_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process is killed, and no worker is left (of workers: `test_workers`)."""
    from tests import kill_sweep

    (case,) = (c for c in kill_sweep.cases(long=False) if c.name == "reproduce pocket, main")
    only = [word for name in QUICK for word in ("--only", name)]
    monkeypatch.setattr(kill_sweep, "PARTS", [*only, "--workers", "2"])
    process, out = kill_sweep.start(case, "out", little_world), little_world / "out"
    while process.poll() is None and not list(out.rglob("results/*/*.json")):
        time.sleep(0.01)
    assert kill_sweep.kill(process, "main")
    again = kill_sweep.start(case, "out", little_world)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert kill_sweep.wrong(case, little_world / "whole", out) == []
