"""The mean rate over questions, from counts: the posterior under two models of how questions differ, averaged.

Beta-binomial, and logistic-normal (a mixed logistic model): few questions do not tell which of them holds, and each
alone is too sure of itself where the other does (`analyses/benchmarks/coverage_rates.py`). Priors: Jeffreys' of the
mean, Beta(1/2, 1/2), as in Brown, Cai and DasGupta (2001); uniform of the intra-class correlation, which for the
logistic model is that of the latent scale, s^2 / (s^2 + pi^2 / 3); both models alike. Everything is integrated on fixed
grids, so that a question's likelihood is computed once for its counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float
from scipy import special
from scipy.interpolate import CubicSpline

_LOGITS: Final = np.linspace(-20, 20, 201)
_LOG_PRIOR: Final = (special.log_expit(_LOGITS) + special.log_expit(-_LOGITS)) / 2  # Jeffreys', as a density of logits
_NODES: Final = (np.polynomial.legendre.leggauss(24)[0] + 1) / 2
_LOG_WEIGHTS: Final = np.log(np.tile(np.polynomial.legendre.leggauss(24)[1], 2) / 4)  # two models of equal weight
_MOST: Final = 4096
"""More answers to one question count as so many: its own rate is then known, and the grid need not be finer."""


_CHUNK: Final = 256  # data sets at once: some 20 MB


def posterior_quantiles(
    successes: Float[np.ndarray, "data questions"],
    totals: Float[np.ndarray, "data questions"],
    levels: tuple[float, ...],
) -> Float[np.ndarray, "data level"]:
    """Quantiles of the posterior of the mean rate over all questions that might have been asked, for each data set.

    successes of totals (at least one) for each question. Answers to a question are independent given its rate.
    """
    return np.array(
        [_quantiles(special.logsumexp(log, axis=0) + _LOG_PRIOR, levels) for log in _log_likelihoods(successes, totals)]
    )


def posterior_quantiles_of_any(
    successes: Float[np.ndarray, "data questions"],
    totals: Float[np.ndarray, "data questions"],
    k: int,
    levels: tuple[float, ...],
) -> Float[np.ndarray, "data level"]:
    """The same of the mean over questions of 1 - (1 - rate)^k: that any of k answers to a question is a success."""
    any_of, found = CubicSpline(_LOGITS, _any_of(k), axis=1), []
    for log in _log_likelihoods(successes, totals):
        log = log + _LOG_PRIOR
        seen = np.flatnonzero((log > log.max() - 40).any(0))
        fine = np.linspace(_LOGITS[max(0, seen[0] - 1)], _LOGITS[min(len(_LOGITS) - 1, seen[-1] + 1)], 401)
        mass = np.exp(CubicSpline(_LOGITS, log, axis=1)(fine) - log.max()).ravel()
        values = any_of(fine).ravel()
        order = np.argsort(values)
        upto = np.cumsum(mass[order]) - mass[order] / 2
        found.append(np.interp(levels, upto / mass.sum(), values[order]))
    return np.array(found).clip(0, 1)


@lru_cache(maxsize=16)
def _any_of(k: int) -> Float[np.ndarray, "model_and_node logit"]:
    """Mean of 1 - (1 - rate)^k over questions, for each model, correlation and mean."""
    size = (1 / _NODES - 1)[:, None]
    a, b = special.expit(_LOGITS) * size, special.expit(-_LOGITS) * size
    centre, spread = _normal_parameters()
    z, w = np.polynomial.hermite_e.hermegauss(100)
    logits = centre[..., None] + spread[:, None, None] * z
    none = np.stack(
        [
            np.exp(special.betaln(a, b + k) - special.betaln(a, b)),
            np.exp(k * special.log_expit(-logits)) @ (w / w.sum()),
        ]
    )
    return 1 - none.reshape(-1, len(_LOGITS))


def _log_likelihoods(
    successes: Float[np.ndarray, "data questions"], totals: Float[np.ndarray, "data questions"]
) -> Iterator[Float[np.ndarray, "model_and_node logit"]]:
    """Of each data set, for each model, correlation and mean, with the weights of models and correlations."""
    shrink = np.minimum(1, _MOST / totals)
    pairs, which = np.unique(
        np.stack([successes * shrink, totals * shrink], axis=-1).reshape(-1, 2), axis=0, return_inverse=True
    )
    which = which.reshape(totals.shape)
    table = np.stack([_log_likelihood(float(y), float(n)).ravel() for y, n in pairs])
    for start in range(0, len(totals), _CHUNK):
        rows = which[start : start + _CHUNK]
        times = np.stack([np.bincount(row, minlength=len(pairs)) for row in rows]).astype(float)
        yield from (times @ table).reshape(len(rows), -1, len(_LOGITS)) + _LOG_WEIGHTS[:, None]


def _quantiles(log: Float[np.ndarray, " logit"], levels: tuple[float, ...]) -> Float[np.ndarray, " level"]:
    """From the logarithm of a density at `_LOGITS`."""
    seen = np.flatnonzero(log > log.max() - 40)
    ends = _LOGITS[max(0, seen[0] - 1)], _LOGITS[min(len(log) - 1, seen[-1] + 1)]
    fine = np.linspace(*ends, 2001)
    density = np.exp(CubicSpline(_LOGITS, log)(fine) - log.max())
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.asarray(special.expit(np.interp(levels, mass / mass[-1], fine)))


@lru_cache(maxsize=512)
def _log_likelihood(y: float, n: float) -> Float[np.ndarray, "2 node logit"]:
    """Of y successes in n answers to one question, for each model, correlation and mean; less log(n over y)."""
    return np.stack([_beta_binomial(y, n), _logistic_normal(y, n)])


def _beta_binomial(y: float, n: float) -> Float[np.ndarray, "node logit"]:
    size = (1 / _NODES - 1)[:, None]
    a, b = special.expit(_LOGITS) * size, special.expit(-_LOGITS) * size
    return np.asarray(special.betaln(y + a, n - y + b) - special.betaln(a, b))


def _logistic_normal(y: float, n: float) -> Float[np.ndarray, "node logit"]:
    step = 0.125 if n <= 256 else 0.0625 if n <= 1024 else 0.03125  # at most the likelihood's own spread
    x, weights = _normal_weights(step)
    log = y * special.log_expit(x) + (n - y) * special.log_expit(-x)
    return np.asarray(np.log(np.maximum(weights @ np.exp(log - log.max()), 1e-300)) + log.max())


@lru_cache(maxsize=2)
def _normal_weights(step: float) -> tuple[Float[np.ndarray, " x"], Float[np.ndarray, "node logit x"]]:
    """Weights that take a function's values at x to its mean over normal logits, exact where it is linear between."""
    x = np.arange(-24, 24 + step / 2, step)
    centre, spread = _normal_parameters()
    weights = np.empty((*centre.shape, len(x)))
    for node, s in enumerate(spread):
        u = (x - centre[node][:, None]) / s
        below = s * (u * special.ndtr(u) + np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi))  # integral of P(X < x)
        slope = np.diff(below, axis=1) / step
        weights[node] = np.diff(slope, axis=1, prepend=0, append=1)
    return x, weights.clip(0)


@lru_cache(maxsize=1)
def _normal_parameters() -> tuple[Float[np.ndarray, "node logit"], Float[np.ndarray, " node"]]:
    """Mean and standard deviation of the logit for each correlation and mean rate."""
    spread = np.sqrt(_NODES / (1 - _NODES) * np.pi**2 / 3)
    z, w = np.polynomial.hermite_e.hermegauss(100)
    centre = np.empty((len(_NODES), len(_LOGITS)))
    for node, s in enumerate(spread):
        m = np.linspace(-25 - 7 * s, 25 + 7 * s, 801)
        log = [special.logsumexp(special.log_expit(sign * (m[:, None] + s * z)), b=w, axis=1) for sign in (1, -1)]
        centre[node] = np.interp(_LOGITS, log[0] - log[1], m)
    return centre, spread
