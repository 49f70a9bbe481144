"""The methods before: percentiles over resampled clusters. Kept as what the coverage table compares with."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from em_interp.errors import StatisticsError
from em_interp.statistics import Interval


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
