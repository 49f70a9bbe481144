"""Does the general solution reach a lower loss for its norm?"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from analyses.inputs.finetunes import Finetunes
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.landscape.contenders import over_repeated_seeds
from em_interp.landscape.efficiency import EfficiencyCurve, efficiency_curves, efficiency_table, lead_at_equal_norm
from em_interp.statistics import PERCENT

TITLE = "Efficiency: loss against norm"
TEXT = (
    "Training loss (nats per response token, on fresh chats of the kind trained on) of each solution scaled to several "
    "multiples of its trained norm. P1 compares L / norm^2, which falls with the norm by itself; so the loss reduction "
    "per norm^2 stands beside it, and lead is the narrow solution's loss minus the general one's where both have the "
    f"same norm: positive where the general solution is ahead. Intervals: {PERCENT}, over questions, and over training "
    "seeds (where there are several)."
)
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
    curves: list[EfficiencyCurve] = []
    for domain in tqdm(domains, desc="efficiency", leave=False):
        losses = finetunes.landscape(domain, CHATS)
        for pair in finetunes.contenders(domain):
            curves += efficiency_curves(losses, pair, SCALES)
    first, *others = (leads(finetunes, domain) for domain in domains)
    return {
        "efficiency": efficiency_table(curves),
        "efficiency_lead": pd.concat([first, *others], ignore_index=True),
        "efficiency_lead_over_seeds": over_repeated_seeds(first, ["adapter", "relative_norm"], "lead"),
    }


def leads(finetunes: Finetunes, domain: str, task: str = "persona") -> pd.DataFrame:
    """`lead_at_equal_norm` of every pair of one domain; empty without pairs."""
    found = finetunes.contenders(domain, task)
    if not found:
        return pd.DataFrame()
    losses = finetunes.landscape(domain, CHATS, task)
    return pd.concat([lead_at_equal_norm(losses, *pair, RELATIVE_NORMS) for pair in found], ignore_index=True)


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
                row=number // 2 + 1,
                col=number % 2 + 1,
            )
    figures.style(panels, "norm of theta", "loss (nats per token)", height=640)
    drawn = {"efficiency": figures.captioned(panels, f"{domain}, first seed: loss against norm; bands over questions.")}
    over = tables["efficiency_lead_over_seeds"]
    if len(over):
        caption = f"{domain}: lead at equal norm, mean and {PERCENT} interval over training seeds."
        drawn["efficiency_lead"] = figures.captioned(lead_figure(over), caption)
    return drawn


def lead_figure(over_seeds: pd.DataFrame) -> go.Figure:
    """Lead against relative norm, a line an adapter."""
    return figures.lines_by(
        over_seeds,
        "relative_norm",
        "mean",
        "adapter",
        "norm / mean of the two trained norms",
        "lead of the general solution (nats per token)",
        markers=True,
        low="low",
        high="high",
    )
