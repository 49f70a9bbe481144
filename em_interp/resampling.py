"""How far a mean-diff direction hangs on the responses it was made from: bootstrap, and permuted labels.

Works on plain tensors of per-response means, all layers at once: a resample is a weighting of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from em_interp.errors import StatisticsError

Weights = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Resamples:
    """Mean-diff directions under resampled responses and under permuted labels, float32."""

    bootstrap: Float[Tensor, "resamples n_layers d_model"]
    """Responses drawn again with replacement: how the direction varies with the sample."""
    permuted: Float[Tensor, "permutations n_layers d_model"]
    """Labels of the centred responses drawn anew: directions that noise in these activations gives by itself."""


def resample_direction(
    positive: Float[Tensor, "n_positive n_layers d_model"],
    negative: Float[Tensor, "n_negative _ _"],
    *,
    positive_questions: Sequence[object] | None = None,
    negative_questions: Sequence[object] | None = None,
    resamples: int = 200,
    permutations: int = 200,
    seed: int = 0,
) -> Resamples:
    """Bootstrap and permutation resamples of mean(positive) - mean(negative), from means of single responses.

    For the permutations each class is centred first: else a strong direction would be the main axis of its own null.
    With the questions that the responses answer, whole questions are drawn, and labels are permuted within a question,
    so that neither what is asked nor how often is mistaken for a direction. Results take
    (resamples + permutations) * n_layers * d_model floats. Raises StatisticsError for fewer than two responses a
    class, NaN, other shapes, or labels that cannot be permuted since each question has one class only.
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
    label = np.repeat([True, False], [len(positive), len(negative)])
    question = _questions(positive_questions, negative_questions, len(positive), len(negative))
    rng = np.random.default_rng(seed)
    drawn = np.stack([_bootstrap_weights(label, question, rng) for _ in range(resamples)])
    centred = torch.cat([x - x.mean(0) for x in (both[: len(positive)], both[len(positive) :])])
    shuffled = np.stack(
        [_difference(_permuted(label, question, rng), np.ones(len(label))) for _ in range(permutations)]
    )
    return Resamples(_weighted(drawn, both), _weighted(shuffled, centred))


def _weighted(weights: Weights, responses: Float[Tensor, "n n_layers d_model"]) -> Float[Tensor, "r n_layers d_model"]:
    return torch.einsum("rn,nld->rld", torch.from_numpy(weights).to(responses), responses)


def _questions(
    positive: Sequence[object] | None, negative: Sequence[object] | None, n_positive: int, n_negative: int
) -> NDArray[np.int64] | None:
    if positive is None and negative is None:
        return None
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
    return found


def _difference(label: NDArray[np.bool_], count: Weights) -> Weights:
    """Weights of mean(label) - mean(not label), where response i counts count[i] times."""
    up, down = np.where(label, count, 0.0), np.where(label, 0.0, count)
    return up / up.sum() - down / down.sum()


def _bootstrap_weights(
    label: NDArray[np.bool_], question: NDArray[np.int64] | None, rng: np.random.Generator
) -> Weights:
    if question is None:
        count = np.empty(len(label))
        for side in (label, ~label):
            n = int(side.sum())
            count[side] = rng.multinomial(n, np.full(n, 1.0 / n))
        return _difference(label, count)
    n = int(question.max()) + 1
    while True:  # a draw without one of the classes has no difference
        count = rng.multinomial(n, np.full(n, 1.0 / n))[question].astype(float)
        if count[label].any() and count[~label].any():
            return _difference(label, count)


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
