"""Coverage of the intervals of loss gaps, of influence and its ratio, of the stability gap, and of means over seeds.

loss gap: a question's gap in nats per token is normal (either solution may be ahead) or log-normal (losses have a heavy
right tail, of log-sd `SKEWED`), with a share `icc` of the variance between questions; five responses a question, of
log-normal length. influence: KL per token log-normal over documents of log-normal length (log-sd 1); its ratio: two
such KLs over the same documents, whose logarithms correlate by .8. stability gap: increases of two solutions over
questions, seeds and both. The truth is the mean over all clusters and seeds, weighted by tokens; lengths and what is
measured are drawn apart.. The old methods take percentiles over resampled
clusters (and seeds).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from analyses.benchmarks.coverage_old import bootstrap_weights
from analyses.benchmarks.coverage_scenario import Outcomes, Scenario, bounds_of
from em_interp.statistics import clustered_interval, crossed_interval, t_interval

SKEWED: Final = 0.8
HEAVY: Final = 1.2
_RESPONSES: Final = 5
_RESAMPLES: Final = 2_000
Table = NDArray[np.float64]


def _of_ratio(truth: float, top: Table, bottom: Table, positive: bool = False, by_size: bool = False) -> Outcomes:
    weights = bootstrap_weights(top.shape[1], resamples=_RESAMPLES)
    old = np.quantile((top @ weights.T) / (bottom @ weights.T), [0.025, 0.975], axis=1)
    new = bounds_of(
        clustered_interval(y, n, positive=positive, by_size=by_size) for y, n in zip(top, bottom, strict=True)
    )
    return Outcomes(np.full(len(top), truth), old[0], old[1], *new)


def loss_gaps(rng: np.random.Generator, n_datasets: int, questions: int, icc: float, law: str) -> Outcomes:
    shape = (n_datasets, questions, _RESPONSES)
    tokens = rng.lognormal(np.log(60), 0.5, shape).round() + 1
    effect = np.sqrt(icc) * rng.standard_normal((*shape[:2], 1)) + np.sqrt(1 - icc) * rng.standard_normal(shape)
    spread = {"normal": 0.0, "skewed": SKEWED, "heavy": HEAVY}[law]
    gaps = 0.1 * np.exp(spread * effect) if spread else 0.1 + 0.15 * effect
    return _of_ratio(0.1 * np.exp(spread**2 / 2), (tokens * gaps).sum(2), tokens.sum(2))


def influence(rng: np.random.Generator, n_datasets: int, documents: int, spread: float, ratio: bool) -> Outcomes:
    tokens = rng.lognormal(np.log(200), 1.0, (n_datasets, documents)).round() + 2
    logs = rng.standard_normal((2, n_datasets, documents))
    logs[1] = 0.8 * logs[0] + 0.6 * logs[1]
    kl = np.exp(spread * logs) * tokens
    if ratio:
        return _of_ratio(3.0, 3 * kl[0], kl[1], positive=True, by_size=True)
    return _of_ratio(float(np.exp(spread**2 / 2)), kl[0], tokens, positive=True)


def stability_gaps(rng: np.random.Generator, n_datasets: int, questions: int, seeds: int, icc: float) -> Outcomes:
    """icc: the share of the variance (of logarithms) between questions that all seeds have in common."""
    tokens = rng.lognormal(4, 0.5, (n_datasets, questions))
    gain = 0.5 * tokens * rng.lognormal(0, 0.5, tokens.shape)
    rises = []
    for share in (0.3, 0.6):
        parts = [
            spread * rng.standard_normal((n_datasets, *shape))
            for spread, shape in (
                (0.2, (1, seeds)),
                (0.5 * np.sqrt(icc), (questions, 1)),
                (0.5 * np.sqrt(1 - icc), (questions, seeds)),
            )
        ]
        logs = parts[0] + parts[1] + parts[2] - (0.2**2 + 0.5**2) / 2
        rises.append(share * gain[..., None] * np.exp(logs))
    rise = rises[1] - rises[0]
    whole = gain.sum(1)[:, None, None]
    relative = rise.sum(1, keepdims=True) / whole
    values = 100 * (relative + questions * (rise - relative * gain[..., None]) / whole)
    of_questions = bootstrap_weights(questions, resamples=_RESAMPLES, seed=(0, 0))
    of_seeds = bootstrap_weights(seeds, resamples=_RESAMPLES, seed=(0, 1)) / seeds
    top = np.einsum("dqs,rq,rs->dr", rise, of_questions, of_seeds, optimize=True)
    old = np.quantile(100 * top / (gain @ of_questions.T), [0.025, 0.975], axis=1)
    return Outcomes(np.full(n_datasets, 30.0), old[0], old[1], *bounds_of(map(crossed_interval, values)))


def means_over_seeds(rng: np.random.Generator, n_datasets: int, seeds: int, law: str) -> Outcomes:
    """Student's before and now: kept where it is exact."""
    values = rng.standard_normal((n_datasets, seeds))
    if law == "skewed":
        values = np.exp(0.5 * values)
    new = bounds_of(map(t_interval, values))
    return Outcomes(np.full(n_datasets, np.exp(0.125) if law == "skewed" else 0.0), *new, *new)


def _scenarios() -> Iterator[Scenario]:
    for questions in (4, 6, 8, 20, 40):
        for icc in (0.1, 0.4, 0.8):
            for law in ("normal", "skewed", "heavy"):
                draw = partial(loss_gaps, questions=questions, icc=icc, law=law)
                yield Scenario("loss gap", law, questions, draw, icc)
    for ratio in (False, True):
        for documents in (6, 10, 30, 100):
            for spread in (0.5, SKEWED, HEAVY):
                measure = partial(influence, documents=documents, spread=spread, ratio=ratio)
                name = "influence ratio" if ratio else "influence"
                yield Scenario(name, f"log-sd {spread:g} over documents", documents, measure)
    for questions in (4, 8, 20, 40):
        for seeds in (3, 8):
            for icc in (0.1, 0.4):
                turn = partial(stability_gaps, questions=questions, seeds=seeds, icc=icc)
                yield Scenario("stability gap", f"{seeds} perturbation seeds", questions, turn, icc)
    for law in ("normal", "skewed"):
        for seeds in (3, 8):
            yield Scenario("mean over training seeds", law, seeds, partial(means_over_seeds, seeds=seeds, law=law))


SCENARIOS: Final = tuple(_scenarios())
