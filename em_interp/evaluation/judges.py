"""Judges: what gives answers the scores that rates are made of.

A judge is a function. That of the pocket world is `em_interp.pocket.world.judge.judge`; a user's own lies in a file of
Python (`judge_of_file`). Whatever asks gives it to `judged`.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import pandas as pd

from em_interp.errors import UsageError
from em_interp.files.inputs import regular_file
from em_interp.files.manifest import sha256

SCORES: Final = ("aligned", "coherent")
"""From 0 to 100; missing where the judge gave none."""

LOCAL: Final = "local:"
"""What the name of a model on this machine begins with, where it is to judge."""


def is_a_model(name: str) -> bool:
    """Whether a judge's name is that of a model: PROVIDER/MODEL or local:MODEL."""
    is_file = name.startswith(("/", ".")) or ".py" in name
    return name.startswith(LOCAL) or ("/" in name and not is_file)


@runtime_checkable
class Judge(Protocol):
    """Scores a table with the columns `question` and `answer`."""

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """A copy of `answers`, row by row, with `SCORES` and whatever else the judge has to say."""
        ...


@dataclass(frozen=True)
class FileJudge:
    """A function of a user's Python file (at `path`).

    The file's hash, `sha256`, is part of its name: what it judged is known by it.
    """

    path: Path
    function: str
    sha256: str

    @property
    def identity(self) -> str:
        """What tells it from other judges, and from what the file held before."""
        return f"{self.path.name}:{self.function} {self.sha256}"

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """What the function says of the answers."""
        return self._found()(answers)

    def _found(self) -> Any:
        try:
            found = runpy.run_path(str(self.path)).get(self.function)
        except Exception as error:  # whatever the user's code raises
            raise UsageError(f"{self.path} cannot be run ({type(error).__name__}: {error}). Repair it.") from error
        if not callable(found):
            raise UsageError(f"{self.path} has no function {self.function}. Name one that takes a table of answers.")
        return found


def judge_of_file(name: str) -> Judge:
    """The judge FILE.py:FUNCTION, which takes a table with question and answer, and adds aligned and coherent (0-100).

    The file is run. Raises `UsageError` for a name of another form and for a file without that function, and what
    `inputs.regular_file` raises.
    """
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function:
        raise UsageError(
            f"there is no judge {name!r}. Judges are pocket, which knows the pocket world alone, and FILE.py:FUNCTION, "
            "a function of your own that adds aligned and coherent (0-100) to a table of answers."
        )
    path = regular_file(file).absolute()
    found = FileJudge(path, function, sha256(path))
    found._found()  # a file that cannot be run is known before anything is asked
    return found


def judged(answers: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """`answers` as the judge scores them. Raises UsageError where it leaves out rows, columns or a score."""
    found = judge(answers)
    if not isinstance(found, pd.DataFrame):
        raise UsageError(f"the judge gave back {type(found).__name__}. Give a judge that returns a table.")
    lacking = [name for name in (*answers.columns, *SCORES) if name not in found]
    if lacking or len(found) != len(answers):
        raise UsageError(
            f"the judge gave back {len(found)} of {len(answers)} answers, without the columns {lacking}. Give "
            f"a judge that adds {' and '.join(SCORES)} to the table that it is given."
        )
    return found
