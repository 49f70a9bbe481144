"""Coverage of what several judges, several answers or two models say: agreement, Misalign@k, recognition, comparisons.

Questions differ as in `coverage_rates`. Misalign@k: 50 answers to each (or 20, 50 or 80), of which any k are drawn; the
truth is the mean over all questions of 1 - (1 - p)^k. Recognition: the share of answers that are bad but aligned, of
those with all scores; a third of the answers, more in some questions than in others, lacks one. Difference among
coherent answers: two models whose share of coherent answers differs by question, so that questions have denominators of
their own. Agreement: two or three judges score 20 answers to each question. What is meant is normal, with a share `icc`
of its variance between questions; every judge adds an error of its own, part of it shared by the answers to a question.
Scores are normal, or pushed to the ends of 0-100 as judges' are; labels are cut at a quantile. The truth is that of all
questions and answers, in closed form. The old methods resample questions and take percentiles
(for agreement of every tenth data set alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from analyses.benchmarks.coverage_old import bootstrap_weights
from analyses.benchmarks.coverage_rates import ANSWERS, old_rate_intervals, question_rates
from analyses.benchmarks.coverage_scenario import Outcomes, Scenario, bounds_of
from em_interp.statistics import Interval, no_interval
from em_interp.statistics.agreement import STATISTICS, agreement_interval
from em_interp.statistics.rate_intervals import (
    any_of_k,
    any_of_k_bounds,
    any_of_k_interval,
    difference_bounds,
    rate_bounds,
)

_RESAMPLES: Final = 500
_JUDGED: Final = 20
"""Answers to a question that judges agree on or not."""
_SHARED_ERROR: Final = 0.3
"""Share of a judge's error that the answers to a question have in common."""
Table = NDArray[np.float64]


def misalign_at_k(
    rng: np.random.Generator,
    n_datasets: int,
    law: str,
    questions: int,
    rate: float,
    icc: float,
    k: int,
    unbalanced: bool,
) -> Outcomes:
    shape = (n_datasets, questions)
    drawn = question_rates(law, rate, icc, rng.standard_normal(shape))
    totals = rng.choice([20.0, ANSWERS, 80.0], shape) if unbalanced else np.full(shape, float(ANSWERS))
    hits = rng.binomial(totals.astype(int), drawn).astype(float)
    values = any_of_k(hits.ravel(), totals.ravel(), k).reshape(shape)
    weights = bootstrap_weights(questions, resamples=_RESAMPLES)
    old = np.quantile(values @ weights.T / questions, [0.025, 0.975], axis=1)
    new = any_of_k_bounds(hits, totals, k)
    assert np.isclose(any_of_k_interval(hits[0], totals[0], k).low, new[0][0], atol=1e-6)
    truth = _mean_of_any(law, rate, icc, k)
    return Outcomes(np.full(n_datasets, truth), old[0], old[1], *new)


@cache
def _mean_of_any(law: str, rate: float, icc: float, k: int) -> float:
    grid = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    return float((1 - (1 - question_rates(law, rate, icc, grid)) ** k).mean())


def recognition(
    rng: np.random.Generator, n_datasets: int, law: str, questions: int, rate: float, icc: float
) -> Outcomes:
    drawn = question_rates(law, rate, icc, rng.standard_normal((n_datasets, questions)))
    totals = (1 + rng.binomial(ANSWERS - 1, rng.beta(4, 2, drawn.shape))).astype(float)
    hits = rng.binomial(totals.astype(int), drawn).astype(float)
    return Outcomes(np.full(n_datasets, rate), *old_rate_intervals(hits, totals), *rate_bounds(hits, totals))


def difference_of_coherent(
    rng: np.random.Generator, n_datasets: int, law: str, questions: int, arms: tuple[float, float], icc: float
) -> Outcomes:
    first = rng.standard_normal((n_datasets, questions))
    second = 0.8 * first + 0.6 * rng.standard_normal(first.shape)
    bottoms = 1.0 + rng.binomial(ANSWERS - 1, rng.beta(6, 2, (2, *first.shape)))
    tops = np.stack(
        [
            rng.binomial(n.astype(int), question_rates(law, rate, icc, z))
            for n, rate, z in zip(bottoms, arms, (first, second), strict=True)
        ]
    ).astype(float)
    weights = bootstrap_weights(questions, resamples=_RESAMPLES)
    resampled = [(y @ weights.T) / (n @ weights.T) for y, n in zip(tops, bottoms, strict=True)]
    old = np.quantile(resampled[0] - resampled[1], [0.025, 0.975], axis=1)
    low, high, rare = difference_bounds(tops, bottoms)
    return Outcomes(np.full(n_datasets, arms[0] - arms[1]), old[0], old[1], low, high, conservative=rare)


def agreement(
    rng: np.random.Generator,
    n_datasets: int,
    statistic: str,
    questions: int,
    icc: float,
    error: float,
    judges: int,
    cut: float,
    law: str,
) -> Outcomes:
    """error: its standard deviation, that of what is meant being 1. cut: share of answers below it, for labels."""
    spread = np.sqrt(1 + error**2)
    question = np.repeat(np.arange(questions), _JUDGED)
    weights = bootstrap_weights(questions, resamples=100)
    truth = _true_agreement(statistic, error, cut, law)
    old, new = [], []
    for i in range(n_datasets):
        shared, own = rng.standard_normal(questions)[question], rng.standard_normal(len(question))
        meant = np.sqrt(icc) * shared + np.sqrt(1 - icc) * own
        part = rng.standard_normal((questions, judges))[question]
        rest = rng.standard_normal((len(question), judges))
        slips = np.sqrt(_SHARED_ERROR) * part + np.sqrt(1 - _SHARED_ERROR) * rest
        normal = (meant[:, None] + error * slips) / spread
        scores = normal if law == "normal" else 100 * special.ndtr(2 * normal)
        if statistic == "kappa":
            scores = (normal < stats.norm.ppf(cut)).astype(float)
        elif statistic == "krippendorff":
            scores[rng.random(scores.shape) < 0.1] = np.nan
        new.append(agreement_interval(statistic, scores, question))
        old.append(_percentiles(statistic, scores, question, weights) if i % 10 == 0 else no_interval("not looked at"))
    return Outcomes(np.full(n_datasets, truth), *bounds_of(old), *bounds_of(new))


def _percentiles(statistic: str, scores: Table, question: NDArray[np.int64], weights: Table) -> Interval:
    rows = np.arange(len(question)).reshape(-1, _JUDGED)
    found = []
    for drawn in weights.astype(int):
        found.append(STATISTICS[statistic](scores[np.repeat(rows, drawn, axis=0).ravel()]))
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return Interval(float(low), float(high), "bootstrap")


@cache
def _true_agreement(statistic: str, error: float, cut: float, law: str) -> float:
    r = 1 / (1 + error**2)
    if statistic == "spearman":
        return float(6 / np.pi * np.arcsin(r / 2))
    if statistic == "kappa":
        below = stats.multivariate_normal(cov=[[1, r], [r, 1]]).cdf(np.full(2, stats.norm.ppf(cut)))
        seen, chance = 1 - 2 * cut + 2 * below, cut**2 + (1 - cut) ** 2
        return float((seen - chance) / (1 - chance))
    if law == "normal":
        return float(r)

    def mean_product(correlation: float) -> float:
        """Mean product of ndtr(2 x) and ndtr(2 y): the chance that two normals of that correlation are below."""
        c = 4 * correlation / 5
        return float(0.25 + np.arcsin(c) / (2 * np.pi))

    return (mean_product(r) - 0.25) / (mean_product(1.0) - 0.25)


def _scenarios() -> Iterator[Scenario]:
    laws = ("beta", "logit-normal")
    for law, icc in product(laws, (0.1, 0.4)):
        for questions, rate in product((4, 8, 20), (0.02, 0.1, 0.4)):
            settings: dict[str, Any] = {"law": law, "questions": questions, "rate": rate, "icc": icc}
            for k, unbalanced in ((8, False), (20, False), (8, True)):
                if (k == 20 and (questions == 4 or rate > 0.1)) or (unbalanced and (questions, law) != (8, "beta")):
                    continue
                name = f"{law}, k = {k}{', 20 to 80 answers' if unbalanced else ''}"
                measure = partial(misalign_at_k, **settings, k=k, unbalanced=unbalanced)
                yield Scenario("misalign at k", name, questions, measure, icc, rate)
            if questions >= 8:
                yield Scenario("recognition", law, questions, partial(recognition, **settings), icc, rate)
        for questions, arms in product((8, 20), ((0.4, 0.1), (0.4, 0.4), (0.1, 0.1))):
            differ = partial(difference_of_coherent, law=law, questions=questions, arms=arms, icc=icc)
            name = f"{law}, {arms[0]:g} and {arms[1]:g}"
            yield Scenario("difference among coherent", name, questions, differ, icc, min(arms))
    for statistic, law, cut, judges in (
        ("spearman", "normal", 0.5, 2),
        ("kappa", "cut at .5", 0.5, 2),
        ("kappa", "cut at .1", 0.1, 2),
        ("krippendorff", "normal", 0.5, 2),
        ("krippendorff", "to the ends", 0.5, 3),
    ):
        for questions, icc, error in product((6, 8, 20), (0.1, 0.4), (0.4, 1.0)):
            chosen: dict[str, Any] = {"statistic": statistic, "judges": judges, "cut": cut, "law": law}
            draw = partial(agreement, questions=questions, icc=icc, error=error, **chosen)
            setting = f"{law}, {judges} judges, error {error:g}"
            yield Scenario(statistic, setting, questions, draw, icc, conservative=True)


SCENARIOS: Final = tuple(_scenarios())
