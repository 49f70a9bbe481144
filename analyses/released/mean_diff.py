"""How long the mean-diff direction is at each layer, beside the residual stream it is added to."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import Finding, clause, named, percent, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures

TITLE = "Norms of the mean-diff directions"
TEXT = (
    "Length of each released direction (misaligned minus aligned mean of block outputs over answer tokens) by layer. "
    "The data-diff is the papers' mean-diff; read in the chat model it is the content control. The ratio to the norm "
    "of the mean activation says what a steering coefficient of 1 means at that layer."
)
TABLES = ("direction_norms",)
NEEDS = (Need.RELEASED,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a direction and layer: its norm, the mean activation's norm, their ratio."""
    rows = []
    for split in suite.published.splits:
        scale = split.mean_norms().tolist()
        for kind in split.kinds:
            for layer, norm in split.direction(kind).norms().items():
                rows.append(
                    (f"{split.label}:{kind}", split.label, kind, layer, norm, scale[layer], norm / scale[layer])
                )
    if not rows:
        raise nothing_of(suite, "split of mean activations with two cells to subtract", "EM_interp")
    columns = ["direction", "split", "kind", "layer", "norm", "mean_activation_norm", "ratio"]
    return {"direction_norms": pd.DataFrame(rows, columns=columns)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The norm of one data-diff in the middle of the model, beside that of the mean activation."""
    table = tables["direction_norms"]
    known = table[(table["kind"] == "data-diff") & table["norm"].notna()]
    if known.empty:
        return []
    whole = known[known["split"].str.endswith("/all")]
    direction = (whole if len(whole) else known)["direction"].iloc[0]
    rows = known[known["direction"] == direction].sort_values("layer")
    row = dict(rows.iloc[len(rows) // 2])
    text = f"At layer {int(row['layer'])}, {named(direction)} is {{estimate}} long"
    text += clause(", {} of the mean activation", percent(row, "ratio"))
    norm = value_of(row, "norm")
    held = beside(tables, "released.mean_diff", "norm of the mean-diff, 9-adapter finetune, layer 24", norm)
    return [Finding(text, norm, len(rows), "layers", **held)]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Norm by layer, for the data-diff of every split."""
    table = tables["direction_norms"]
    shown = table[table["kind"] == "data-diff"]
    shown = shown if len(shown) else table
    by = "split" if (table["kind"] == "data-diff").any() else "direction"
    figure = figures.lines_by(shown, "layer", "norm", by, "layer (output of block)", "norm (residual-stream units)")
    figure.update_yaxes(type="log", dtick=1)
    return {"direction_norms": figures.captioned(figure, "Norm of the data-diff of every finetune and split.")}
