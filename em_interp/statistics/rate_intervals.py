"""Intervals of rates over questions, of their differences and of their ratios.

The population is all questions that might have been asked: answers to one question are not independent. Which method
was chosen for what, and how it covers: `analyses/benchmarks/coverage.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import stats

from em_interp.arguments import count, numbers
from em_interp.errors import StatisticsError
from em_interp.statistics import FEWEST_QUESTIONS, LEVEL, Interval, check_level, no_interval, too_few
from em_interp.statistics.rate_models import posterior_quantiles, posterior_quantiles_of_any

Counts = Sequence[float] | NDArray[Any]
"""A number for each question."""
Table = Float[np.ndarray, "data questions"]
"""A number for each data set and question."""
Values = Float[np.ndarray, " data"]
"""A number for each data set."""
RARE: Final = 0.1
"""Where two rates are on average nearer than this to 0 or 1, their difference is skewed: no Student's t."""
RARE_OF_RATIO: Final = 0.2
"""Where either rate is below it, the logarithm of their ratio is skewed: no Student's t."""


def rate_interval(successes: Counts, totals: Counts, *, level: float = LEVEL) -> Interval:
    """Interval of a pooled rate, given counts by question: the equal-tailed posterior interval of `rate_models`.

    Wherever it would leave out the pooled rate (questions of very different size), it is widened to it. Questions
    without answers do not count; fewer than `FEWEST_QUESTIONS` give no interval. Raises StatisticsError for counts
    that are not a proportion.
    """
    check_level(level)
    top, bottom = _counts(successes, totals)
    if len(top) < FEWEST_QUESTIONS:
        return too_few(len(top), "questions")
    low, high = rate_bounds(top[None], bottom[None], level)
    return Interval(float(low[0]), float(high[0]), f"beta-binomial and logistic-normal over {len(top)} questions")


def difference_interval(
    successes: tuple[Counts, Counts], totals: tuple[Counts, Counts], *, level: float = LEVEL
) -> Interval:
    """Interval of the first rate minus the second, of two models or arms that were asked the same questions, in order.

    Student's over the questions' differences; where both rates are near 0 or 1 (`RARE`), or all questions differ by as
    much, Zou and Donner's (2008) combination of both `rate_interval`, which is conservative. Questions that an arm has
    no answers to are left out.
    """
    tops, bottoms = _paired(successes, totals)
    k = tops.shape[1]
    if k < FEWEST_QUESTIONS:
        return too_few(k, "questions")
    low, high, rare = difference_bounds(tops[:, None], bottoms[:, None], level)
    method = "conservative: both rates' intervals combined" if rare[0] else "t"
    return Interval(float(low[0]), float(high[0]), f"{method} over {k} questions")


def ratio_interval(
    successes: tuple[Counts, Counts], totals: tuple[Counts, Counts], *, level: float = LEVEL
) -> Interval:
    """Interval of the first rate over the second, of two models or arms that were asked the same questions, in order.

    Student's over the questions' parts in the ratio's logarithm; where a rate is rare (`RARE_OF_RATIO`), or all
    questions agree, Zou and Donner's (2008) combination of the logarithms of both `rate_interval`, which is
    conservative. No interval where nothing was counted in the second. Questions that an arm has no answers to are left
    out.
    """
    tops, bottoms = _paired(successes, totals)
    k = tops.shape[1]
    if k < FEWEST_QUESTIONS:
        return too_few(k, "questions")
    if not tops[1].sum():
        return no_interval("no interval: the rate that is divided by is 0")
    low, high, rare = ratio_bounds(tops[:, None], bottoms[:, None], level)
    method = "conservative: logarithms of both rates' intervals combined" if rare[0] else "t of the logarithm"
    return Interval(float(low[0]), float(high[0]), f"{method} over {k} questions")


def any_of_k(successes: Counts, totals: Counts, k: int) -> Float[np.ndarray, " questions"]:
    """Probability that any of k answers to a question is a success, by question: NaN where it has fewer than k.

    Unbiased, from all ways to draw k of its answers without putting one back (as pass@k). Raises as `rate_interval`,
    and UsageError for k below 1.
    """
    k = count("k", k)
    top, bottom = numbers("successes", successes), numbers("totals", totals)
    _counts(top, bottom)
    if (top % 1 != 0).any() or (bottom % 1 != 0).any():
        raise StatisticsError("counts of answers are not whole numbers: k of them cannot be drawn.")
    return np.where(bottom >= k, stats.hypergeom.sf(0, bottom, top, np.minimum(k, bottom)), np.nan)


def any_of_k_interval(successes: Counts, totals: Counts, k: int, *, level: float = LEVEL) -> Interval:
    """Interval of the mean of `any_of_k` over questions, those with k answers or more, from all of their answers.

    `rate_interval` for k = 1, and of the same models for more. Widened to hold the estimate. Raises as `any_of_k`.
    """
    check_level(level)
    used = np.isfinite(any_of_k(successes, totals, k))
    if used.sum() < FEWEST_QUESTIONS:
        return too_few(int(used.sum()), f"questions with {k} answers" if k > 1 else "questions")
    top, bottom = (np.asarray(counts, dtype=float)[used] for counts in (successes, totals))
    low, high = any_of_k_bounds(top[None], bottom[None], k, level)
    method = f"beta-binomial and logistic-normal over {int(used.sum())} questions"
    return Interval(float(low[0]), float(high[0]), method)


def any_of_k_bounds(top: Table, bottom: Table, k: int, level: float = LEVEL) -> tuple[Values, Values]:
    """`any_of_k_interval` of many data sets."""
    levels = ((1 - level) / 2, (1 + level) / 2)
    quantiles = (
        posterior_quantiles(top, bottom, levels) if k == 1 else posterior_quantiles_of_any(top, bottom, k, levels)
    )
    mean = stats.hypergeom.sf(0, bottom, top, k).mean(1)
    return np.where(mean == 0, 0, np.minimum(quantiles[:, 0], mean)), np.where(
        mean == 1, 1, np.maximum(quantiles[:, 1], mean)
    )


def rate_bounds(top: Table, bottom: Table, level: float = LEVEL) -> tuple[Values, Values]:
    """`rate_interval` of many data sets."""
    low, high = posterior_quantiles(top, bottom, ((1 - level) / 2, (1 + level) / 2)).T
    rate = top.sum(1) / bottom.sum(1)
    return np.where(rate == 0, 0, np.minimum(low, rate)), np.where(rate == 1, 1, np.maximum(high, rate))


def difference_bounds(
    tops: Float[np.ndarray, "2 data questions"], bottoms: Float[np.ndarray, "2 data questions"], level: float = LEVEL
) -> tuple[Values, Values, Bool[np.ndarray, " data"]]:
    """`difference_interval` of many data sets, and which of them got no Student's t."""
    k = tops.shape[-1]
    rates = tops.sum(-1) / bottoms.sum(-1)
    residual = (tops - rates[..., None] * bottoms) / bottoms.sum(-1)[..., None]
    spread = np.sqrt(((residual[0] - residual[1]) ** 2).sum(-1) * k / (k - 1))
    half = float(stats.t.ppf((1 + level) / 2, k - 1)) * spread
    low, high = rates[0] - rates[1] - half, rates[0] - rates[1] + half
    rare = (np.minimum(rates, 1 - rates).mean(0) < RARE) | np.isclose(spread, 0, atol=1e-12)
    if rare.any():
        bounds = [rate_bounds(y[rare], n[rare], level) for y, n in zip(tops, bottoms, strict=True)]
        low[rare], high[rare] = _combined(rates[:, rare], bounds, _correlation(tops / bottoms)[rare])
    return low.clip(-1), high.clip(max=1), rare


def ratio_bounds(
    tops: Float[np.ndarray, "2 data questions"], bottoms: Float[np.ndarray, "2 data questions"], level: float = LEVEL
) -> tuple[Values, Values, Bool[np.ndarray, " data"]]:
    """`ratio_interval` of many data sets, and which of them got no Student's t."""
    k = tops.shape[-1]
    rates = tops.sum(-1) / bottoms.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(rates)
        parts = (tops - rates[..., None] * bottoms) / tops.sum(-1)[..., None]
        spread = np.sqrt(((parts[0] - parts[1]) ** 2).sum(-1) * k / (k - 1))
        half = float(stats.t.ppf((1 + level) / 2, k - 1)) * spread
        low, high = np.exp(logs[0] - logs[1] - half), np.exp(logs[0] - logs[1] + half)
        rare = (rates.min(0) < RARE_OF_RATIO) | np.isclose(spread, 0, atol=1e-12)
        if rare.any():
            bounds = [rate_bounds(y[rare], n[rare], level) for y, n in zip(tops, bottoms, strict=True)]
            of_logs = [(np.log(a), np.log(b)) for a, b in bounds]
            down, up = _combined(logs[:, rare], of_logs, _correlation(tops / bottoms)[rare])
            none = rates[0, rare] == 0
            low[rare] = np.where(none, 0, np.exp(down))
            high[rare] = np.where(none, bounds[0][1] / bounds[1][0], np.exp(up))
    undefined = rates[1] == 0
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high), rare


def _combined(
    values: Float[np.ndarray, "2 data"], bounds: Sequence[tuple[Values, Values]], r: Values
) -> tuple[Values, Values]:
    """Bounds of the difference of two values with intervals, whose estimates correlate by `r`."""
    (down, up), (other_down, other_up) = ((v - low, high - v) for v, (low, high) in zip(values, bounds, strict=True))
    difference = values[0] - values[1]
    low = difference - np.sqrt((down**2 + other_up**2 - 2 * r * down * other_up).clip(0))
    high = difference + np.sqrt((up**2 + other_down**2 - 2 * r * up * other_down).clip(0))
    return low, high


def _correlation(rates: Float[np.ndarray, "2 data questions"]) -> Values:
    """Of two arms' rates over questions, drawn towards 0 by 1 / k: few questions make it too large or too small."""
    x, y = rates - rates.mean(-1, keepdims=True)
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.asarray((1 - 1 / rates.shape[-1]) * (x * y).sum(-1) / np.where(size > 0, size, 1))


def _counts(successes: Counts, totals: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    top, bottom = numbers("successes", successes), numbers("totals", totals)
    if top.shape != bottom.shape or top.ndim != 1:
        raise StatisticsError(f"counts of shapes {top.shape} and {bottom.shape}: give two numbers for every question.")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all() and (top >= 0).all() and (top <= bottom).all()):
        raise StatisticsError(
            f"{top.tolist()} successes of {bottom.tolist()}: a question has a negative count, NaN, or more successes "
            "than answers. Give both counts of the same answers."
        )
    if not bottom.sum() > 0:
        raise StatisticsError("no answers: a rate needs at least one.")
    return top[bottom > 0], bottom[bottom > 0]


def _paired(
    successes: tuple[Counts, Counts], totals: tuple[Counts, Counts]
) -> tuple[Float[np.ndarray, "2 questions"], Float[np.ndarray, "2 questions"]]:
    for y, n in zip(successes, totals, strict=True):
        _counts(y, n)
    if len(successes[0]) != len(successes[1]):
        raise StatisticsError(f"{len(successes[0])} and {len(successes[1])} questions: give the same ones for both.")
    tops, bottoms = np.asarray(successes, dtype=float), np.asarray(totals, dtype=float)
    both = (bottoms > 0).all(0)
    return tops[:, both], bottoms[:, both]
