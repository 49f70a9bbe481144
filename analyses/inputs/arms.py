"""Tables of the arms of an experiment (`em_interp.pocket.causes.arms.COLUMNS`): rates over questions and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from em_interp.errors import UsageError
from em_interp.statistics.crossed import difference_over_seeds, rate_over_seeds

OF_CHAT = "none"
"""The adapter of the chat model itself, whose one row stands beside every seed."""


@dataclass(frozen=True)
class Estimate:
    """A rate, or a difference of two, with its interval over questions and seeds; n answers of so many seeds."""

    value: float
    low: float
    high: float
    method: str
    n: int
    seeds: int


def rows_of(table: pd.DataFrame, *, adapter: str, **where: str | int) -> pd.DataFrame:
    """The rows, one a seed, of an arm (or of the chat model, which has no adapter) in a condition, step and group.

    where: column -> value. Raises UsageError where a seed has several.
    """
    chosen = table[table["adapter"].isin([adapter, OF_CHAT])]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    if chosen["seed"].duplicated().any():
        raise UsageError(f"several rows of one seed for {adapter}, {where}: say which step, condition and group.")
    return chosen.sort_values("seed")


def last_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of finished arms."""
    last = table.groupby(["experiment", "arm", "adapter", "seed"])["step"].transform("max")
    return table[table["step"] == last]


def rate(rows: pd.DataFrame, of: str = "em") -> Estimate:
    """The rate of an arm over its seeds; of: em or coherent."""
    counts, n = _counts(rows, of)
    interval = rate_over_seeds(counts, n)
    return Estimate(float(counts.mean() / n), interval.low, interval.high, interval.method, _n(rows), len(rows))


def difference(first: pd.DataFrame, second: pd.DataFrame, of: str = "em") -> Estimate:
    """The first arm's rate minus the second's, over the seeds that both have."""
    first, second = _paired(first, second)
    (top, n), (beside, m) = _counts(first, of), _counts(second, of)
    interval = difference_over_seeds((top, beside), (n, m))
    value, seeds = float(top.mean() / n - beside.mean() / m), max(len(first), len(second))
    return Estimate(value, interval.low, interval.high, interval.method, _n(first) + _n(second), seeds)


def _paired(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    if OF_CHAT in (set(first["adapter"]) | set(second["adapter"])):
        return first, second
    both = set(first["seed"]) & set(second["seed"])
    return first[first["seed"].isin(both)], second[second["seed"].isin(both)]


def _counts(rows: pd.DataFrame, of: str) -> tuple[NDArray[np.float64], int]:
    """Answers [questions, seeds], and of how many each is."""
    if rows.empty:
        raise UsageError("no seed has such rows: the table does not hold that arm yet.")
    counts = np.array([[float(n) for n in cell.split()] for cell in rows[f"{of}_counts"]]).T
    return counts, round(int(rows["n"].iloc[0]) / len(counts))


def _n(rows: pd.DataFrame) -> int:
    return int(rows["n"].sum())
