"""What an off-by-one layer would cost: cosines of each direction with itself at other layers."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import Finding, named, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.directions.cosines import layer_cosines

TITLE = "Sensitivity to the layer convention"
TEXT = (
    "Cosine of a data-diff direction at one layer with itself at another. Next to the diagonal is the price of reading "
    "a vector one layer off, which Hugging Face's hidden_states (whose entry l+1 is block l) invites."
)
TABLES = ("layer_cosines",)
NEEDS = (Need.RELEASED,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each direction and pair of layers, layer_a < layer_b."""
    tables = []
    for split in suite.published.splits:
        if "data-diff" not in split.kinds:
            continue
        matrix = pd.DataFrame(layer_cosines(split.direction("data-diff")).numpy())
        table = (
            matrix.melt(ignore_index=False, var_name="layer_b", value_name="cosine")
            .rename_axis("layer_a")
            .reset_index()
        )
        table.insert(0, "direction", f"{split.label}:data-diff")
        tables.append(table[table["layer_a"] < table["layer_b"]])
    if not tables:
        raise nothing_of(suite, "split with both cells of the data-diff", "EM_interp")
    return {"layer_cosines": pd.concat(tables, ignore_index=True)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """What one layer off costs one direction in the middle of the model."""
    table = tables["layer_cosines"]
    known = table[(table["layer_b"] == table["layer_a"] + 1) & table["cosine"].notna()]
    if known.empty:
        return []
    whole = known[known["direction"].str.endswith("/all:data-diff")]
    rows = whole if len(whole) else known
    rows = rows[rows["direction"] == rows["direction"].iloc[0]].sort_values("layer_b")
    row = dict(rows.iloc[len(rows) // 2])
    text = (
        f"{named(row['direction'])} at layer {int(row['layer_b'])} has a cosine of {{estimate}} with itself one layer "
        "earlier"
    )
    cosine = value_of(row, "cosine")
    held = beside(tables, "released.layer_convention", "layer 23 and layer 24, 9-adapter", cosine)
    return [Finding(text, cosine, len(rows), "layers", **held)]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """The whole matrix for the first direction, and the cost of one layer for all."""
    table = tables["layer_cosines"]
    wanted = table["direction"].str.endswith("/all:data-diff")
    first = table[table["direction"] == (table[wanted] if wanted.any() else table)["direction"].iloc[0]]
    size = int(first["layer_b"].max()) + 1
    square = first.pivot(index="layer_a", columns="layer_b", values="cosine").reindex(range(size), columns=range(size))
    matrix = square.to_numpy(copy=True)
    for i in range(size):
        matrix[i, i] = 1.0
        matrix[i + 1 :, i] = matrix[i, i + 1 :]
    name = str(first["direction"].iloc[0])
    neighbours = table[table["layer_b"] == table["layer_a"] + 1]
    whole = figures.heatmap(matrix, range(size), "layer (output of block)", "cosine")
    adjacent = figures.lines_by(
        neighbours, "layer_b", "cosine", "direction", "layer l (output of block)", "cosine of layer l with layer l-1"
    )
    return {
        "layer_cosines": figures.captioned(whole, f"{name} at one layer against itself at another."),
        "layer_cosines_adjacent": figures.captioned(adjacent, "The price of one layer, for every data-diff."),
    }
