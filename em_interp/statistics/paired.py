"""Two rates on the same questions: the p-value of their difference, and the power to decide one.

The p-value is that of `rate_intervals.difference_interval`: below 1 - level exactly where that leaves out 0. Power is
of its Student's t, by the noncentral t distribution; rare rates, whose interval is conservative, need more. The tests
hold it against simulations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from em_interp.arguments import count, number
from em_interp.statistics import FEWEST_QUESTIONS, LEVEL, check_level
from em_interp.statistics.rate_intervals import difference_bounds

LEAST_P: Final = 1e-6
"""Smaller p-values are given as this one."""
MOST: Final = 1_000_000
"""Beyond it no number of questions or answers is looked for."""
POWER: Final = 0.8
"""The power that a plan is for, unless a call says otherwise."""
Pair = Float[np.ndarray, "2 questions"]
"""A count for each model and question."""


def difference_p_value(tops: Pair, bottoms: Pair) -> float:
    """Two-sided p-value of no difference between two rates, given counts of at least one answer for each question.

    NaN for fewer than `FEWEST_QUESTIONS` questions.
    """
    if tops.shape[1] < FEWEST_QUESTIONS:
        return math.nan
    rates = tops.sum(1) / bottoms.sum(1)
    value = float(rates[0] - rates[1])
    if value == 0:
        return 1.0

    def excess(log_p):
        # type: (float) -> float
        """How far the interval of this level stays away from 0."""
        low, high, _ = difference_bounds(tops[:, None], bottoms[:, None], -math.expm1(log_p))
        return float(low[0] if value > 0 else -high[0])

    ends = math.log(LEAST_P), math.log1p(-1e-9)
    if excess(ends[0]) > 0:
        return LEAST_P
    return 1.0 if excess(ends[1]) <= 0 else math.exp(optimize.brentq(excess, *ends, xtol=1e-9))


def variance_parts(
    values: Float[np.ndarray, " questions"], noise: Float[np.ndarray, " questions"]
) -> tuple[float, float]:
    """Variance over questions of what `values` would be without noise, and the mean of their noise's variances.

    NaN for fewer than two questions; 0 where the noise explains all. Few questions know the first badly.
    """
    if len(values) < 2:
        return math.nan, math.nan
    within = float(noise.mean())
    return max(float(values.var(ddof=1)) - within, 0.0), within


def paired_power(
    difference: float, questions: int, samples: float, between: float, within: float, *, level: float = LEVEL
) -> float:
    """Power of Student's test over questions to find a difference of two rates.

    between: variance over questions of the true difference; within: variance of the difference of one answer each to a
    question, so that a question of `samples` answers each has between + within / samples. Raises UsageError for
    fewer than two questions, samples that are not positive and variances below 0.
    """
    check_level(level)
    difference = abs(number("the difference", difference))
    count("questions", questions, at_least=2)
    number("samples", samples, above=0)
    number("between", between, at_least=0)
    number("within", within, at_least=0)
    error = math.sqrt((between + within / samples) / questions)
    if error == 0:
        return float(difference > 0)
    threshold = float(stats.t.ppf((1 + level) / 2, questions - 1))
    centre = difference / error
    if centre > 30 + threshold:  # the noncentral t loses its digits; the power is 1 to more of them than shown
        return 1.0
    tails = stats.nct.sf(threshold, questions - 1, centre) + stats.nct.cdf(-threshold, questions - 1, centre)
    return float(min(np.nan_to_num(tails, nan=1.0), 1.0))


def questions_needed(
    difference: float,
    samples: float,
    between: float,
    within: float,
    *,
    power: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """The fewest questions (at least `FEWEST_QUESTIONS`) that find a difference with `power`; None above a million.

    Raises as `paired_power`, and UsageError for a difference of 0 or a power outside (0, 1).
    """
    return _fewest(
        lambda questions: paired_power(difference, questions, samples, between, within, level=level),
        *(difference, power, FEWEST_QUESTIONS),
    )


def samples_needed(
    difference: float,
    questions: int,
    between: float,
    within: float,
    *,
    power: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """The fewest answers to each of `questions` that find a difference with `power`.

    None where questions differ so much that no number does, or more than a million. Raises as `questions_needed`.
    """
    return _fewest(
        lambda samples: paired_power(difference, questions, samples, between, within, level=level),
        *(difference, power, 1),
    )


def _fewest(power_of: Callable[[int], float], difference: float, power: float, least: int) -> int | None:
    """The least number, from `least` on, of which a difference is found with `power`."""
    number("the power", power, above=0, below=1)
    number("the difference", abs(number("the difference", difference)), above=0)
    low, high = least - 1, least
    while power_of(high) < power:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high
