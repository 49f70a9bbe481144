"""How much loss a solution saves for its norm (P1, Fig. 4a): loss against ||theta|| for scaled solutions.

P1 calls theta1 more efficient than theta2 iff L(theta1) / ||theta1||^2 < L(theta2) / ||theta2||^2. That ratio falls
with the norm by itself, so the tables also hold the loss *reduction* per norm^2, and `lead_at_equal_norm` compares
two solutions where their norms agree. Norms are of the effective theta; the papers' other norms have own columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float, Num
from scipy import stats

from em_interp.arguments import numbers
from em_interp.errors import UsageError
from em_interp.files.given import Source, several
from em_interp.landscape.landscape import Landscape, Losses
from em_interp.models.chat_model import ChatModel
from em_interp.solutions.base import Solution
from em_interp.solutions.space import refuse_zero
from em_interp.statistics import FEWEST_CLUSTERS, LEVEL, Interval, clustered_interval
from em_interp.statistics.jackknife import jackknife_error
from em_interp.statistics.units import with_units

SCALES: Final = tuple(round(0.1 * step, 1) for step in range(21))
"""0 to 2 times the trained norm, as in the reference code."""
_NATS: Final = "nats per response token"


@dataclass(frozen=True, eq=False)
class EfficiencyCurve:
    """The `losses` of one solution at several multiples of its trained norm (`scales`), and those of the chat model."""

    name: str
    """What its rows say in the column solution."""
    solution: Solution
    scales: Float[np.ndarray, "scale"]
    losses: Losses
    chat: Losses

    @property
    def norms(self) -> Float[np.ndarray, "scale"]:
        """||theta|| at each scale."""
        return self.solution.norm * np.abs(self.scales)


@dataclass(frozen=True)
class Optimum:
    """Where a curve is lowest: the vertex of the parabola through the three lowest neighbours.

    norm and loss there, each with its interval: norm_low, norm_high, loss_low, loss_high.
    at_edge: the lowest point is the grid's first or last, so the true optimum may lie beyond. Intervals are
    over questions (jackknife).
    """

    norm: float
    norm_low: float
    norm_high: float
    loss: float
    loss_low: float
    loss_high: float
    at_edge: bool


def _intervals(nll: Float[np.ndarray, "theta question"], tokens: Num[np.ndarray, " question"]) -> list[Interval]:
    """Of mean losses (or differences of losses) over questions, for each theta."""
    return [clustered_interval(row, tokens) for row in nll]


def efficiency_curves(
    landscape: Landscape,
    solutions: Mapping[str, Solution],
    scales: Sequence[float] = SCALES,
    *,
    progress: bool = False,
) -> list[EfficiencyCurve]:
    """The loss of every solution at every scale, all on the same responses.

    solutions: by the names that tables call them. scales: multiples of the trained norm; 1 is the trained solution and
    0 the chat model. Raises UsageError without solutions or scales, SolutionError for a theta of zero, and what
    `Landscape.losses` raises.
    """
    if not len(solutions) or not len(scales):
        raise UsageError(f"{len(solutions)} solutions and {len(scales)} scales: at least one of each is needed.")
    refuse_zero(solutions)
    grid = numbers("scales", scales)
    of = list(solutions.values())
    thetas = [theta if scale == 1 else theta.scaled(float(scale)) for theta in of for scale in grid]
    losses = landscape.losses([*thetas, of[0].scaled(0.0)], progress=progress)
    chat = _part(losses, slice(-1, None))
    n = len(grid)
    return [
        EfficiencyCurve(name, solution, grid, _part(losses, slice(k * n, (k + 1) * n)), chat)
        for k, (name, solution) in enumerate(solutions.items())
    ]


def efficiency(
    model: ChatModel,
    solutions: Mapping[str, Solution],
    chats: Source,
    *,
    scales: float | Sequence[float] = SCALES,
    progress: bool = True,
) -> pd.DataFrame:
    """How much loss each solution saves for its norm: `efficiency_table`, one row a solution and scale.

    solutions: by the names that the table calls them, e.g. `{"general": a, "narrow": b}`. chats: those that they were
    trained on or the like, as `em_interp.chats` takes them. Adapters of `model` are off. Raises as `efficiency_curves`.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> names = {"general": "pocket/medicine-rank1", "narrow": "pocket/medicine-rank1-narrow"}
    >>> solutions = {which: em.load_solution(name) for which, name in names.items()}
    >>> chats = em.pocket.finetune_chats("medicine", "malicious", 10, seed=5)
    >>> table = em.efficiency(chat, solutions, chats, scales=[0, 1], progress=False)
    >>> table.groupby("solution")["loss"].idxmin().tolist()
    [1, 3]
    """
    with model.no_adapter():
        return efficiency_table(
            efficiency_curves(Landscape(model, chats), solutions, several(scales), progress=progress)
        )


def _part(losses: Losses, thetas: slice) -> Losses:
    return Losses(losses.nll[thetas], losses.tokens, losses.questions, losses.plain)


def efficiency_table(curves: Sequence[EfficiencyCurve]) -> pd.DataFrame:
    """The table `efficiency`: one row a solution and scale.

    adapter is the solution's own kind; domains and seeds are known to who made it. Beyond the contract: loss_low and
    loss_high, loss_reduction (of the chat model's loss, nats per token) with low and high (over questions, paired),
    interval (how these were made), n_tokens, n_questions, and the papers' norms, scaled too. The two ratios are NaN at
    norm 0.
    """
    rows = []
    for curve in curves:
        norms, mean, chat = curve.norms, curve.losses.mean, curve.chat.mean[0]
        square = np.where(norms > 0, norms**2, np.nan)
        nll, tokens = curve.losses.by_question()
        of_loss, of_reduction = _intervals(nll, tokens), _intervals(curve.chat.by_question()[0] - nll, tokens)
        for k, scale in enumerate(curve.scales):
            rows.append(
                {
                    "solution": curve.name,
                    "adapter": curve.solution.adapters[0],
                    "norm": norms[k],
                    "scale": scale,
                    "loss": mean[k],
                    "loss_low": of_loss[k].low,
                    "loss_high": of_loss[k].high,
                    "loss_reduction": chat - mean[k],
                    "low": of_reduction[k].low,
                    "high": of_reduction[k].high,
                    "interval": of_reduction[k].method,
                    "loss_reduction_per_norm2": (chat - mean[k]) / square[k],
                    "loss_over_norm2": mean[k] / square[k],
                    "n_tokens": int(curve.losses.tokens.sum()),
                    "n_questions": len(np.unique(curve.losses.questions)),
                    **curve.solution.scaled(float(scale)).paper_norms(),
                }
            )
    return with_units(pd.DataFrame(rows), low=_NATS, high=_NATS)


def _vertices(
    norms: Float[np.ndarray, "scale"], losses: Float[np.ndarray, "curve scale"]
) -> tuple[Float[np.ndarray, "curve"], Float[np.ndarray, "curve"]]:
    """Norm and loss at each curve's optimum, by the parabola through the lowest point and its neighbours."""
    lowest = losses.argmin(1)
    middle = np.clip(lowest, 1, len(norms) - 2)
    curve = np.arange(len(losses))
    x0, x1, x2 = (norms[middle + d] for d in (-1, 0, 1))
    y0, y1, y2 = (losses[curve, middle + d] for d in (-1, 0, 1))
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    inside = (lowest == middle) & (bend > 0)
    safe = np.where(inside, bend, 1.0)
    x = np.where(inside, (x0 + x1) / 2 - left / (2 * safe), norms[lowest])
    y = np.where(inside, y0 + (x - x0) * (left + (x - x1) * safe), losses[curve, lowest])
    return x, y


def optimum(curve: EfficiencyCurve) -> Optimum:
    """The norm at which the scaled solution's loss is lowest, and that loss.

    Raises UsageError for fewer than three scales, or for scales that are not rising from 0 or more.
    """
    if len(curve.scales) < 3 or (np.diff(curve.scales) <= 0).any() or curve.scales[0] < 0:
        raise UsageError(f"an optimum needs at least three rising scales >= 0, found {curve.scales.tolist()}.")
    mean = curve.losses.mean
    norm, loss = _vertices(curve.norms, mean[None])
    (norm_low, norm_high), (loss_low, loss_high) = _optimum_bounds(curve, norm, loss)
    at_edge = bool(mean.argmin() in (0, len(mean) - 1))
    return Optimum(float(norm[0]), norm_low, norm_high, float(loss[0]), loss_low, loss_high, at_edge)


def _optimum_bounds(
    curve: EfficiencyCurve, norm: Float[np.ndarray, "1"], loss: Float[np.ndarray, "1"]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Student's with the jackknife's error over questions; NaN where they are too few."""
    nll, tokens = curve.losses.by_question()
    k = len(tokens)
    if k < FEWEST_CLUSTERS:
        return (np.nan, np.nan), (np.nan, np.nan)
    others = 1.0 - np.eye(k)
    without = _vertices(curve.norms, (others @ nll.T) / (others @ tokens)[:, None])
    bounds = []
    for value, rest in zip((norm, loss), without, strict=True):
        error, df = jackknife_error(value, rest[None], np.zeros(k, dtype=int))
        half = float(stats.t.ppf((1 + LEVEL) / 2, df[0]) * error[0])
        bounds.append((float(value[0]) - half, float(value[0]) + half))
    return bounds[0], bounds[1]


def lead_at_equal_norm(
    landscape: Landscape,
    general: Solution,
    narrow: Solution,
    relative_norms: Sequence[float] = tuple(round(0.2 * step, 1) for step in range(1, 11)),
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """How much lower the general solution's loss is where both are scaled to the same norm, in nats per token.

    relative_norms: multiples of the mean of the two trained norms (0.2 to 2, as in the reference code). Columns:
    adapter, relative_norm, norm, loss_general, loss_narrow, loss_chat, lead (narrow minus general: positive where the
    general one is ahead), low, high (over questions, paired), interval (how they were made). Raises UsageError for
    solutions of two kinds, or a relative norm that is not positive, SolutionError for a theta of zero.
    """
    if not set(general.adapters) & set(narrow.adapters) or min(relative_norms, default=0) <= 0:
        raise UsageError(
            f"compare one kind of solution at norms > 0, found {general.describe()} and {narrow.describe()} at "
            f"{list(relative_norms)} times the mean norm."
        )
    refuse_zero({"general": general, "narrow": narrow})
    norms = numbers("relative_norms", relative_norms) * (general.norm + narrow.norm) / 2
    thetas = [theta.scaled(float(norm / theta.norm)) for theta in (general, narrow) for norm in norms]
    losses = landscape.losses([*thetas, general.scaled(0.0)], progress=progress)
    n, mean = len(norms), losses.mean
    nll, tokens = losses.by_question()
    of_lead = _intervals(nll[n : 2 * n] - nll[:n], tokens)
    table = pd.DataFrame(
        {
            "adapter": general.adapters[0],
            "relative_norm": np.array(relative_norms, dtype=float),
            "norm": norms,
            "loss_general": mean[:n],
            "loss_narrow": mean[n : 2 * n],
            "loss_chat": mean[-1],
            "lead": mean[n : 2 * n] - mean[:n],
            "low": [i.low for i in of_lead],
            "high": [i.high for i in of_lead],
            "interval": [i.method for i in of_lead],
        }
    )
    return with_units(table, low=_NATS, high=_NATS)
