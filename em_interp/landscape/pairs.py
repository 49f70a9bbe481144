"""A matched pair, general and narrow, in statistics that do not saturate: tidy rows (measure, value, reason).

"Lower loss at equal norm" says nothing where both solutions sit on the data's floor. So the pair is asked what norm
each needs for a share of the smaller gain, and for the area between the two curves up to the smaller trained norm. A
gain is the chat model's loss minus that of the solution, scaled; the smaller gain is the smaller of the two at the
trained norms, so both solutions reach every share of it. A value that cannot be had is NaN, with a `Reason`.

| measure | what it is |
|---|---|
| norm_ratio_50, _75, _90 | norm that narrow needs for that share of the smaller gain, over what general needs |
| norm_50_general, ... | those norms; and norm_, loss_ and gain_ of each, trained; loss_chat |
| lead | mean of narrow minus general loss over all norms up to the smaller trained one (nats per response token) |
| loss_over_norm2_ratio | the papers' L / norm^2 at the trained norms, narrow over general |
| stability_gap | how much more of its gain narrow loses, mean over `EPSILONS` (percentage points); each one's beside |
| influence_ratio_0.5, _1, _1.5 | KL on text of general over narrow, at that many times general's norm |
| cosine_narrow, cosine_kl_removed, cosine_rise | to general, before and after training on without KL, and the rise |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from em_interp.arguments import numbers
from em_interp.errors import UsageError
from em_interp.files.texts import Texts
from em_interp.landscape.efficiency import EfficiencyCurve, efficiency_curves
from em_interp.landscape.influence import ALL_TOKENS, Measured, at_equal_norms, document_kl, influence_ratio
from em_interp.landscape.landscape import Landscape
from em_interp.landscape.stability import StabilityCurve, stability_curve, stability_gap
from em_interp.solutions.base import Solution
from em_interp.solutions.space import check_comparable

Reason = Literal["", "no gain", "never reached", "no influence"]
"""Why there is no value: a solution does not lower the loss; the curve never falls so far; a KL of 0."""
SHARES: Final = (50, 75, 90)
"""Percent of the smaller gain."""
SCALES: Final = tuple(step / 40 for step in range(41))
"""Of the trained norm: half of the gain may be reached at a fifteenth of it."""
EPSILONS: Final = (0.2, 0.4, 0.6, 0.8)
"""The turns that a stability gap is the mean over."""
RELATIVE_NORMS: Final = (0.5, 1.0, 1.5)
"""Times general's norm, for the influence of both."""
TURNED: Final = 24
"""So many of the chats, the first, stability is measured on: it takes a pass a turn."""
Keep = Callable[[str, Callable[[], pd.DataFrame]], pd.DataFrame]
"""Takes a part's name and what makes it: where a part is kept, it need not be made."""
_Row = tuple[str, float, Reason]


def norm_reaching(
    norms: Sequence[float] | Float[np.ndarray, "scale"], losses: Sequence[float] | Float[np.ndarray, "scale"], to: float
) -> tuple[float, Reason]:
    """The first norm at which a loss falls to `to`, linear between neighbours, and why there is none.

    norms: rising; a curve that rises again later is none the less reached where it first falls so far. Raises
    UsageError for other norms, or not one loss for each.
    """
    x, y = _curve(norms, losses)
    there = np.flatnonzero(y <= to)
    if not len(there):
        return np.nan, "never reached"
    k = int(there[0])
    if k == 0:
        return float(x[0]), ""
    return float(x[k - 1] + (x[k] - x[k - 1]) * (y[k - 1] - to) / (y[k - 1] - y[k])), ""


def mean_lead(
    general: tuple[Float[np.ndarray, "scale"], Float[np.ndarray, "scale"]],
    narrow: tuple[Float[np.ndarray, "other"], Float[np.ndarray, "other"]],
    up_to: float,
) -> float:
    """The area between two curves (norms, losses) from norm 0 to `up_to`, over `up_to`: positive where general leads.

    Exact for curves that are linear between their points. Raises UsageError where a curve does not reach so far, or
    `up_to` is not above 0.
    """
    curves = [_curve(*curve) for curve in (general, narrow)]
    if not 0 < up_to < np.inf or any(x[0] > 0 or x[-1] < up_to * (1 - 1e-12) for x, _ in curves):
        reach = [f"{x[0]:g} to {x[-1]:g}" for x, _ in curves]
        raise UsageError(f"curves over norms {' and '.join(reach)}: a lead up to norm {up_to:g} needs both from 0 on.")
    at = np.union1d(curves[0][0], curves[1][0])
    at = np.append(at[at < up_to], up_to)
    lead = np.interp(at, *curves[1]) - np.interp(at, *curves[0])
    return float(np.trapezoid(lead, at) / up_to)


def _curve(
    norms: Sequence[float] | Float[np.ndarray, "scale"], losses: Sequence[float] | Float[np.ndarray, "scale"]
) -> tuple[Float[np.ndarray, "scale"], Float[np.ndarray, "scale"]]:
    x, y = numbers("norms", norms), numbers("losses", losses)
    if len(x) != len(y) or not len(x) or (np.diff(x) <= 0).any() or x[0] < 0 or not np.isfinite([*x, *y]).all():
        raise UsageError(
            f"{len(x)} norms and {len(y)} losses: a curve needs finite ones, a loss for each, and norms that rise from "
            "0 or above."
        )
    return x, y


def efficiency_measures(general: EfficiencyCurve, narrow: EfficiencyCurve) -> pd.DataFrame:
    """Norms, losses and gains of a pair, norm ratios, lead and the papers' ratio.

    Both curves are over the same responses, with rising scales from 0, among them 1. Raises UsageError for others.
    """
    both = {"general": general, "narrow": narrow}
    for name, curve in both.items():
        rising = (np.diff(curve.scales) > 0).all()
        if not len(curve.scales) or curve.scales[0] != 0 or 1 not in curve.scales or not rising:
            raise UsageError(f"the {name} curve has scales {curve.scales.tolist()}: give rising ones from 0, with 1.")
    if not np.array_equal(general.losses.tokens, narrow.losses.tokens):
        raise UsageError("the two curves have different responses. Make both on one Landscape.")
    chat = float(general.chat.mean[0])
    trained = {name: float(curve.losses.mean[list(curve.scales).index(1)]) for name, curve in both.items()}
    norm = {name: curve.solution.norm for name, curve in both.items()}
    rows: list[_Row] = [("loss_chat", chat, "")]
    for name in both:
        rows += [(f"norm_{name}", norm[name], ""), (f"loss_{name}", trained[name], "")]
        rows.append((f"gain_{name}", chat - trained[name], ""))
    smaller = chat - max(trained.values())
    for share in SHARES:
        rows += _norms(both, share, chat - smaller * share / 100 if smaller > 0 else None)
    lines = {name: (curve.norms, curve.losses.mean) for name, curve in both.items()}
    lead = mean_lead(lines["general"], lines["narrow"], min(norm.values()))
    ratio = (trained["narrow"] / norm["narrow"] ** 2) / (trained["general"] / norm["general"] ** 2)
    return _tidy([*rows, ("lead", lead, ""), ("loss_over_norm2_ratio", ratio, "")])


def _norms(both: dict[str, EfficiencyCurve], share: int, to: float | None) -> list[_Row]:
    """What each needs to reach a loss, and the ratio; None where there is no gain to have a share of."""
    found: dict[str, tuple[float, Reason]] = {
        name: (np.nan, "no gain") if to is None else norm_reaching(curve.norms, curve.losses.mean, to)
        for name, curve in both.items()
    }
    rows: list[_Row] = [(f"norm_{share}_{name}", *reached) for name, reached in found.items()]
    (general, why), (narrow, other) = found.values()
    ratio: tuple[float, Reason] = (narrow / general, why or other) if general else (np.nan, "no gain")  # but rounding
    return [*rows, (f"norm_ratio_{share}", *ratio)]


def stability_measures(general: StabilityCurve, narrow: StabilityCurve) -> pd.DataFrame:
    """How much of its gain each loses, and the gap: means over those of `EPSILONS` that the curves have.

    Raises as `stability_gap`, and UsageError where the curves have none of them.
    """
    table = stability_gap(general, narrow)
    means = table.loc[table["epsilon"].isin(EPSILONS), ["general", "narrow", "gap"]].mean()
    if means.isna().any():
        raise UsageError(f"curves at eps {list(general.epsilons)}: a gap is the mean over {list(EPSILONS)}.")
    return _tidy([(f"stability_{name}", float(value), "") for name, value in means.items()])


def influence_measures(sums: pd.DataFrame) -> pd.DataFrame:
    """KL of general over that of narrow at every relative norm of `document_kl`'s sums. Raises StatisticsError."""
    found = influence_ratio(sums, "general", "narrow")
    ratios = found[found["tokens"] == ALL_TOKENS].set_index("relative_norm")["ratio"]
    rows: list[_Row] = []
    for norm in sorted(set(sums.loc[sums["kind"] == "narrow", "relative_norm"])):
        value = float(ratios.get(norm, np.nan))
        rows.append((f"influence_ratio_{norm:g}", value, "no influence" if np.isnan(value) else ""))
    return _tidy(rows)


def drift_measures(general: Solution, narrow: Solution, kl_removed: Solution) -> pd.DataFrame:
    """Cosine of narrow to general, of kl_removed, which went on from narrow without KL, and the rise.

    Raises SolutionError for solutions of different places, or a theta of zero.
    """
    check_comparable({"general": general, "narrow": narrow, "kl_removed": kl_removed})
    before, after = (x.inner(general) / (x.norm * general.norm) for x in (narrow, kl_removed))
    return _tidy([("cosine_narrow", before, ""), ("cosine_kl_removed", after, ""), ("cosine_rise", after - before, "")])


def _made(_name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    return make()


def measure_pair(
    landscape: Landscape,
    general: Solution,
    narrow: Solution,
    texts: Texts,
    *,
    kl_removed: Solution | None = None,
    keep: Keep = _made,
) -> pd.DataFrame:
    """All measures of a pair: columns measure, value, reason. kl_removed: narrow, trained on without KL.

    landscape: chats of the kind trained on. texts: documents of the kind pre-trained on. keep: takes each of the parts
    losses, stability, influence and drift from where it was kept. Raises what the measures raise, and `Landscape`.
    """
    both = {"general": general, "narrow": narrow}
    check_comparable(both, landscape.model)
    losses = keep("losses", lambda: efficiency_measures(*efficiency_curves(landscape, both, SCALES)))
    parts = [losses, keep("stability", lambda: _stability(landscape, general, narrow))]
    parts.append(keep("influence", lambda: influence_measures(_kls(landscape, both, texts))))
    if kl_removed is not None:
        parts.append(keep("drift", lambda: drift_measures(general, narrow, kl_removed)))
    return pd.concat(parts, ignore_index=True)


def _stability(landscape: Landscape, general: Solution, narrow: Solution) -> pd.DataFrame:
    own = Landscape(landscape.model, landscape.encoded[:TURNED])
    losses = own.losses([general, narrow, general.scaled(0.0)]).mean
    if not losses[2] > losses[:2].max():
        return _tidy([(f"stability_{name}", np.nan, "no gain") for name in ("general", "narrow", "gap")])
    curves = [stability_curve(own, x, n, epsilons=EPSILONS) for n, x in (("general", general), ("narrow", narrow))]
    return stability_measures(*curves)


def _kls(landscape: Landscape, both: dict[str, Solution], texts: Texts) -> pd.DataFrame:
    trained = [Measured(name, name, solution) for name, solution in both.items()]
    return document_kl(landscape.model, texts, at_equal_norms(trained, RELATIVE_NORMS, n_random=0), progress=False)


def _tidy(rows: Sequence[_Row]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["measure", "value", "reason"]).astype({"value": float})
