"""Does the general solution survive perturbation better?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from analyses.findings import Finding, decided, named, value_of
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.landscape import curvature as curvatures
from em_interp.landscape import stability
from em_interp.landscape.curvature import curvature
from em_interp.landscape.seeds import over_repeated_seeds
from em_interp.landscape.stability import (
    EPSILONS,
    StabilityCurve,
    dispersion,
    stability_curve,
    stability_gap,
    stability_table,
)

TITLE = "Stability under orthogonal perturbation"
TEXT = (
    "Each solution turned by eps in ten random directions, norm kept (P1, Fig. 4b); the loss increase in percent of "
    "what the solution gains over the chat model: its mean with an interval over directions, and all of them. gap is "
    "narrow minus general: positive where the general solution is the more stable. predicted is what the curvature at "
    "the solution (Hessian-vector products with random orthogonal directions) foretells, good where eps is small. All "
    "eps for the first training seed, .2 to .8 for the others."
)
TABLES = ("stability", "stability_gap", "stability_gap_over_seeds", "curvature")
NEEDS = (Need.LOSSES,)
STORY = (4, "stability")
PROBES = 8
CHATS = 24
_TENSORS = ("turned", "trained", "chat", "tokens", "questions")
MIDDLE = (0.2, 0.4, 0.6, 0.8)
"""The eps of further training seeds and of the second task: every eps costs a pass a perturbation."""
TURNED = 0.6
"""The eps that the finding speaks of."""
PREDICTED = ("epsilon", "predicted_percent", "low", "high")


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One domain, every adapter and seed."""
    finetunes = suite.finetunes
    domain = finetunes.compared()
    organisms = [organism for pair in finetunes.pairs(domain) for organism in pair]
    if not organisms:
        raise nothing_of(suite, "general and narrow organism of one kind")
    bends = [bend(suite, organism) for organism in organisms if organism.seed == 0]
    gap = gaps(suite, domain)
    return {
        "stability": pd.concat(
            [organism.labelled(stability_table([curve(suite, organism)])) for organism in organisms], ignore_index=True
        ),
        "stability_gap": gap,
        "stability_gap_over_seeds": over_repeated_seeds(gap, ["adapter", "epsilon"], "gap"),
        "curvature": pd.concat(bends, ignore_index=True),
    }


def tasks(suite: Suite) -> list[Task]:
    """A curve for each finetune, with the curvature at those of the first seed."""
    organisms = [e for pair in suite.finetunes.pairs(suite.finetunes.compared()) for e in pair]
    bends = [Task(f"stability and curvature of {e.name}", bend, (e,), 3.5 * e.weight) for e in organisms if e.seed == 0]
    return [*bends, *curve_tasks([e for e in organisms if e.seed])]


def curve_tasks(organisms: Sequence[Organism]) -> list[Task]:
    """The curve of each finetune."""
    return [
        Task(f"stability of {e.name}", curve, (e,), (0.4 if e.seed or e.task == "register" else 1.5) * 2 * e.weight)
        for e in organisms
    ]


def curve(suite: Suite, organism: Organism) -> StabilityCurve:
    """`stability_curve` of a finetune; of the second task with half the perturbations."""
    finetunes = suite.finetunes
    solution = finetunes.solution(organism)
    grid: dict[str, Any] = {"epsilons": MIDDLE if organism.seed or organism.task == "register" else EPSILONS}
    grid["n_seeds"] = 5 if organism.task == "register" else 10

    def make() -> tuple[dict[str, Tensor], Any]:
        found = stability_curve(finetunes.landscape(organism, CHATS), solution, organism.solution, **grid)
        return {name: torch.from_numpy(getattr(found, name)) for name in _TENSORS}, [found.on, found.seeds]

    made_by = finetunes.losses_made_of(organism, n=CHATS, **grid)
    tensors, (on, seeds) = suite.results.tensors(
        "losses", f"{organism.name} turned", made_by, make, code=(stability.__name__,)
    )
    arrays = {name: x.numpy() for name, x in tensors.items()}
    return StabilityCurve(organism.solution, solution, on, tuple(grid["epsilons"]), tuple(seeds), **arrays)


def bend(suite: Suite, organism: Organism) -> pd.DataFrame:
    """What the curvature at a finetune foretells."""
    finetunes = suite.finetunes

    def make(_parts: object) -> pd.DataFrame:
        of = curve(suite, organism)
        found = curvature(finetunes.landscape(organism, CHATS), of.solution, n_probes=PROBES)
        labels = {"solution": organism.solution, **organism.labels()}
        return found.predicted(EPSILONS, of.gain).assign(**{**labels, **found.columns()})

    made_by = finetunes.losses_made_of(organism, n=CHATS, epsilons=EPSILONS, probes=PROBES)
    code = (stability.__name__, curvatures.__name__)
    return suite.results.table("losses", f"{organism.name} curvature", made_by, make, code=code)


def gaps(suite: Suite, domain: str, task: str = "persona") -> pd.DataFrame:
    """`stability_gap` of every pair of one domain."""
    found = [
        general.labelled(stability_gap(curve(suite, general), curve(suite, narrow)))
        for general, narrow in suite.finetunes.pairs(domain, task)
    ]
    return pd.concat(found, ignore_index=True)


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """How much more of its gain the narrow solution of each adapter loses, at one eps."""
    return gap_findings(tables["stability_gap"], tables["stability_gap_over_seeds"])


def gap_findings(gap: pd.DataFrame, over_seeds: pd.DataFrame) -> list[Finding]:
    """Over seeds where there are several, else of one over its questions."""
    found = []
    for adapter, rows in gap.groupby("adapter", sort=False):
        several = over_seeds[over_seeds["adapter"] == adapter]
        table, value = (several, "mean") if len(several) else (rows, "gap")
        known = table[table[[value, "epsilon"]].notna().all(axis=1)].to_dict("records")
        if not known:
            continue
        row = min(known, key=lambda r: abs(float(r["epsilon"]) - TURNED))
        ends = value_of(row, "low"), value_of(row, "high")
        text = (
            f"{named(adapter)}: turned by eps {float(row['epsilon']):g}, what the narrow solution loses of its gain, "
            "minus what the general one loses, is {estimate}"
        )
        n = int(row["n_seeds"]) if len(several) else 1
        unit = "percentage points"
        found.append(Finding(text, value_of(row, value), n, "seeds", *ends, unit=unit, verdict=decided(*ends)))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Relative increase against eps, a panel an adapter; the gap over seeds."""
    table, bends = tables["stability"], tables["curvature"]
    shown = table[table["training_seed"] == 0]
    adapters = list(shown["adapter"].unique())
    panels = figures.panels(adapters)
    for number, adapter in enumerate(adapters):
        for index, solution in enumerate(("general", "narrow")):
            rows = shown[(shown["adapter"] == adapter) & (shown["solution"] == solution)]
            if rows.empty:
                continue
            mean = dispersion(rows).sort_values("epsilon")
            x, low, high = mean["epsilon"], mean["low"], mean["high"]
            figures.extent(panels, x, mean["minimum"], mean["maximum"], "all perturbations", index, panel=number)
            figures.line(panels, x, mean["mean"], solution, index, markers=True, low=low, high=high, panel=number)
            bend = bends[(bends["adapter"] == adapter) & (bends["solution"] == solution) & (bends["epsilon"] <= 0.5)]
            name, (x, y, low, high) = f"{solution}, from curvature", (bend[c] for c in PREDICTED)
            figures.line(panels, x, y, name, index + 2, low=low, high=high, panel=number)
    figures.style(panels, "eps (share turned away)", "loss increase (% of the gain)")
    domain = table["domain"].iloc[0]
    caption = f"{domain}, first seed: each solution's loss as it is turned; intervals of the mean over turns."
    drawn = {"stability": figures.captioned(panels, caption)}
    over = tables["stability_gap_over_seeds"]
    if len(over):
        caption = f"{domain}: how much more of its gain the narrow solution loses; intervals over training seeds."
        drawn["stability_gap"] = figures.captioned(gap_figure(over), caption)
    return drawn


def gap_figure(over_seeds: pd.DataFrame) -> go.Figure:
    """Gap against eps, a line an adapter."""
    titles = ("eps (share turned away)", "narrow minus general (% of the gain)")
    over = (over_seeds, "epsilon", "mean", "adapter")
    figure = figures.lines_by(*over, *titles, markers=True, low="low", high="high")
    return figures.null_line(figure, 0, "no gap")
