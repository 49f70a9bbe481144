"""Intervals and nulls: Wilson, question-clustered bootstrap, random-direction and permutation nulls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from scipy import stats

from em_interp.errors import StatisticsError

FEW_QUESTIONS: Final = 5
"""Below this many clusters a bootstrap over them is not trusted alone."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval and how it was made."""

    low: float
    high: float
    method: str


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion of independent trials (``scipy.stats.binomtest``).

    Raises ``StatisticsError`` for no trials or more successes than trials.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise StatisticsError(f"{successes} successes of {n} trials is not a proportion; at least one trial is needed.")
    result = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(result.low), float(result.high), "Wilson")


def clustered_bootstrap_interval(
    numerators: Float[np.ndarray, " clusters"],
    denominators: Float[np.ndarray, " clusters"],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), resampling whole clusters.

    Clusters are questions: answers to one question are not independent. Raises ``StatisticsError`` for fewer than
    two clusters, for NaN, or for an empty denominator.
    """
    _check_level(level)
    if len(numerators) != len(denominators) or len(numerators) < 2:
        raise StatisticsError(
            f"{len(numerators)} clusters of numerators and {len(denominators)} of denominators; "
            "a clustered interval needs the same number of both, and at least two. Use Wilson for one question."
        )
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
        raise StatisticsError("NaN or infinite counts; drop or repair the clusters they come from.")
    if (denominators < 0).any() or denominators.sum() <= 0:
        raise StatisticsError("the denominators are negative or sum to zero; there is no rate to resample.")
    k = len(numerators)
    weights = bootstrap_weights(k, resamples=resamples, seed=seed)
    bottom = weights @ denominators
    rates = (weights @ numerators)[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), f"bootstrap over {k} questions")


def bootstrap_weights(
    k: int, *, resamples: int = 10_000, seed: int | tuple[int, ...] = 0
) -> Float[np.ndarray, "resample k"]:
    """How often each of `k` clusters is drawn in each resample. Raises ``StatisticsError`` for fewer than two."""
    if k < 2:
        raise StatisticsError(f"{k} cluster: an interval over clusters needs at least two. Give more questions.")
    return np.random.default_rng(seed).multinomial(k, np.full(k, 1.0 / k), size=resamples).astype(float)


def t_interval(values: Sequence[float] | NDArray[Any], level: float = 0.95) -> Interval:
    """Student's interval of a mean over a few independent repetitions, such as training seeds.

    Raises ``StatisticsError`` for fewer than two values, or values that are not finite.
    """
    _check_level(level)
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2 or not np.isfinite(sample).all():
        raise StatisticsError(f"{sample.tolist()}: an interval over repetitions needs at least two finite values.")
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return Interval(float(sample.mean()) - half, float(sample.mean()) + half, f"t over {len(sample)} repetitions")


def rate_interval(
    successes: Sequence[int] | NDArray[Any],
    totals: Sequence[int] | NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of a pooled rate, given counts by question.

    Bootstrap clustered by question. It says too little from few questions (resampling two of them gives three values)
    and nothing where every question has the same rate, such as zero: with fewer than ``FEW_QUESTIONS`` questions, or
    an interval of no width, the result is widened to hold the Wilson interval of the pooled counts as well.
    """
    top, bottom = np.asarray(successes, dtype=float), np.asarray(totals, dtype=float)
    used = bottom > 0
    top, bottom = top[used], bottom[used]
    wilson = wilson_interval(round(top.sum()), round(bottom.sum()), level)
    if len(bottom) < 2:
        return wilson
    clustered = clustered_bootstrap_interval(top, bottom, level=level, resamples=resamples, seed=seed)
    if len(bottom) >= FEW_QUESTIONS and clustered.high > clustered.low:
        return clustered
    return Interval(
        min(clustered.low, wilson.low), max(clustered.high, wilson.high), f"{clustered.method}, widened to Wilson"
    )


def cosine_null_sd(d_model: int) -> float:
    """Standard deviation of the cosine of two random directions in R^d: 1 / sqrt(d)."""
    _check_dimension(d_model)
    return 1.0 / math.sqrt(d_model)


def cosine_p_value(cosine: float | Num[np.ndarray, "*any"], d_model: int) -> Float[np.ndarray, "*any"]:
    """Two-sided probability that two random directions in R^d have a cosine at least this large in size.

    Exact: cos^2 of random directions is Beta(1/2, (d-1)/2) distributed. Raises ``StatisticsError`` outside [-1, 1].
    """
    _check_dimension(d_model)
    values = np.asarray(cosine, dtype=float)
    if not np.isfinite(values).all() or (np.abs(values) > 1 + 1e-9).any():
        raise StatisticsError("a cosine lies outside [-1, 1] or is NaN; it was not computed from two vectors.")
    return np.asarray(stats.beta.sf(np.clip(values**2, 0, 1), 0.5, (d_model - 1) / 2))


def permutation_p_value(observed: float, null: Float[np.ndarray, " permutations"]) -> float:
    """Two-sided p-value of ``observed`` against values under permuted labels, counting the observed one.

    (1 + number at least as extreme) / (1 + number of permutations), so never zero.
    """
    if not len(null) or not np.isfinite(null).all() or not np.isfinite(observed):
        raise StatisticsError("a permutation test needs at least one finite null value and a finite observation.")
    return float((1 + np.count_nonzero(np.abs(null) >= abs(observed))) / (1 + len(null)))


def auroc(
    positive: Float[np.ndarray, " p"],
    negative: Float[np.ndarray, " m"],
    positive_weights: Float[np.ndarray, " p"],
    negative_weights: Float[np.ndarray, " m"],
) -> float:
    """Weighted probability that a positive score exceeds a negative one, ties counting half (area under the ROC curve).

    As ``sklearn.metrics.roc_auc_score`` with weights, without its checks on every call: for use in resampling.
    Raises ``StatisticsError`` where a side has no weight.
    """
    total = positive_weights.sum() * negative_weights.sum()
    if not total > 0:
        raise StatisticsError("an AUROC needs scores with positive weight on both sides.")
    order = np.argsort(negative)
    ranked, mass = negative[order], np.concatenate([[0.0], np.cumsum(negative_weights[order])])
    below, up_to = (mass[np.searchsorted(ranked, positive, side)] for side in ("left", "right"))
    return float((positive_weights * (below + up_to)).sum() / (2 * total))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise StatisticsError(f"an interval's level must lie between 0 and 1; found {level}.")


def _check_dimension(d_model: int) -> None:
    if d_model < 2:
        raise StatisticsError(f"a random-direction null needs at least 2 dimensions; found {d_model}.")
