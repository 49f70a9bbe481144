"""Intervals of means over clusters and over repetitions, and nulls, with the level in one place.

- `rate_intervals`, over `rate_models`: rates of few questions; `paired`: p-value and power of their difference
- `crossed`: rates over questions and training seeds
- `agreement`: of judges; `jackknife`: all else over few questions
- `units`: what the numbers of tables are in

Intervals are for new questions of the same kind, and hold with as few as eight questions: which method for what was
chosen by simulation (`analyses/benchmarks/coverage.py`), and `artifacts/benchmarks/coverage_*.csv` shows how each
covers, beside the bootstrap over questions that is usual. Column `interval` of a table names the method: for rates the
posterior of a beta-binomial and a logistic-normal model of how questions differ; for differences Student's t over
questions; for cosines, probes and ratios a jackknife over questions, cosines centred on the value without the means'
noise. "Conservative" ones cover more than they say; with fewer than four or five questions there is none, and the table
says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from scipy import stats

from em_interp.arguments import members, number
from em_interp.errors import StatisticsError

LEVEL: Final = 0.95
"""The level of every interval, unless a call says otherwise."""
PERCENT: Final = f"{LEVEL:.0%}"
"""The same as captions and columns' texts say it."""
NORMAL: Final = float(stats.norm.ppf((1 + LEVEL) / 2))
"""Half of the interval of a normal variable that is known to be one, in standard deviations."""
FEWEST_QUESTIONS: Final = 4
"""With fewer questions a rate, a difference or a ratio of rates gets no interval: see the coverage table."""
FEWEST_CLUSTERS: Final = 6
"""The same of a mean over clusters (losses, KL), which may be more skewed than a rate."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval from `low` to `high`, and how it was made.

    Both bounds are NaN where none is given; the method then says why.
    """

    low: float
    high: float
    method: str


def no_interval(reason: str) -> Interval:
    """What stands for an interval where the data cannot give one."""
    return Interval(math.nan, math.nan, reason)


def too_few(n: int, of: str) -> Interval:
    """No interval: fewer clusters than any method needs to reach its nominal coverage."""
    return no_interval(f"too few {of} for an interval ({n})")


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion of independent trials (`scipy.stats.binomtest`).

    Raises `StatisticsError` for no trials or more successes than trials.
    """
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise StatisticsError(f"{successes} successes of {n} trials is not a proportion; at least one trial is needed.")
    result = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(result.low), float(result.high), "Wilson")


def t_interval(values: Sequence[float] | NDArray[Any], level: float = LEVEL) -> Interval:
    """Student's interval of a mean over a few independent repetitions, such as training seeds.

    Raises `StatisticsError` for fewer than two values, or values that are not finite.
    """
    check_level(level)
    sample = np.array([number("a value", value) for value in members("values", values, of="numbers")])
    if len(sample) < 2 or not np.isfinite(sample).all():
        raise StatisticsError(f"{sample.tolist()}: an interval over repetitions needs at least two finite values.")
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return Interval(float(sample.mean()) - half, float(sample.mean()) + half, f"t over {len(sample)} repetitions")


def clustered_interval(
    numerators: Num[np.ndarray, " clusters"],
    denominators: Num[np.ndarray, " clusters"],
    *,
    level: float = LEVEL,
    of: str = "questions",
    positive: bool = False,
    by_size: bool = False,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), such as nats per token, over clusters of unknown population.

    Student's with the CR2 variance and Bell and McCaffrey's (2002) degrees of freedom. Their working model: the ratio
    varies alike in every cluster, or, `by_size`, less in large ones. Where the clusters are skewed, the side of the
    tail is widened to Hall's (1992) transformation of the t statistic; for what is `positive`, such as a KL, the
    interval is of the logarithm instead. Denominators are not negative; `of` says what the clusters are. Fewer than
    `FEWEST_CLUSTERS` give no interval. Raises StatisticsError for NaN, or denominators that sum to zero.
    """
    check_level(level)
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if len(top) != len(bottom) or not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise StatisticsError(
            f"{len(top)} numerators and {len(bottom)} denominators, or NaN among them; give two finite numbers for "
            "every cluster."
        )
    if (bottom < 0).any() or not bottom.sum() > 0:
        raise StatisticsError("the denominators are negative or sum to zero; there is no ratio.")
    k = len(top)
    if k < FEWEST_CLUSTERS:
        return too_few(k, of)
    ratio, share = float(top.sum() / bottom.sum()), bottom / bottom.sum()
    residual = (top - ratio * bottom) / bottom.sum()
    error, df = _cr2(residual, share, by_size)
    t = float(stats.t.ppf((1 + level) / 2, df))
    if positive:
        factor = math.exp(min(t * error / ratio, 700.0)) if ratio > 0 else 1.0
        return Interval(ratio / factor, ratio * factor, f"CR2 of the logarithm over {k} {of}")
    down, up = _hall(np.array([-t, t]), _skewness_of_mean(residual))
    return Interval(ratio - error * max(t, up), ratio - error * min(-t, down), f"CR2 with skewness over {k} {of}")


def _cr2(
    residual: Float[np.ndarray, " clusters"], share: Float[np.ndarray, " clusters"], by_size: bool
) -> tuple[float, float]:
    """Standard error of a weighted mean and its degrees of freedom (at least 1), from each cluster's part in its error.

    share: weights, which sum to 1. The expected product of two residuals follows from the working model.
    """
    if by_size:
        expected, adjust = np.diag(share) - np.outer(share, share), 1 / (1 - share).clip(1e-12)
    else:
        gram = (share**2).sum() - share[:, None] - share + np.eye(len(share))
        expected, adjust = np.outer(share, share) * gram, 1 / np.diag(gram).clip(1e-12)
    working = np.sqrt(adjust)[:, None] * expected * np.sqrt(adjust)
    df = float(np.trace(working) ** 2 / (working**2).sum())
    return math.sqrt(float((adjust * residual**2).sum())), max(df, 1.0)


_SKEWNESS: Final = 1.5
"""Few clusters seldom hold the tail, and understate the skewness by about as much."""


def _skewness_of_mean(values: Float[np.ndarray, " clusters"]) -> float:
    k, centred = len(values), values - values.mean()
    spread = float(centred.std(ddof=1))
    if not spread > 0:
        return 0.0
    return _SKEWNESS * k**1.5 / ((k - 1) * (k - 2)) * float((centred**3).mean()) / spread**3


def _hall(t: Float[np.ndarray, " bound"], skewness: float) -> Float[np.ndarray, " bound"]:
    """Quantiles of the t statistic of a skewed mean, from those of Student's (Hall 1992, the cubic form)."""
    a = skewness / 3
    return t if abs(a) < 1e-9 else np.asarray((np.cbrt(1 + 3 * a * (t - a / 2)) - 1) / a)


def crossed_interval(values: Float[np.ndarray, "clusters seeds"], *, level: float = LEVEL) -> Interval:
    """Interval of the mean over all questions and all seeds that might have been drawn, given one value for each pair.

    Student's with the variance of both means added and Satterthwaite's degrees of freedom; the variance of their
    interaction, which both hold, is not taken off. Where the questions are skewed it is widened as in
    `clustered_interval`. Fewer than `FEWEST_CLUSTERS` questions give no interval. Raises StatisticsError for fewer than
    two seeds or NaN.
    """
    check_level(level)
    k, seeds = values.shape
    if seeds < 2 or not np.isfinite(values).all():
        raise StatisticsError(
            f"{seeds} seeds, or NaN among the values; at least two seeds with finite values are needed."
        )
    if k < FEWEST_CLUSTERS:
        return too_few(k, "questions")
    parts = np.array([values.mean(1 - axis).var(ddof=1) / n for axis, n in enumerate((k, seeds))])
    mean, total = float(values.mean()), float(parts.sum())
    df = total**2 / float((parts**2 / (k - 1, seeds - 1)).sum()) if total > 0 else 1.0
    t, error = float(stats.t.ppf((1 + level) / 2, df)), math.sqrt(total)
    skewness = _skewness_of_mean(values.mean(1)) * (parts[0] / total) ** 1.5 if total > 0 else 0.0
    down, up = _hall(np.array([-t, t]), float(skewness))
    method = f"Student's with skewness over {k} questions and {seeds} seeds"
    return Interval(mean - error * max(t, up), mean - error * min(-t, down), method)


def cosine_null_sd(d_model: int) -> float:
    """Standard deviation of the cosine of two random directions in R^d: 1 / sqrt(d)."""
    _check_dimension(d_model)
    return 1.0 / math.sqrt(d_model)


def cosine_p_value(cosine: float | Num[np.ndarray, "*any"], d_model: int) -> Float[np.ndarray, "*any"]:
    """Two-sided probability that two random directions in R^d have a cosine at least this large in size.

    Exact: cos^2 of random directions is Beta(1/2, (d-1)/2) distributed. Raises `StatisticsError` outside [-1, 1].
    """
    _check_dimension(d_model)
    values = np.asarray(cosine, dtype=float)
    if not np.isfinite(values).all() or (np.abs(values) > 1 + 1e-9).any():
        raise StatisticsError("a cosine lies outside [-1, 1] or is NaN; it was not computed from two vectors.")
    return np.asarray(stats.beta.sf(np.clip(values**2, 0, 1), 0.5, (d_model - 1) / 2))


def permutation_p_value(observed: float, null: Float[np.ndarray, " permutations"]) -> float:
    """Two-sided p-value of `observed` against values under permuted labels, counting the observed one.

    (1 + number at least as extreme) / (1 + number of permutations), so never zero.
    """
    if not len(null) or not np.isfinite(null).all() or not np.isfinite(float(observed)):
        raise StatisticsError("a permutation test needs at least one finite null value and a finite observation.")
    return float((1 + np.count_nonzero(np.abs(null) >= abs(observed))) / (1 + len(null)))


def auroc(
    positive: Float[np.ndarray, " p"],
    negative: Float[np.ndarray, " m"],
    positive_weights: Float[np.ndarray, " p"] | None = None,
    negative_weights: Float[np.ndarray, " m"] | None = None,
) -> float:
    """Weighted probability that a positive score exceeds a negative one, ties counting half (area under the ROC curve).

    As `sklearn.metrics.roc_auc_score` with weights, without its checks on every call: for use in resampling.
    Raises `StatisticsError` where a side has no weight, or not one a score.
    """
    positive_weights = np.ones(len(positive)) if positive_weights is None else positive_weights
    negative_weights = np.ones(len(negative)) if negative_weights is None else negative_weights
    for scores, given in ((positive, positive_weights), (negative, negative_weights)):
        if scores.shape != given.shape:
            raise StatisticsError(f"{scores.size} scores and {given.size} weights: an AUROC needs one weight a score.")
    total = positive_weights.sum() * negative_weights.sum()
    if not total > 0:
        raise StatisticsError("an AUROC needs scores with positive weight on both sides.")
    order = np.argsort(negative)
    ranked, mass = negative[order], np.concatenate([[0.0], np.cumsum(negative_weights[order])])
    below, up_to = (mass[np.searchsorted(ranked, positive, side)] for side in ("left", "right"))
    return float((positive_weights * (below + up_to)).sum() / (2 * total))


def check_level(level: float) -> None:
    """Raise StatisticsError for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise StatisticsError(f"an interval's level must lie between 0 and 1; found {level}.")


def _check_dimension(d_model: int) -> None:
    if d_model < 2:
        raise StatisticsError(f"a random-direction null needs at least 2 dimensions; found {d_model}.")
