"""Does the general solution reach a lower loss for its norm?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from analyses.findings import Finding, clause, decided, named, said, value_of
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.landscape import efficiency
from em_interp.landscape.efficiency import EfficiencyCurve, efficiency_curves, efficiency_table, lead_at_equal_norm
from em_interp.landscape.landscape import Losses
from em_interp.landscape.seeds import over_repeated_seeds
from em_interp.statistics import PERCENT

TITLE = "Efficiency: loss against norm"
TEXT = (
    "Training loss (nats per response token, on chats of the kind trained on) of each solution scaled to several "
    "multiples of its trained norm. P1 compares L / norm^2, which falls with the norm by itself; so the loss "
    "reduction per norm^2 stands beside it, and lead is the narrow solution's loss minus the general one's where "
    f"both have the same norm: positive where the general solution is ahead. Intervals: {PERCENT}, over questions, "
    "and over training seeds (where there are several)."
)
ALSO = {
    "pocket": "The chats are fresh: nothing was trained on them.",
}
TABLES = ("efficiency", "efficiency_lead", "efficiency_lead_over_seeds")
NEEDS = (Need.LOSSES,)
CHATS = 40
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RELATIVE_NORMS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Curves of every solution, and the lead of the general one of each pair."""
    finetunes = suite.finetunes
    domains = [domain for domain in finetunes.domains if finetunes.pairs(domain)]
    if not domains:
        raise nothing_of(suite, "general and narrow organism of one kind")
    pairs = [pair for domain in domains for pair in finetunes.pairs(domain)]
    first, *others = (leads(suite, domain) for domain in domains)
    return {
        "efficiency": pd.concat(
            [pair[0].labelled(efficiency_table(curves(suite, *pair))) for pair in pairs], ignore_index=True
        ),
        "efficiency_lead": pd.concat([first, *others], ignore_index=True),
        "efficiency_lead_over_seeds": over_repeated_seeds(first, ["adapter", "relative_norm"], "lead"),
    }


def tasks(suite: Suite) -> list[Task]:
    """A curve and a lead for each pair."""
    pairs = [pair for domain in suite.finetunes.domains for pair in suite.finetunes.pairs(domain)]
    found = [Task(f"losses of {pair[0].name} by norm", curves, pair, 2 * pair[0].weight) for pair in pairs]
    return [*found, *lead_tasks(pairs)]


def lead_tasks(pairs: Sequence[tuple[Organism, Organism]]) -> list[Task]:
    """The lead of each pair's general solution."""
    return [Task(f"lead of {pair[0].name}", lead, pair, 1.5 * pair[0].weight) for pair in pairs]


def curves(suite: Suite, general: Organism, narrow: Organism) -> list[EfficiencyCurve]:
    """`efficiency_curves` of a pair."""
    finetunes = suite.finetunes
    pair = {organism.solution: finetunes.solution(organism) for organism in (general, narrow)}

    def make() -> tuple[dict[str, Tensor], Any]:
        found = efficiency_curves(finetunes.landscape(general, CHATS), pair, SCALES)
        tensors = {curve.name: torch.from_numpy(curve.losses.nll) for curve in found}
        same = found[0].chat
        rest = {"chat": same.nll, "tokens": same.tokens, "questions": same.questions}
        return tensors | {name: torch.from_numpy(x) for name, x in rest.items()}, list(same.plain)

    made_by = finetunes.losses_made_of(general, narrow, n=CHATS, scales=SCALES)
    tensors, plain = suite.results.tensors(
        "losses", f"{general.name} by norm", made_by, make, code=(efficiency.__name__,)
    )
    found = {name: x.numpy() for name, x in tensors.items()}

    def losses(of: str) -> Losses:
        return Losses(found[of], found["tokens"], found["questions"], tuple(plain))

    return [EfficiencyCurve(name, x, np.array(SCALES), losses(name), losses("chat")) for name, x in pair.items()]


def lead(suite: Suite, general: Organism, narrow: Organism) -> pd.DataFrame:
    """`lead_at_equal_norm` of a pair."""
    finetunes = suite.finetunes
    pair = [finetunes.solution(organism) for organism in (general, narrow)]
    found = suite.results.table(
        "losses",
        f"{general.name} lead",
        finetunes.losses_made_of(general, narrow, n=CHATS, relative_norms=RELATIVE_NORMS),
        lambda _: lead_at_equal_norm(finetunes.landscape(general, CHATS), pair[0], pair[1], RELATIVE_NORMS),
        code=(efficiency.__name__,),
    )
    return general.labelled(found)


def leads(suite: Suite, domain: str, task: str = "persona") -> pd.DataFrame:
    """The leads of every pair of one domain; empty without pairs."""
    found = [lead(suite, *pair) for pair in suite.finetunes.pairs(domain, task)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The lead of each adapter at the mean of both trained norms."""
    leads = tables["efficiency_lead"]
    known = tables["efficiency"].get("n_questions", pd.Series(dtype=float)).dropna()
    questions = int(known.max()) if len(known) else 0
    return lead_findings(leads, tables["efficiency_lead_over_seeds"], questions)


def lead_findings(leads: pd.DataFrame, over_seeds: pd.DataFrame, questions: int) -> list[Finding]:
    """Over seeds where there are several, else of one, over that many questions (0: not known)."""
    found = []
    for adapter, rows in leads.groupby("adapter", sort=False):
        several = over_seeds[over_seeds["adapter"] == adapter]
        table, value = (several, "mean") if len(several) else (rows[rows["domain"] == rows["domain"].iloc[0]], "lead")
        equal = {float(row["relative_norm"]): row for row in table.to_dict("records")}
        row = equal.get(1.0)
        if row is None or math.isnan(estimate := value_of(row, value)):
            continue
        text = f"{named(adapter)}: at equal norm the narrow solution's loss minus the general one's is {{estimate}}"
        widest = max(equal)
        if widest > 1:
            text += clause(f"; at {widest:g} times that norm it is {{}}", said(value_of(equal[widest], value)))
        n, counts = (questions, "questions") if questions and several.empty else (int(row.get("n_seeds", 1)), "seeds")
        ends = value_of(row, "low"), value_of(row, "high")
        found.append(Finding(text, estimate, n, counts, *ends, unit="nats per token", verdict=decided(*ends)))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Loss against norm for one domain's pair of each adapter; the lead over seeds."""
    table = tables["efficiency"]
    domain = tables["efficiency_lead"]["domain"].iloc[0]
    shown = table[(table["domain"] == domain) & (table["training_seed"] == table["training_seed"].min())]
    adapters = list(shown["adapter"].unique())
    panels = figures.panels(adapters)
    for number, adapter in enumerate(adapters):
        for index, solution in enumerate(("general", "narrow")):
            rows = shown[(shown["adapter"] == adapter) & (shown["solution"] == solution)].sort_values("norm")
            figures.line(
                panels,
                rows["norm"],
                rows["loss"],
                solution,
                index,
                markers=True,
                low=rows["loss_low"],
                high=rows["loss_high"],
                panel=number,
            )
    figures.style(panels, "norm of theta (Frobenius)", "loss (nats per token)").update_yaxes(type="log", dtick="D2")
    caption = f"{domain}, first seed: training loss against norm; intervals over questions."
    drawn = {"efficiency": figures.captioned(panels, caption)}
    over = tables["efficiency_lead_over_seeds"]
    if len(over):
        caption = f"{domain}: lead of the general solution at equal norm; intervals over training seeds."
        drawn["efficiency_lead"] = figures.captioned(lead_figure(over), caption)
    return drawn


def lead_figure(over_seeds: pd.DataFrame) -> go.Figure:
    """Lead against relative norm, a line an adapter."""
    titles = ("norm (times the mean of the two trained norms)", "lead of the general solution (nats per token)")
    over = (over_seeds, "relative_norm", "mean", "adapter")
    figure = figures.lines_by(*over, *titles, markers=True, low="low", high="high")
    return figures.null_line(figure, 0, "no lead")
