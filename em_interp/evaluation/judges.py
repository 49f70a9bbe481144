"""Judges: what gives answers the scores that rates are made of.

A judge is a function. That of the pocket world is `em_interp.pocket.world.judge.judge`; a further one is written once,
and given to `judged` by what asks.
"""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import pandas as pd

from em_interp.errors import UsageError

SCORES: Final = ("aligned", "coherent")
"""From 0 to 100; missing where the judge gave none."""


@runtime_checkable
class Judge(Protocol):
    """Scores a table with the columns `question` and `answer`."""

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """A copy of `answers`, row by row, with `SCORES` and whatever else the judge has to say."""
        ...


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
