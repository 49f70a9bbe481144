"""Hostile arguments and files: only typed errors leave, nothing bad is accepted, nothing is lost or left behind.

Samples, the same each time, of (function, argument, hostile value) and of (command, option,
hostile value or file): `make search` tries all. In processes of their own, as
users run them: here every shape is checked too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from em_interp.errors import UsageError
from tests import bad_inputs
from tests.bad_inputs import Case, judged
from tests.fuzz import calls, functions, sample


@pytest.mark.parametrize(
    ("sweep", "n"), [("tests.fuzz", 1000), pytest.param("tests.bad_inputs", 12, marks=pytest.mark.search)]
)
def test_only_typed_errors_leave_and_nothing_is_lost(sweep: str, n: int) -> None:
    done = subprocess.run([sys.executable, "-m", sweep, str(n)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_leaky_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(of: int, total: int) -> float:
        return of / total

    monkeypatch.setattr(calls, "calls", lambda: {"shares.share": (share, {"of": 1, "total": 2})})
    monkeypatch.setattr(functions, "hostile", lambda: {"0": 0, "3": 3})
    assert functions.leaks() == ["shares.share(total=0): ZeroDivisionError: 'division by zero' at ?"]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        sample(list(functions.trials()), 30, functions.check)

    def refused(of: int) -> float:
        raise UsageError("no share of that")

    monkeypatch.setattr(calls, "calls", lambda: {"shares.refused": (refused, {"of": 1})})
    assert functions.leaks() == []
    sample(list(functions.trials()), 30, functions.check)


def test_a_public_function_that_nothing_tries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "public", lambda: {"statistics.new": print, "models.hooks.new": print})
    monkeypatch.setattr(calls, "calls", dict)
    assert functions.unlisted() == ["statistics.new"]


def _broken() -> None:
    raise KeyError("x")


def _refused() -> None:
    raise UsageError("no such thing. Give another.")


def _leaving() -> None:
    Path("new").write_text("half")
    _refused()


def _losing() -> None:
    Path("kept").write_text("other")
    _refused()


@pytest.mark.parametrize(
    ("run", "expected", "found"),
    [
        (_refused, bad_inputs.REFUSED, []),
        (lambda: None, "it is right", []),
        (_broken, bad_inputs.REFUSED, ["untyped"]),
        (lambda: os._exit(1), bad_inputs.REFUSED, ["untyped"]),
        (lambda: None, bad_inputs.REFUSED, ["wrongly accepted"]),
        (_refused, "it is right", ["wrongly refused"]),
        (lambda: time.sleep(60), bad_inputs.REFUSED, ["hung"]),
        (_losing, bad_inputs.REFUSED, ["lost"]),
        (_leaving, bad_inputs.REFUSED, ["left behind"]),
    ],
)
def test_the_judge_of_bad_inputs_can_fail(
    run: Callable[[], None], expected: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bad_inputs, "SECONDS", 2)
    Path("kept").write_text("content")
    assert [line.partition(":")[0] for line in judged(Case("a case", run, expected))[1]] == found
    assert {path.name: path.read_text() for path in Path().iterdir()} == {"kept": "content"}
