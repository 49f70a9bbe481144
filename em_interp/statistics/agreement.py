"""How far judges agree on the same answers: Spearman's rho, Cohen's kappa, Krippendorff's alpha, over questions.

Sources: Cohen (1960) for kappa; Krippendorff (2011, "Computing Krippendorff's alpha-reliability") for alpha, whose
interval metric is used. Intervals are of Fisher's z of each, by a jackknife over questions whose bias is taken off:
few questions understate how much answers differ, and with that the agreement. Its tails are those of
`clustered_interval`. Which method was chosen by simulation:
`analyses/benchmarks/coverage_judged.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import stats

from em_interp.errors import StatisticsError
from em_interp.statistics import (
    FEWEST_CLUSTERS,
    LEVEL,
    Interval,
    check_level,
    clustered_interval,
    no_interval,
    too_few,
)

FEWEST_AGREED: Final = 3
"""Questions in which both judges must give each label for kappa to have an interval: a rare one tells too little."""
Scores = Num[np.ndarray, "units judges"]
"""A score for each answer and judge; NaN where a judge gave none."""


def spearman(scores: Scores) -> float:
    """Correlation of the ranks that two judges give (ties share a rank), of units that both scored.

    NaN for fewer than two units, or where a judge gives all the same score. Raises StatisticsError unless two judges.
    """
    both = _both(scores)
    if len(both) < 2 or (both == both[0]).all(0).any():
        return math.nan
    ranks = stats.rankdata(both, axis=0)
    ranks = ranks - ranks.mean(0)
    return float((ranks[:, 0] * ranks[:, 1]).sum() / np.sqrt((ranks**2).sum(0).prod()))


def cohen_kappa(labels: Scores) -> float:
    """Agreement of two judges on categories beyond chance, of units that both labelled.

    NaN where chance alone would agree on all. Raises StatisticsError unless two judges.
    """
    both = _both(labels)
    if not len(both):
        return math.nan
    seen = (both == both[:, :1]).all(1).mean()
    shares = [(both == category).mean(0).prod() for category in np.unique(both)]
    chance = float(np.sum(shares))
    return math.nan if chance >= 1 - 1e-12 else float((seen - chance) / (1 - chance))


def krippendorff_alpha(scores: Scores) -> float:
    """Agreement of any number of judges beyond chance, by the interval metric; missing scores are allowed.

    1 minus the ratio of squared differences within units to those between all scores. Units that fewer than two judges
    scored say nothing. NaN where all scores are the same, or no unit has two.
    """
    _check(scores)
    given = np.isfinite(scores)
    paired = scores[given.sum(1) >= 2]
    if not len(paired):
        return math.nan
    counts = np.isfinite(paired).sum(1)
    centred = paired - np.nanmean(paired)  # sums of squares of large numbers lose digits
    squares, sums = np.nansum(centred**2, axis=1), np.nansum(centred, axis=1)
    n = int(counts.sum())
    observed = float(((counts * squares - sums**2) / (counts - 1)).sum()) / n
    expected = float(n * squares.sum() - sums.sum() ** 2) / (n * (n - 1))
    spread = float(np.nanmax(paired) - np.nanmin(paired))
    return math.nan if spread == 0 else 1 - observed / expected


STATISTICS: Final[dict[str, Callable[[Scores], float]]] = {
    "spearman": spearman,
    "kappa": cohen_kappa,
    "krippendorff": krippendorff_alpha,
}
"""Each by its name in tables."""


def agreement_interval(
    statistic: str, scores: Scores, question: Int[np.ndarray, " units"], *, level: float = LEVEL
) -> Interval:
    """Interval of one of `STATISTICS` over questions that might have been asked. question: numbers of any kind.

    None for fewer than `FEWEST_CLUSTERS` questions, where the statistic is undefined with or without some question,
    where the judges agree on all (no spread to see is not no doubt), and, of kappa, where they agree on some label in
    fewer than `FEWEST_AGREED` questions.
    """
    check_level(level)
    _check(scores)
    compute = STATISTICS[statistic]
    value, members = compute(scores), np.unique(question)
    if not math.isfinite(value):
        return no_interval("undefined: the judges say one thing of all, or share no answer")
    k = len(members)
    if k < FEWEST_CLUSTERS:
        return too_few(k, "questions")
    if statistic == "kappa" and (seen := _fewest_seen(scores, question)) < FEWEST_AGREED:
        return no_interval(f"no interval: the judges agree on a label in too few questions ({seen})")
    without = np.array([compute(scores[question != own]) for own in members])
    if not np.isfinite(without).all():
        return no_interval("no interval: it rests on the answers to one question")
    if value >= 1 - 1e-12:
        return no_interval("no interval: the judges agree on every answer")
    whole = without >= 1 - 1e-12  # all disagreement was in that question: half is taken to be left
    without = np.where(whole, (1 + value) / 2, without)
    z, others = (np.arctanh(np.clip(x, -1 + 1e-9, 1 - 1e-9)) for x in (value, without))
    return _jackknifed(float(z), np.asarray(others), value, level)


def _fewest_seen(labels: Scores, question: Int[np.ndarray, " units"]) -> int:
    """Questions in which both judges give an answer the label that they agree on in the fewest."""
    given = np.unique(labels[np.isfinite(labels)])
    return min(len(np.unique(question[(labels == label).all(1)])) for label in given)


def _jackknifed(z: float, others: Float[np.ndarray, " k"], value: float, level: float) -> Interval:
    k = len(others)
    found = clustered_interval(k * z - (k - 1) * others, np.ones(k), level=level)
    low, high = math.tanh(found.low), math.tanh(found.high)
    method = f"conservative: jackknife of Fisher's z with skewness over {k} questions"
    return Interval(min(low, value), max(high, value), method)


def _check(scores: Scores) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise StatisticsError(
            f"scores of shape {scores.shape}: give a row for each answer and a column for each judge."
        )
    if np.isinf(scores).any():
        raise StatisticsError("a score is infinite; leave it NaN where a judge gave none.")


def _both(scores: Scores) -> Num[np.ndarray, "both judges"]:
    _check(scores)
    if scores.shape[1] != 2:
        raise StatisticsError(f"{scores.shape[1]} judges: this is of two. Take them in pairs.")
    return scores[np.isfinite(scores).all(1)]
