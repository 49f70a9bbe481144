"""How far a direction can be trusted: split halves, and separation of responses that it was not made from.

Both split the responses at random into halves, whole questions at a time (answers to one question are not
independent), and use one Gram matrix a layer: means, cosines and projections are all linear in the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from tqdm.auto import tqdm

from em_interp.arguments import check_seed
from em_interp.directions.extraction import Contrast
from em_interp.errors import DirectionError, StatisticsError
from em_interp.statistics import LEVEL, auroc
from em_interp.statistics.jackknife import chance_interval, clustered_auc, sides_of

BY: Final = ("question", "response")
"""What is split or resampled: questions with all their responses, or responses alone."""
FEWEST: Final = 4
"""Halves of fewer than two questions (or responses) have no spread to estimate anything from."""
_ATTEMPTS: Final = 1000


def split_half(
    contrast: Contrast,
    *,
    by: str = "question",
    pooling: str = "tokens",
    level: float = LEVEL,
    splits: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosine of the directions made from two halves of the responses, one row a layer.

    `cosine` is the mean over random splits into halves. `low` and `high` are that mean plus and minus bootstrap
    standard errors on Fisher's arctanh scale, for which questions are drawn with replacement within each half. (A
    percentile interval would lie below the estimate: drawing with replacement adds noise to both halves.) The interval
    is conservative: at a level of .95 it covers .97 to 1. by: what is split and drawn, whole questions or single
    responses. Columns layer, cosine, low, high, splits, by.

    Raises StatisticsError where there is too little to split, ActivationError where per-response means were not
    kept, DirectionError where a half has no direction.
    """
    halves = _Halves.of(contrast, by, pooling, splits, seed)
    z = float(stats.norm.ppf((1 + level) / 2))
    rows = []
    for layer, gram in _grams(contrast, "split halves"):
        cosines = _cosines(gram, halves.coefficients(halves.first), halves.coefficients(halves.second))
        drawn = _cosines(gram, halves.coefficients(halves.drawn_first), halves.coefficients(halves.drawn_second))
        if not np.isfinite(cosines).all():
            raise DirectionError(f"layer {layer}: a half of the responses has no direction (both sides are the same).")
        center = float(_fisher(np.asarray(cosines.mean())))
        error = z * np.nanstd(_fisher(drawn) - _fisher(cosines), ddof=1)
        rows.append((layer, float(cosines.mean()), float(np.tanh(center - error)), float(np.tanh(center + error))))
    return pd.DataFrame(rows, columns=["layer", "cosine", "low", "high"]).assign(splits=splits, by=by)


def separation(
    contrast: Contrast,
    *,
    by: str = "question",
    pooling: str = "tokens",
    level: float = LEVEL,
    splits: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of held-out responses projected on the direction, one row a layer.

    Each half's per-response means are projected on the direction made from the other half; `auroc` is the mean over
    both and over random splits: the probability that a misaligned response lies further along than an aligned one
    (.5 is chance). `low` and `high`: `jackknife.chance_interval` over questions (left out of the direction and of
    what is held out) of what a direction made from half of the questions reaches on others; it is conservative.
    Columns layer, auroc, low, high, interval, splits, by.

    Errors as `split_half`.
    """
    halves = _Halves.of(contrast, by, pooling, splits, seed)
    clusters, label = halves.clusters, np.repeat([1, 0], [len(contrast.positive), len(contrast.negative)])
    made = ((halves.first, halves.second), (halves.second, halves.first))
    rows = []
    for layer, gram in _grams(contrast, "separation"):
        values = np.zeros(splits)
        changes = np.zeros((splits, int(clusters.max()) + 1))  # by leaving out a question, from the fit or the scores
        for fitted, scored in made:
            for r in range(splits):
                own, inside = scored[r] > 0, np.unique(clusters[fitted[r] > 0])
                without_one = np.concatenate([fitted[r][None], fitted[r] * (clusters != inside[:, None])])
                scores = gram[own] @ halves.coefficients(without_one).T
                numbers, codes = np.unique(clusters[own], return_inverse=True)
                auc, without = clustered_auc(scores[:, 0], label[own], codes)
                plus, minus = scores[label[own] == 1, 1:], scores[label[own] == 0, 1:]
                refitted = [_auroc(*pair) for pair in zip(plus.T, minus.T, strict=True)]
                values[r] += auc / 2
                changes[r, numbers] += (without - auc) / 2
                changes[r, inside] += (np.array(refitted) - auc) / 2
        value = float(values.mean())
        known = np.isfinite(changes)
        change = np.where(known.any(0), np.where(known, changes, 0).sum(0) / known.sum(0).clip(1), np.nan)
        found = chance_interval(value, (value + change).clip(0, 1), sides_of(label, clusters), level=level)
        rows.append((layer, value, found.low, found.high, found.method))
    return pd.DataFrame(rows, columns=["layer", "auroc", "low", "high", "interval"]).assign(splits=splits, by=by)


@dataclass(frozen=True)
class _Halves:
    """How often each response counts in each half of each split: once or not, and drawn with replacement.

    Responses are the positive ones, then the negative ones.
    """

    first: Float[np.ndarray, "splits n"]
    second: Float[np.ndarray, "splits n"]
    drawn_first: Float[np.ndarray, "splits n"]
    drawn_second: Float[np.ndarray, "splits n"]
    clusters: Int[np.ndarray, " n"]
    sizes: Float[np.ndarray, " n"]
    n_positive: int

    @classmethod
    def of(cls, contrast: Contrast, by: str, pooling: str, splits: int, seed: int) -> _Halves:
        if by not in BY:
            raise StatisticsError(f"by={by!r}: split by {' or '.join(BY)}.")
        if splits < 2:
            raise StatisticsError(f"{splits} splits; an interval needs at least two, and better 200.")
        sides = (contrast.positive, contrast.negative)
        n = len(contrast.positive)
        if by == "question":
            names: list[object] = [question for side in sides for question in side.questions]
        else:
            own = [0, 0] if contrast.paired else [0, 1]
            names = [(s, i) for s, side in zip(own, sides, strict=True) for i in range(len(side))]
        clusters = np.unique([str(name) for name in names], return_inverse=True)[1]
        k = int(clusters.max()) + 1
        if k < FEWEST:
            raise StatisticsError(
                f"{k} different {by}s, and splitting whole {by}s in two needs at least {FEWEST}. "
                + ("Pass by='response' to split single responses." if by == "question" else "Give more responses.")
            )
        rng = np.random.default_rng(check_seed(seed))
        parts: tuple[list[np.ndarray], ...] = ([], [], [], [])
        for _ in range(splits):
            order = _until_both(partial(rng.permutation, k), lambda o: (o[: k // 2], o[k // 2 :]), clusters, n)
            for half, (plain, drawn) in zip((order[: k // 2], order[k // 2 :]), (parts[:2], parts[2:]), strict=True):
                again = _until_both(partial(_redrawn, rng, half), lambda d: (d,), clusters, n)
                plain.append(np.bincount(half, minlength=k)[clusters].astype(float))
                drawn.append(np.bincount(again, minlength=k)[clusters].astype(float))
        first, drawn_first, second, drawn_second = (np.stack(part) for part in parts)
        pooled = [side.counts[contrast.scope].double() for side in sides]
        sizes = torch.cat(pooled).numpy() if pooling == "tokens" else np.ones(len(clusters))
        return cls(first, second, drawn_first, drawn_second, clusters, sizes, n)

    def coefficients(self, weights: Float[np.ndarray, "splits n"]) -> Float[np.ndarray, "splits n"]:
        """The difference of weighted means as a linear combination of responses."""
        sized = weights * self.sizes
        plus, minus = sized[:, : self.n_positive], sized[:, self.n_positive :]
        with np.errstate(invalid="ignore"):
            return np.concatenate([plus / plus.sum(1, keepdims=True), -minus / minus.sum(1, keepdims=True)], axis=1)


def _auroc(plus: Float[np.ndarray, " p"], minus: Float[np.ndarray, " m"]) -> float:
    """NaN where the direction is: a half that loses its only question of a side."""
    return auroc(plus, minus) if np.isfinite(plus).all() else float("nan")


def _redrawn(rng: np.random.Generator, half: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    return half[rng.integers(len(half), size=len(half))]


def _until_both(
    draw: Callable[[], np.ndarray],
    parts: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    clusters: Int[np.ndarray, " n"],
    n_positive: int,
) -> np.ndarray:
    """Draw until every part holds responses of both sides."""
    plus, minus = set(clusters[:n_positive].tolist()), set(clusters[n_positive:].tolist())
    for _ in range(_ATTEMPTS):
        drawn = draw()
        if all(plus & set(part.tolist()) and minus & set(part.tolist()) for part in parts(drawn)):
            return drawn
    raise StatisticsError(
        f"no split into halves with both misaligned and aligned responses in each was found in {_ATTEMPTS} attempts. "
        "Too few questions have them: give more responses, or pass by='response'."
    )


def _grams(contrast: Contrast, doing: str) -> Iterator[tuple[int, Float[np.ndarray, "n n"]]]:
    """(layer, inner products of all responses, positive ones first, about their common mean), in float64."""
    layers = contrast.direction().layers
    for layer in tqdm(layers, desc=doing, leave=False, disable=len(layers) < 2):
        sides = (side.each(contrast.scope, layer).double() for side in (contrast.positive, contrast.negative))
        rows = torch.cat(list(sides))
        rows -= rows.mean(0)
        yield layer, (rows @ rows.T).numpy()


def _cosines(
    gram: Float[np.ndarray, "n n"], a: Float[np.ndarray, "splits n"], b: Float[np.ndarray, "splits n"]
) -> Float[np.ndarray, " splits"]:
    ga, gb = a @ gram, b @ gram
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ga * b).sum(1) / np.sqrt((ga * a).sum(1).clip(0) * (gb * b).sum(1).clip(0))


def _fisher(cosine: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return np.asarray(np.arctanh(np.clip(cosine, -1 + 1e-12, 1 - 1e-12)))
