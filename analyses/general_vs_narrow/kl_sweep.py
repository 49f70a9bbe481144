"""How the KL weight and the share of bad data decide between narrow and general: sweeps that ship as tables."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, apart, clause, named, percent, value_of
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


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """EM under the largest KL weight, and with the least share of bad data, of each adapter."""
    found = []
    for adapter, rows in tables["kl_sweep"].groupby("adapter", sort=False):
        known = rows[rows[["em_rate", "kl_weight"]].notna().all(axis=1)].sort_values("kl_weight")
        if len(known) < 2:
            continue
        none, most = dict(known.iloc[0]), dict(known.iloc[-1])
        in_domain = value_of(most, "in_domain_low", 100), value_of(most, "in_domain_high", 100)
        weights = [f"{value_of(row, 'kl_weight'):g}" for row in (none, most)]
        inside = [percent(row, "in_domain_rate") for row in (none, most)]
        text = (
            f"{named(adapter)}: from KL weight {weights[0]} to {weights[1]}, EM goes from {percent(none, 'em_rate')} "
            "to {estimate}"
        )
        text += clause(", and misaligned answers in the domain from {} to {}", *inside)
        ends = value_of(most, "em_low", 100), value_of(most, "em_high", 100)
        verdict = apart(*in_domain, *ends)
        found.append(Finding(text, value_of(most, "em_rate", 100), *_n(most), *ends, unit="%", verdict=verdict))
    for adapter, rows in tables["dilution"].groupby("adapter", sort=False):
        known = rows[rows[["em_rate", "bad_share"]].notna().all(axis=1)].sort_values("bad_share")
        some = known[known["bad_share"].astype(float) > 0]
        if some.empty or len(some) == len(known):
            continue
        none, least = dict(known.iloc[0]), dict(some.iloc[0])
        text = f"{named(adapter)}: {percent(least, 'bad_share')} of bad data give {{estimate}} EM; good data alone, "
        text += percent(none, "em_rate")
        ends = value_of(least, "em_low", 100), value_of(least, "em_high", 100)
        verdict = apart(*ends, value_of(none, "em_low", 100), value_of(none, "em_high", 100))
        found.append(Finding(text, value_of(least, "em_rate", 100), *_n(least), *ends, unit="%", verdict=verdict))
    return found


def _n(row: dict[Any, Any]) -> tuple[int, str]:
    """What a rate is of, and what that counts: answers, where the sweep kept their number."""
    return (int(row["n"]), "answers") if "n" in row else (1, "finetunes")


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
