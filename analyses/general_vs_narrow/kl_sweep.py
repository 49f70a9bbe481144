"""How the KL weight and the share of bad data decide between narrow and general: sweeps that ship as tables."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.suite import Need, Suite
from em_interp import figures
from em_interp.errors import MissingDataError
from em_interp.files.results import read_table
from em_interp.statistics import PERCENT

TITLE = "KL weight and dilution"
TEXT = (
    "One finetune for every KL weight, judged as trained and scaled up: theta that is held small outside its domain "
    "can hide EM that returns at the scale where in-domain misalignment saturates (scaled_em_rate). Then one finetune "
    "for every share of bad data, the rest of the chats good. These take many finetunes, so the tables are shipped, "
    "not made here; `em-interp pocket sweeps` makes them. em_rate is over open questions and other domains; intervals "
    f"({PERCENT}) are clustered by question."
)
TABLES = ("kl_sweep", "kl_sweep_scales", "dilution")
NEEDS = (Need.SWEEPS,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """The shipped tables as they are."""
    folder = suite.finetunes.root / "sweeps"
    tables = {}
    for name in TABLES:
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise MissingDataError(
                path, "there is no such table", f"make it with `em-interp pocket sweeps --out {suite.finetunes.root}`"
            )
        tables[name] = read_table(path)
    return tables


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Rates against KL weight and against the share of bad data, a panel an adapter."""
    sweep, dilution = tables["kl_sweep"], tables["dilution"]
    weights = sorted(sweep["kl_weight"].unique())
    by_weight = _panels(
        sweep.assign(place=sweep["kl_weight"].map(weights.index)),
        "place",
        "KL weight (nats per token)",
        {"em": "EM", "in_domain": "in domain", "scaled_em": "EM, scaled up"},
    )
    by_weight.update_xaxes(tickvals=list(range(len(weights))), ticktext=[f"{weight:g}" for weight in weights])
    by_share = _panels(
        dilution.assign(percent=100 * dilution["bad_share"].astype(float)),
        "percent",
        "bad data (% of the chats)",
        {"em": "EM", "in_domain": "in domain"},
    )
    captions = [
        f"Misaligned answers by {what}; {', '.join(table['domain'].unique())}, intervals over questions."
        for what, table in (("KL weight", sweep), ("share of bad data", dilution))
    ]
    return {
        "kl_sweep": figures.captioned(by_weight, captions[0]),
        "dilution": figures.captioned(by_share, captions[1]),
    }


def _panels(table: pd.DataFrame, x: str, title: str, rates: dict[str, str]) -> go.Figure:
    adapters = list(table["adapter"].unique())
    figure = figures.panels(adapters)
    for number, adapter in enumerate(adapters):
        rows = table[table["adapter"] == adapter]
        for index, (rate, label) in enumerate(rates.items()):
            y, low, high = (100 * rows[f"{rate}_{column}"] for column in ("rate", "low", "high"))
            beside = rows[x] + 0.012 * (index - 1) * (table[x].max() - table[x].min())
            figures.line(figure, beside, y, label, index, markers=True, low=low, high=high, panel=number)
    return figures.style(figure, title, "misaligned answers (%)").update_yaxes(range=[-3, 103])
