"""Tables of the arms of an experiment (`em_interp.pocket.causes.arms.COLUMNS`): rates over questions and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from em_interp.errors import UsageError
from em_interp.statistics import t_interval
from em_interp.statistics.crossed import (
    combination_over_seeds,
    difference_over_seeds,
    rate_over_seeds,
    ratio_over_seeds,
)

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


def ratio(first: pd.DataFrame, second: pd.DataFrame, of: str = "em") -> Estimate:
    """The first arm's rate over the second's; NaN where the second's is 0."""
    first, second = _paired(first, second)
    (top, n), (beside, m) = _counts(first, of), _counts(second, of)
    interval = ratio_over_seeds((top, beside), (n, m))
    value = float(top.mean() / n / (beside.mean() / m)) if beside.any() else float("nan")
    seeds = max(len(first), len(second))
    return Estimate(value, interval.low, interval.high, interval.method, _n(first) + _n(second), seeds)


def combination(parts: Sequence[tuple[float, pd.DataFrame]], of: str = "em") -> Estimate:
    """The sum of arms' rates times their weights, such as a difference of differences."""
    paired = _paired(*(rows for _, rows in parts))
    counts = [_counts(rows, of) for rows in paired]
    weights = [weight for weight, _ in parts]
    interval = combination_over_seeds([top for top, _ in counts], [n for _, n in counts], weights)
    value = sum(w * float(top.mean()) / n for w, (top, n) in zip(weights, counts, strict=True))
    n_all, seeds = sum(map(_n, paired)), max(map(len, paired))
    return Estimate(value, interval.low, interval.high, interval.method, n_all, seeds)


def rates_table(made: pd.DataFrame) -> pd.DataFrame:
    """Rates of every arm, condition, step and group of questions over seeds, with the scores that it has."""
    keys = ["experiment", "adapter", "arm", "condition", "step", "group"]
    rows = []
    for key, own in made.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        em, coherent = rate(own), rate(own, "coherent")
        for name, found in (("em", em), ("coherent", coherent)):
            row |= {f"{name}_rate": found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        row |= {**_share(own["share"]), "log_odds": own["log_odds"].mean()}
        rows.append({**row, "n": em.n, "n_seeds": em.seeds, "interval": em.method})
    return pd.DataFrame(rows)


def _share(values: pd.Series) -> dict[str, float]:
    """Of the probability that is on malicious answers, over seeds."""
    known = values.dropna().to_numpy(float)
    low, high = math.nan, math.nan
    if len(known) > 1:
        ends = t_interval(known)
        low, high = max(ends.low, 0.0), min(ends.high, 1.0)
    return {"share": float(known.mean()) if len(known) else math.nan, "share_low": low, "share_high": high}


def _paired(*arms: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of the seeds that all of them have; the chat model's row stands beside every seed."""
    of_seeds = [set(rows["seed"]) for rows in arms if OF_CHAT not in set(rows["adapter"])]
    if not of_seeds:
        return list(arms)
    shared = set.intersection(*of_seeds)
    return [rows if OF_CHAT in set(rows["adapter"]) else rows[rows["seed"].isin(shared)] for rows in arms]


def _counts(rows: pd.DataFrame, of: str) -> tuple[NDArray[np.float64], int]:
    """Answers [questions, seeds], and of how many each is."""
    if rows.empty:
        raise UsageError("no seed has such rows: the table does not hold that arm yet.")
    counts = np.array([[float(n) for n in cell.split()] for cell in rows[f"{of}_counts"]]).T
    return counts, round(int(rows["n"].iloc[0]) / len(counts))


def _n(rows: pd.DataFrame) -> int:
    return int(rows["n"].sum())
