"""Does the general solution survive perturbation better?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from analyses.inputs.finetunes import Finetunes
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.landscape.contenders import Contender, over_repeated_seeds
from em_interp.landscape.curvature import curvature
from em_interp.landscape.stability import EPSILONS, StabilityCurve, stability_curve, stability_gap, stability_table
from em_interp.statistics import PERCENT

TITLE = "Stability under orthogonal perturbation"
TEXT = (
    "Each solution turned by eps in ten random directions, norm kept (P1, Fig. 4b); the loss increase in percent of "
    "what the solution gains over the chat model. gap is narrow minus general: positive where the general solution is "
    "the more stable. predicted is what the curvature at the solution (Hessian-vector products with random orthogonal "
    "directions) foretells, good where eps is small. All eps for the first training seed, .2 to .8 for the others."
)
TABLES = ("stability", "stability_gap", "stability_gap_over_seeds", "curvature")
NEEDS = (Need.LOSSES,)
PROBES = 8
CHATS = 24
MIDDLE = (0.2, 0.4, 0.6, 0.8)
"""The eps of further training seeds and of the second task: every eps costs a pass a perturbation."""


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One domain, every adapter and seed."""
    finetunes = suite.finetunes
    domain = finetunes.compared()
    if not finetunes.pairs(domain):
        raise nothing_of(suite, "general and narrow organism of one kind")
    losses = finetunes.landscape(domain, CHATS)
    curves = pair_curves(finetunes, domain)
    bends = []
    for curve in (curve for pair in curves for curve in pair if curve.contender.training_seed == 0):
        bend = curvature(losses, curve.contender, n_probes=PROBES)
        predicted = bend.predicted(EPSILONS, curve.gain)
        bends.append(predicted.assign(**{**curve.contender.labels(), **bend.columns()}))
    gap = gaps(curves)
    return {
        "stability": stability_table([curve for pair in curves for curve in pair]),
        "stability_gap": gap,
        "stability_gap_over_seeds": over_repeated_seeds(gap, ["adapter", "epsilon"], "gap"),
        "curvature": pd.concat(bends, ignore_index=True),
    }


def pair_curves(
    finetunes: Finetunes, domain: str, task: str = "persona"
) -> list[tuple[StabilityCurve, StabilityCurve]]:
    """(general, narrow) curves of every pair of one domain; the second task with half the perturbations."""
    found = finetunes.contenders(domain, task)
    if not found:
        return []
    losses = finetunes.landscape(domain, CHATS, task)

    def curve(contender: Contender) -> StabilityCurve:
        if task == "register":
            return stability_curve(losses, contender, epsilons=MIDDLE, n_seeds=5)
        return stability_curve(losses, contender, epsilons=MIDDLE if contender.training_seed else EPSILONS)

    return [(curve(general), curve(narrow)) for general, narrow in tqdm(found, desc="stability", leave=False)]


def gaps(curves: Sequence[tuple[StabilityCurve, StabilityCurve]]) -> pd.DataFrame:
    """`stability_gap` of every pair of curves."""
    return pd.concat([stability_gap(*pair) for pair in curves], ignore_index=True)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Relative increase against eps, a panel an adapter: points are perturbations, lines their means."""
    table = tables["stability"]
    shown = table[table["training_seed"] == 0]
    adapters = list(shown["adapter"].unique())
    panels = figures.panels(adapters)
    bends = tables["curvature"]
    for number, adapter in enumerate(adapters):
        row, col = number // 2 + 1, number % 2 + 1
        for index, solution in enumerate(("general", "narrow")):
            rows = shown[(shown["adapter"] == adapter) & (shown["solution"] == solution)]
            by = rows.groupby("epsilon")["relative_increase_percent"]
            figures.line(
                panels,
                list(by.mean().index),
                by.mean(),
                solution,
                index,
                markers=True,
                low=by.min(),
                high=by.max(),
                row=row,
                col=col,
            )
            bend = bends[(bends["adapter"] == adapter) & (bends["solution"] == solution) & (bends["epsilon"] <= 0.5)]
            figures.line(
                panels,
                bend["epsilon"],
                bend["predicted_percent"],
                f"{solution}, from curvature",
                index + 2,
                row=row,
                col=col,
            )
    figures.style(panels, "eps", "loss increase (% of the gain)", height=640)
    domain = table["domain"].iloc[0]
    drawn = {"stability": figures.captioned(panels, f"{domain}, first seed; bands hold all ten perturbations.")}
    over = tables["stability_gap_over_seeds"]
    if len(over):
        caption = f"{domain}: gap, mean and {PERCENT} interval over training seeds."
        drawn["stability_gap"] = figures.captioned(gap_figure(over), caption)
    return drawn


def gap_figure(over_seeds: pd.DataFrame) -> go.Figure:
    """Gap against eps, a line an adapter."""
    return figures.lines_by(
        over_seeds,
        "epsilon",
        "mean",
        "adapter",
        "eps",
        "narrow minus general (% of the gain)",
        markers=True,
        low="low",
        high="high",
    )
