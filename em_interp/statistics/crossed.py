"""Rates and their differences over questions and training seeds, both of which might have been others.

`crossed_interval` sees how questions and seeds vary, but nothing where no answer varies; the intervals over questions
of the answers pooled over seeds know that rates end at 0 and 1. The wider end of both is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from em_interp.errors import StatisticsError
from em_interp.statistics import LEVEL, Interval, check_level, clustered_interval, crossed_interval
from em_interp.statistics.rate_intervals import difference_interval, rate_interval, ratio_interval

Cells = Float[np.ndarray, "_ _"]
"""A number for each question (row) and seed (column)."""
Values = Float[np.ndarray, " _"]
"""A number for each question."""


def rate_over_seeds(successes: Cells, n: int, *, level: float = LEVEL) -> Interval:
    """Interval of the rate of successes among `n` answers to each question by each seed.

    Of one seed, that over questions. Raises StatisticsError for counts that are no such.
    """
    check_level(level)
    top = _checked(successes, n)
    pooled = rate_interval(top.sum(1), np.full(len(top), float(n * top.shape[1])), level=level)
    return _wider(pooled, _crossed(top / n, level), 0.0)


def difference_over_seeds(successes: tuple[Cells, Cells], n: tuple[int, int], *, level: float = LEVEL) -> Interval:
    """Interval of the first rate minus the second, of two arms that were asked the same questions, in order.

    Their seeds belong together, in order; an arm with one column beside several is the same for each of those, as the
    model that all seeds start from. n: answers to each question by a seed, of both. Raises StatisticsError for counts
    that are no such, or arms of other questions or numbers of seeds.
    """
    check_level(level)
    tops = _same(successes, n)
    pooled = difference_interval(_summed(tops), _totals(tops, n), level=level)
    return _wider(pooled, _crossed(tops[0] / n[0] - tops[1] / n[1], level), -1.0)


def ratio_over_seeds(successes: tuple[Cells, Cells], n: tuple[int, int], *, level: float = LEVEL) -> Interval:
    """The same of the first rate over the second: no interval where nothing was counted in the second."""
    check_level(level)
    tops = _same(successes, n)
    pooled = ratio_interval(_summed(tops), _totals(tops, n), level=level)
    first, second = (top / of for top, of in zip(tops, n, strict=True))
    if not second.any():
        return pooled
    ratio = float(first.mean() / second.mean())
    parts = _crossed((first - ratio * second) / float(second.mean()), level)
    moved = None if parts is None else Interval(parts.low + ratio, parts.high + ratio, parts.method)
    return _wider(pooled, moved, 0.0, math.inf)


def combination_over_seeds(
    successes: Sequence[Cells], n: Sequence[int], weights: Sequence[float], *, level: float = LEVEL
) -> Interval:
    """The same of a weighted sum of rates, such as a difference of differences; over questions it is Student's."""
    check_level(level)
    if not len(successes) or not len(successes) == len(n) == len(weights):
        told = f"{len(n)} numbers of answers and {len(weights)} weights for {len(successes)} arms"
        raise StatisticsError(f"{told}: give one of each for each.")
    tops = _same(successes, n)
    values = sum(w * top / of for w, top, of in zip(weights, tops, n, strict=True)) + np.zeros(tops[0].shape)
    pooled = clustered_interval(values.mean(1), np.ones(len(values)), level=level)
    return _wider(pooled, _crossed(values, level), -math.inf, math.inf)


def _same(successes: Sequence[Cells], n: Sequence[int]) -> list[Cells]:
    """Counts of arms that were asked the same questions, by the same seeds or by one for all."""
    tops = [_checked(top, of) for top, of in zip(successes, n, strict=True)]
    seeds = max((top.shape[1] for top in tops), default=0)
    if len({len(top) for top in tops}) != 1 or any(top.shape[1] not in (1, seeds) for top in tops):
        shapes = " and ".join(f"{len(top)} x {top.shape[1]}" for top in tops)
        raise StatisticsError(f"questions x seeds of the arms are {shapes}: give the same of all, or one seed.")
    return tops


def _summed(tops: Sequence[Cells]) -> tuple[Values, Values]:
    first, second = (top.sum(1) for top in tops)
    return first, second


def _totals(tops: Sequence[Cells], n: Sequence[int]) -> tuple[Values, Values]:
    first, second = (np.full(len(top), float(of * top.shape[1])) for top, of in zip(tops, n, strict=True))
    return first, second


def _checked(successes: Cells, n: int) -> Cells:
    top = np.asarray(successes, dtype=float)
    if n < 1 or top.ndim != 2 or 0 in top.shape or not ((top >= 0) & (top <= n)).all():
        raise StatisticsError(f"counts of shape {top.shape} of {n} answers each: give questions x seeds, from 0 to n.")
    return top


def _crossed(values: Cells, level: float) -> Interval | None:
    return crossed_interval(values, level=level) if values.shape[1] > 1 else None


def _wider(pooled: Interval, crossed: Interval | None, least: float, most: float = 1.0) -> Interval:
    """From the lower of both low ends to the higher of both high ones."""
    if crossed is None or not np.isfinite(crossed.low):
        return pooled
    low, high = np.fmin(pooled.low, crossed.low), np.fmax(pooled.high, crossed.high)
    return Interval(
        float(max(low, least)), float(min(high, most)), f"{crossed.method}; no narrower than {pooled.method}"
    )
