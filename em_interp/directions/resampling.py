"""How far a mean-diff direction hangs on the responses it was made from: questions left out, drawn again, permuted.

Works on plain tensors of per-response means, all layers at once: a resample is a weighting of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from em_interp.arguments import check_seed
from em_interp.errors import StatisticsError
from em_interp.statistics.jackknife import sides_of

Weights = NDArray[np.float64]
"""A weight for each response, such as its number of tokens."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """Mean-diff directions under resampled responses and under permuted labels, float32."""

    bootstrap: Float[Tensor, "resamples n_layers d_model"]
    """Responses drawn again with replacement: how the direction varies with the sample."""
    permuted: Float[Tensor, "permutations n_layers d_model"]
    """Labels of the centred responses drawn anew: directions that noise in these activations gives by itself."""
    direction: Float[Tensor, "n_layers d_model"]
    """The difference of means itself."""
    without: Float[Tensor, "questions n_layers d_model"]
    """The same without each question (without each response, where no questions were given): for `jackknife`."""
    sides: Int[np.ndarray, " questions"]
    """1 for questions with positive responses only, 2 with negative ones only, 3 with both."""
    questions: tuple[object, ...] | None
    """What the questions are called. None: single responses, that no other direction is made from."""
    noise_dimensions: Float[np.ndarray, " n_layers"]
    """Participation ratio of the spectrum of the responses about their class's mean: tr(C)^2 / tr(C^2)."""

    def only(self, places: Sequence[int]) -> Resamples:
        """Of these layers, by their place."""
        at = list(places)
        return replace(
            self,
            bootstrap=self.bootstrap[:, at],
            permuted=self.permuted[:, at],
            direction=self.direction[at],
            without=self.without[:, at],
            noise_dimensions=self.noise_dimensions[at],
        )


def resample_direction(
    positive: Float[Tensor, "n_positive n_layers d_model"],
    negative: Float[Tensor, "n_negative _ _"],
    *,
    positive_questions: Sequence[object] | None = None,
    negative_questions: Sequence[object] | None = None,
    positive_weights: Float[np.ndarray, " n_positive"] | None = None,
    negative_weights: Float[np.ndarray, " n_negative"] | None = None,
    resamples: int = 200,
    permutations: int = 200,
    seed: int = 0,
) -> Resamples:
    """Bootstrap and permutation resamples of mean(positive) - mean(negative), from means of single responses.

    For the permutations each class is centred first: else a strong direction would be the main axis of its own null.
    With the questions that the responses answer, whole questions are drawn, and labels are permuted within a question,
    so that neither what is asked nor how often is mistaken for a direction. weights: how much a response counts in the
    means, such as its tokens where the direction is pooled over tokens; by default all the same. Results take
    (resamples + permutations + questions) * n_layers * d_model floats. Raises StatisticsError for fewer than two
    responses a class, NaN, other shapes, or labels that cannot be permuted since each question has one class only.
    """
    if positive.shape[1:] != negative.shape[1:] or min(len(positive), len(negative)) < 2:
        raise StatisticsError(
            f"responses of shapes {tuple(positive.shape)} and {tuple(negative.shape)}: give at least two of each "
            "class, [responses, layers, d_model], of one model."
        )
    if resamples < 2 or permutations < 2:
        raise StatisticsError(f"{resamples} resamples and {permutations} permutations: take at least two of each.")
    both = torch.cat([positive, negative]).detach().float()
    if not bool(torch.isfinite(both).all()):
        raise StatisticsError("NaN or infinite activations among the responses: check what they were computed from.")
    both = both - both.mean(0)  # no difference of means feels it; less is lost to rounding
    label = np.repeat([True, False], [len(positive), len(negative)])
    size = _sizes(positive_weights, negative_weights, len(positive), len(negative))
    question, names = _questions(positive_questions, negative_questions, len(positive), len(negative))
    rng = np.random.default_rng(check_seed(seed))
    drawn = np.stack([_difference(label, size * _drawn(label, question, rng)) for _ in range(resamples)])
    centred = torch.cat([x - x.mean(0) for x in (both[: len(positive)], both[len(positive) :])])
    shuffled = np.stack([_difference(_permuted(label, question, rng), size) for _ in range(permutations)])
    unit = np.arange(len(label)) if question is None else question
    left_out = np.stack([_difference(label, size * (unit != own)) for own in range(int(unit.max()) + 1)])
    return Resamples(
        _weighted(drawn, both),
        _weighted(shuffled, centred),
        _weighted(_difference(label, size)[None], both)[0],
        _weighted(left_out, both),
        sides_of(label.astype(int), unit),
        names,
        np.array([_participation(centred[:, layer]) for layer in range(centred.shape[1])]),
    )


def _participation(centred: Float[Tensor, "n d_model"]) -> float:
    """Pairs of different responses only: the square of one response's norm says little of how many axes there are."""
    n = len(centred)
    gram = (centred @ centred.T).double()
    squares = float((gram**2).sum() - (gram.diagonal() ** 2).sum()) / (n * (n - 1))
    return float((gram.trace() / n) ** 2 / squares) if squares > 0 else float("nan")


def _weighted(weights: Weights, responses: Float[Tensor, "n n_layers d_model"]) -> Float[Tensor, "r n_layers d_model"]:
    drawn = torch.from_numpy(weights).to(responses)
    return einsum(drawn, responses, "resample response, response layer d -> resample layer d")


def _questions(
    positive: Sequence[object] | None, negative: Sequence[object] | None, n_positive: int, n_negative: int
) -> tuple[NDArray[np.int64] | None, tuple[object, ...] | None]:
    if positive is None and negative is None:
        return None, None
    if positive is None or negative is None or (len(positive), len(negative)) != (n_positive, n_negative):
        raise StatisticsError(
            f"questions must be given for all {n_positive} positive and {n_negative} negative responses, or for none."
        )
    numbers = {name: i for i, name in enumerate(dict.fromkeys([*positive, *negative]))}
    found = np.array([numbers[name] for name in (*positive, *negative)], dtype=np.int64)
    mixed = set(found[:n_positive]) & set(found[n_positive:])
    if not mixed:
        raise StatisticsError(
            "each question has responses of one class only, so labels cannot be permuted within a question. "
            "Leave the questions out, and read the null with the topic in mind."
        )
    return found, tuple(numbers)


def _sizes(
    positive: NDArray[np.float64] | None, negative: NDArray[np.float64] | None, n_positive: int, n_negative: int
) -> Weights:
    sides = (
        (positive if positive is not None else np.ones(n_positive)),
        (negative if negative is not None else np.ones(n_negative)),
    )
    both = np.concatenate(sides).astype(float)
    if (len(sides[0]), len(sides[1])) != (n_positive, n_negative) or not (both > 0).all() or np.isinf(both).any():
        raise StatisticsError(
            f"weights must be positive and finite, one for each of {n_positive} positive and {n_negative} negative "
            "responses."
        )
    return both


def _difference(label: NDArray[np.bool_], count: Weights) -> Weights:
    """Weights of mean(label) - mean(not label), where response i counts count[i] times; NaN if a side has none."""
    up, down = np.where(label, count, 0.0), np.where(label, 0.0, count)
    with np.errstate(invalid="ignore"):
        return np.asarray(up / up.sum() - down / down.sum())


def _drawn(label: NDArray[np.bool_], question: NDArray[np.int64] | None, rng: np.random.Generator) -> Weights:
    """How often each response is drawn, with replacement."""
    if question is None:
        count = np.empty(len(label))
        for side in (label, ~label):
            n = int(side.sum())
            count[side] = rng.multinomial(n, np.full(n, 1.0 / n))
        return count
    n = int(question.max()) + 1
    while True:  # a draw without one of the classes has no difference
        count = rng.multinomial(n, np.full(n, 1.0 / n))[question].astype(float)
        if count[label].any() and count[~label].any():
            return np.asarray(count)


def _permuted(
    label: NDArray[np.bool_], question: NDArray[np.int64] | None, rng: np.random.Generator
) -> NDArray[np.bool_]:
    if question is None:
        return rng.permutation(label)
    found = label.copy()
    for q in np.unique(question):
        where = np.flatnonzero(question == q)
        found[where] = rng.permutation(label[where])
    return found
