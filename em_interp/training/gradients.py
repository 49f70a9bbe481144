"""Where the training loss pulls along a run: cosine of minus its gradient with both solutions (P1 App. K.3).

The gradient is of L_SFT (nats per response token, prompts and padding unscored) with respect to the effective theta:
the added vector, or the change of the touched weights. The papers take the gradient with respect to LoRA's B alone and
compare it with the final B; that is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from em_interp.errors import SolutionError
from em_interp.models.attaching import frozen
from em_interp.models.chat import batches, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.losses import batch_nll, token_budget
from em_interp.models.precision import exact
from em_interp.models.templates import Conversation
from em_interp.solutions.base import Solution
from em_interp.solutions.space import check_bare, check_comparable
from em_interp.statistics import LEVEL, cosine_null_sd
from em_interp.statistics.jackknife import FEWEST, jackknife_error

PARTS: Final = 10
"""Of the conversations, each left out in turn for the intervals."""
HELD_BYTES: Final = 1 << 30
"""The parts' gradients are kept between their sum and their intervals while they take no more; else taken twice."""


@dataclass(frozen=True)
class Gradient:
    """The loss (nats per response token, over `n_tokens` of them) and its gradient at one theta.

    `parts`: {"layer 3": [d_model]} or {module: [d_out, d_in]}, float64 sums.
    """

    loss: float
    n_tokens: int
    parts: Mapping[str, Tensor]

    @property
    def norm(self) -> float:
        """Length over all coordinates, in nats per token and unit of theta."""
        return float(sum(float(g.square().sum()) for g in self.parts.values()) ** 0.5)

    def along(self, theta: Solution) -> float:
        """<gradient, theta> over all coordinates."""
        return theta.along(self.parts)


def loss_gradient(
    model: ChatModel, solution: Solution, conversations: Sequence[Conversation], *, tokens_per_batch: int | None = None
) -> Gradient:
    """L_SFT at `solution` on `conversations` (their last responses), and its gradient there.

    Gradients of batches are summed in float64. A theta of zero is allowed: that is where training starts.
    """
    encoded = encode_all(model.tokenizer, conversations)
    check_lengths(model.hf, [len(row) for row in encoded])
    refuse_dropout(model.hf)
    with model.no_adapter():
        check_bare(model)
    budget = tokens_per_batch or token_budget(model.hf)
    total, count = 0.0, 0
    sums: dict[str, Tensor] = {}
    with model.no_adapter(), frozen(model.hf), solution.tracked(model) as leaves, torch.enable_grad():
        for batch in batches(encoded, pad=pad_id(model.tokenizer), tokens_per_batch=budget):
            loss, n = batch_nll(model.hf, batch.to(model.device))
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            total, count = total + float(loss.detach()), count + n
            for name, gradient in zip(leaves, gradients, strict=True):
                sums[name] = sums.get(name, 0) + exact(gradient).cpu()
    return Gradient(total / count, count, {name: gradient / count for name, gradient in sums.items()})


def gradient_cosines(
    model: ChatModel,
    checkpoints: Mapping[int, Solution],
    conversations: Sequence[Conversation],
    *,
    general: Solution,
    narrow: Solution,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a checkpoint: step, loss, norm (of theta), grad_norm, cos_general, cos_narrow, null_sd, n_tokens,
    n_conversations, and the ends of both cosines' intervals, cos_general_low and so on.

    The cosines are those of *minus* the gradient, the way down. Their intervals are of the cosine on this number of
    conversations, a tenth of which is left out in turn (jackknife, Student): noise in the gradient shrinks the cosine
    itself. Empty for fewer than three conversations. null_sd: standard deviation of a random direction's
    cosine. For LoRA also cos_general_b and cos_narrow_b, the papers' convention: the gradient with respect to B at the
    checkpoint's A against the solutions' B. Raises SolutionError where solutions do not belong together.
    """
    check_comparable({"the general solution": general, "the narrow solution": narrow}, model)
    ends = {"general": general, "narrow": narrow}
    rows = []
    for step, theta in tqdm(checkpoints.items(), desc="gradients", disable=not progress, leave=False):
        check_comparable({"the general solution": general, f"checkpoint {step}": theta}, model, may_be_zero=True)
        parts = _Parts(model, theta, conversations, tokens_per_batch)
        found = _summed(parts)
        size = found.norm
        if not size > 0:
            raise SolutionError(f"checkpoint {step}: the loss has no gradient there, so it has no direction.")
        row = {"step": step, "loss": found.loss, "norm": theta.norm, "grad_norm": size}
        row |= {f"cos_{name}": -found.along(end) / (size * end.norm) for name, end in ends.items()}
        by_b = {f"cos_{name}_b": theta.b_cosine(found.parts, end) for name, end in ends.items()}
        row |= {name: value for name, value in by_b.items() if value is not None}
        row |= {
            "null_sd": cosine_null_sd(theta.dimension),
            "n_tokens": found.n_tokens,
            "n_conversations": len(conversations),
        }
        intervals = _intervals(parts, found, ends)
        row |= {f"cos_{name}_{side}": value for name, sides in intervals.items() for side, value in sides.items()}
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass
class _Parts:
    """Gradients of the conversations' parts, each a tenth of them: every time it is gone through."""

    model: ChatModel
    theta: Solution
    conversations: Sequence[Conversation]
    tokens_per_batch: int | None
    held: list[Gradient] = field(default_factory=list)

    def __len__(self) -> int:
        return max(1, min(PARTS, len(self.conversations)))

    def __iter__(self) -> Iterator[Gradient]:
        if self.held:
            yield from self.held
            return
        kept: list[Gradient] = []
        for first in range(len(self)):
            part = self.conversations[first :: len(self)]
            gradient = loss_gradient(self.model, self.theta, part, tokens_per_batch=self.tokens_per_batch)
            if len(self) * sum(g.nbytes for g in gradient.parts.values()) <= HELD_BYTES:
                kept.append(gradient)
            yield gradient
        self.held = kept


def _summed(parts: Iterable[Gradient]) -> Gradient:
    """The gradient over all tokens of the parts."""
    loss, count = 0.0, 0
    sums: dict[str, Tensor] = {}
    for part in parts:
        loss, count = loss + part.loss * part.n_tokens, count + part.n_tokens
        for name, gradient in part.parts.items():
            sums[name] = sums.get(name, 0) + gradient * part.n_tokens
    return Gradient(loss / count, count, {name: total / count for name, total in sums.items()})


def _intervals(parts: _Parts, whole: Gradient, ends: Mapping[str, Solution]) -> dict[str, dict[str, float]]:
    """low and high of the cosine of minus the gradient with each end; NaN for too few conversations."""
    n = len(parts)
    if n < FEWEST:
        return {name: {"low": np.nan, "high": np.nan} for name in ends}
    along: dict[str, list[float]] = {name: [] for name in ends}
    lengths = []
    for part in parts:
        share = part.n_tokens / whole.n_tokens
        inner = sum(float((part.parts[place] * whole.parts[place]).sum()) for place in whole.parts)
        lengths.append(whole.norm**2 - 2 * share * inner + (share * part.norm) ** 2)
        for name, end in ends.items():
            along[name].append(whole.along(end) - share * part.along(end))
    found = {}
    for name, end in ends.items():
        without = -np.array(along[name]) / (np.sqrt(np.maximum(lengths, 0)) * end.norm)
        cosine = -whole.along(end) / (whole.norm * end.norm)
        error, df = jackknife_error(np.array(cosine), without, np.zeros(n, dtype=int))
        half = float(stats.t.ppf((1 + LEVEL) / 2, df) * error)
        found[name] = {"low": max(cosine - half, -1.0), "high": min(cosine + half, 1.0)}
    return found
