"""What adding a finetune's mean-diff direction does to the chat model, by layer and by strength."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from analyses.inputs.finetunes import Entry
from analyses.suite import Need, Suite
from em_interp import figures
from em_interp.interventions.steering import steering_rows, sweep

TITLE = "Steering the chat model with the mean-diff direction"
TEXT = (
    "The response mean-diff of each general all-modules organism (its own misaligned minus aligned answers to open "
    "questions, P2 sec. 3.1), added to the chat model at one layer and every token. Strength is the norm of what is "
    "added over the typical residual norm at that layer. Asked are open questions and the domains the organism never "
    "saw. EM counts misaligned and coherent answers; coherence stands beside it, since a model that babbles is not "
    "misaligned. Norm-matched random directions run at the layer that worked best."
)
TABLES = ("steering",)
NEEDS = (Need.DIRECTIONS, Need.JUDGE)
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
RANDOM_ARMS = 3


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a direction, layer and strength."""
    finetunes = suite.judged_finetunes
    rows = []
    entries = finetunes.select(solution="general", adapter="all-modules", seed=0)
    for number, entry in enumerate(tqdm(entries, desc="steering", leave=False)):
        if number == 0:
            rows.append(_sweep(suite, entry, list(range(finetunes.chat.n_layers)), 0))
            best = best_cell(rows[0])
            layer = int(best["layer"])
            rows.append(_sweep(suite, entry, [layer], RANDOM_ARMS).query("control"))
        else:
            rows.append(_sweep(suite, entry, [layer], 0))
    return {"steering": pd.concat(rows, ignore_index=True)}


def best_cell(table: pd.DataFrame) -> pd.Series:  # type: ignore[type-arg]
    """The row of most EM among those at least 90% coherent, or the most coherent one where none is."""
    usable = table[table["coherent_rate"] >= 0.9]
    if usable.empty:
        return table.iloc[int(table["coherent_rate"].to_numpy().argmax())]
    return usable.iloc[int(usable["em_rate"].to_numpy().argmax())]


def _sweep(suite: Suite, entry: Entry, layers: list[int], random_arms: int) -> pd.DataFrame:
    finetunes = suite.judged_finetunes
    direction = finetunes.contrast(entry).direction()
    answers = sweep(
        finetunes.chat,
        direction,
        finetunes.elsewhere(entry.domain),
        layers=layers,
        coefficients=SHARES,
        n=1,
        name=entry.name,
        units="residual",
        random_arms=random_arms,
        max_new_tokens=finetunes.max_new_tokens,
        progress=False,
        parts=suite.parts("finetunes.steering"),
    )
    return steering_rows(finetunes.judge(answers), finetunes.chat.name)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM and coherence against strength at every layer; the trade-off; the best layer beside random directions."""
    table = tables["steering"].astype({"residual_share": float, "em_rate": float, "coherent_rate": float})
    first = table["direction"].iloc[0]
    own = table[table["direction"] == first]
    panels = figures.panels(["EM", "coherent"], shared_yaxes=True)
    trade = go.Figure()
    for index, (layer, rows) in enumerate(own.groupby("layer")):
        for col, column in enumerate(("em_rate", "coherent_rate"), start=1):
            figures.line(
                panels,
                rows["residual_share"],
                100 * rows[column],
                f"layer {layer}",
                index,
                markers=True,
                row=1,
                col=col,
            )
        figures.line(
            trade,
            100 * rows["coherent_rate"],
            100 * rows["em_rate"],
            f"layer {layer}",
            index,
            markers=True,
            text=[f"strength {s:.2f}" for s in rows["residual_share"]],
            hovertemplate="%{text}: EM %{y:.1f}%, coherent %{x:.1f}%",
        )
    figures.style(panels, "norm added / residual norm", "share of answers (%)")
    panels.update_yaxes(title_text="", col=2)
    figures.style(trade, "coherent answers (%)", "EM (%)")
    layer = table.loc[table["direction"] != first, "layer"].iloc[0] if (table["direction"] != first).any() else 0
    beside = go.Figure()
    for index, (name, rows) in enumerate(table[table["layer"] == layer].groupby("direction", sort=False)):
        figures.line(
            beside,
            rows["residual_share"],
            100 * rows["em_rate"],
            str(name),
            index,
            markers=True,
            low=100 * rows["em_low"].astype(float),
            high=100 * rows["em_high"].astype(float),
        )
    figures.style(beside, "norm added / residual norm", "EM (%)")
    return {
        "steering": figures.captioned(panels, f"Direction of {first}: EM and coherence by strength, one line a layer."),
        "steering_trade_off": figures.captioned(trade, "What EM costs in coherence, one line a layer."),
        "steering_random": figures.captioned(beside, f"Layer {layer}: three finetunes' directions and random ones."),
    }
