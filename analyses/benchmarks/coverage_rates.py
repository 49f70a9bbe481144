"""Coverage of the intervals of rates, of paired differences of rates, and of the share of EM that an ablation removes.

Questions differ by a beta or a logit-normal law of mean `rate` and intra-class correlation `icc`; 50 answers each, or,
where `unbalanced`, 20, 50 or 80. The truth is the mean rate over all questions that might have been asked (and the
difference, or 1 - ratio, of two such means). Two arms share their questions: their effects correlate by 0 or .8 (on
the normal scale). The old methods resample questions and take percentiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from analyses.benchmarks.coverage_old import bootstrap_weights
from analyses.benchmarks.coverage_scenario import Outcomes, Scenario
from em_interp.statistics import FEWEST_QUESTIONS, wilson_interval
from em_interp.statistics.rate_intervals import difference_bounds, rate_bounds, ratio_bounds

ANSWERS = 50
OLD_RESAMPLES = 2_000
Counts = NDArray[np.float64]


@cache
def _normal_logits(rate: float, icc: float) -> tuple[float, float]:
    """Mean and standard deviation of the logit at which the rate has this mean and correlation."""
    z, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()

    def off(parameters: NDArray[np.float64]) -> tuple[float, float]:
        rates = special.expit(parameters[0] + np.exp(parameters[1]) * z)
        mean = float(rates @ weights)
        variance = float((rates - mean) ** 2 @ weights)
        return special.logit(mean) - special.logit(rate), np.log(variance / (icc * rate * (1 - rate)))

    mean, log_spread = optimize.fsolve(off, [special.logit(rate), 0.5])
    return float(mean), float(np.exp(log_spread))


def question_rates(law: str, rate: float, icc: float, normal: Counts) -> Counts:
    """Rates of questions, from standard normal values."""
    if law == "logit-normal":
        mean, spread = _normal_logits(rate, icc)
        return np.asarray(special.expit(mean + spread * normal))
    size = 1 / icc - 1
    grid = np.linspace(-8, 8, 8001)
    quantiles = stats.beta.ppf(stats.norm.cdf(grid), rate * size, (1 - rate) * size)
    return np.interp(normal, grid, quantiles)


def _totals(rng: np.random.Generator, shape: tuple[int, ...], unbalanced: bool) -> Counts:
    if not unbalanced:
        return np.full(shape, float(ANSWERS))
    return rng.choice([20.0, ANSWERS, 80.0], shape)


def old_rate_intervals(top: Counts, bottom: Counts) -> tuple[Counts, Counts]:
    """Percentiles over resampled questions, widened to Wilson's below five questions or where they have no width."""
    weights = bootstrap_weights(top.shape[1], resamples=OLD_RESAMPLES)
    low, high = np.quantile((top @ weights.T) / (bottom @ weights.T), [0.025, 0.975], axis=1)
    wide = np.flatnonzero((low == high) | (top.shape[1] < 5))
    for i in wide:
        wilson = wilson_interval(round(top[i].sum()), round(bottom[i].sum()))
        low[i], high[i] = min(low[i], wilson.low), max(high[i], wilson.high)
    return low, high


def _given(bounds: tuple[Counts, Counts], counts: Counts) -> tuple[Counts, Counts]:
    """The package's own refusal, which stands before its bounds."""
    return bounds if counts.shape[-1] >= FEWEST_QUESTIONS else (np.full_like(bounds[0], np.nan),) * 2


def rates(
    rng: np.random.Generator, n_datasets: int, law: str, questions: int, rate: float, icc: float, unbalanced: bool
) -> Outcomes:
    drawn = question_rates(law, rate, icc, rng.standard_normal((n_datasets, questions)))
    totals = _totals(rng, drawn.shape, unbalanced)
    hits = rng.binomial(totals.astype(int), drawn).astype(float)
    return Outcomes(
        np.full(n_datasets, rate), *old_rate_intervals(hits, totals), *_given(rate_bounds(hits, totals), hits)
    )


def two_arms(
    rng: np.random.Generator,
    n_datasets: int,
    law: str,
    questions: int,
    arms: tuple[float, float],
    icc: float,
    correlation: float,
    compared: str,
) -> Outcomes:
    """compared: difference (first minus second) or transfer (1 - first / second: EM after and before)."""
    first = rng.standard_normal((n_datasets, questions))
    second = correlation * first + np.sqrt(1 - correlation**2) * rng.standard_normal(first.shape)
    totals = _totals(rng, first.shape, False)
    a, b = (
        rng.binomial(ANSWERS, question_rates(law, rate, icc, normal)).astype(float)
        for rate, normal in zip(arms, (first, second), strict=True)
    )
    weights = bootstrap_weights(questions, resamples=OLD_RESAMPLES)
    resampled = [(x @ weights.T) / (totals @ weights.T) for x in (a, b)]
    counts, answers = np.stack([a, b]), np.stack([totals, totals])
    if compared == "difference":
        old = np.quantile(resampled[0] - resampled[1], [0.025, 0.975], axis=1)
        low, high, rare = difference_bounds(counts, answers)
        new = _given((low, high), counts)
        return Outcomes(np.full(n_datasets, arms[0] - arms[1]), old[0], old[1], *new, conservative=rare)
    usable = resampled[1] > 0
    reduction = np.where(usable, 1 - resampled[0] / np.where(usable, resampled[1], 1), np.nan)
    few = usable.mean(1) < 0.95
    reduction[few] = 0
    old = np.nanquantile(reduction, [0.025, 0.975], axis=1)
    old[:, few] = np.nan
    low, high, rare = ratio_bounds(counts, answers)
    low, high = _given((low, high), counts)
    truth = np.full(n_datasets, 1 - arms[0] / arms[1])
    return Outcomes(truth, old[0], old[1], 1 - high, 1 - low, conservative=rare)


def _scenarios() -> Iterator[Scenario]:
    laws = ("beta", "logit-normal")
    for questions in (2, 4, 8, 20, 40):
        for law in laws:
            for icc in (0.1, 0.4):
                for rate in (0.02, 0.1, 0.4, 0.9):
                    for unbalanced in (False, True) if questions in (8, 20) else (False,):
                        setting = f"{law}, 20 to 80 answers" if unbalanced else law
                        draw = partial(rates, law=law, questions=questions, rate=rate, icc=icc, unbalanced=unbalanced)
                        yield Scenario("rate", setting, questions, draw, icc, rate)
    pairs: dict[str, Any] = {
        "difference": ((0.4, 0.1), (0.4, 0.4), (0.1, 0.1), (0.4, 0.02), (0.1, 0.02), (0.02, 0.02)),
        "transfer": ((0.1, 0.4), (0.4, 0.4), (0.02, 0.4), (0.1, 0.1), (0.02, 0.1)),
    }
    for compared, arms in pairs.items():
        for questions in (2, 4, 8, 20, 40):
            for law in laws:
                for icc in (0.1, 0.4):
                    for two in arms:
                        for correlation in (0.0, 0.8):
                            if questions != 8 and correlation == 0:
                                continue
                            draw = partial(
                                two_arms,
                                law=law,
                                questions=questions,
                                arms=two,
                                icc=icc,
                                correlation=correlation,
                                compared=compared,
                            )
                            setting = f"{law}, {two[0]:g} and {two[1]:g}, correlated {correlation:g}"
                            yield Scenario(compared, setting, questions, draw, icc, min(two))


SCENARIOS: Final = tuple(_scenarios())
