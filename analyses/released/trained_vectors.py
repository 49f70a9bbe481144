"""Trained steering vectors against the mean-diff: two things called the misalignment direction."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import ONE_DIRECTION, Finding, clause, greatest, named, said, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.directions.cosines import COSINE_COLUMNS, comparable, cosine_rows
from em_interp.directions.direction import Direction
from em_interp.errors import EmInterpError
from em_interp.statistics import NORMAL, PERCENT

TITLE = "Trained vectors against mean-diff directions"
TEXT = (
    "Cosine of the end of every steering-vector run (a vector added at one layer, whose layer the file names) with the "
    "data-diff directions at every layer. They are close to orthogonal: the vector that training finds and the mean "
    "difference of activations are different objects. Only the row at the vector's own layer compares like with like; "
    "the others show that no layer convention would change the picture."
)
TABLES = ("trained_cosines",)
NEEDS = (Need.RELEASED,)
CHAPTER = ONE_DIRECTION


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Columns of `cosines`, with `layer` that of the data-diff, and `vector_layer`."""
    data = suite.published
    tables = []
    for trajectory in data.trajectories:
        if trajectory.parameter != "steering-vector":
            continue
        try:
            end = trajectory.final()
        except EmInterpError as error:
            suite.note(error)
            continue
        for split in data.splits:
            if "data-diff" not in split.kinds:
                continue
            direction = split.direction("data-diff")
            # The vector lives at one layer; it is set against every layer of the direction on purpose.
            spread = Direction(
                vectors=end.expand(len(direction.layers), -1),
                layers=direction.layers,
                kind="steering-vector",
                model=trajectory.model,
            )
            if not comparable(spread, direction):
                continue
            rows = cosine_rows(trajectory.name, spread, f"{split.label}:data-diff", direction)
            tables.append(rows.assign(vector_layer=trajectory.layer, family=trajectory.family))
    if not tables:
        raise nothing_of(
            suite, "steering-vector run and mean activations of the same model", "training-lens-web EM_interp"
        )
    table = pd.concat(tables, ignore_index=True)
    return {"trained_cosines": table[[*COSINE_COLUMNS, "vector_layer", "family"]]}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The largest cosine of a trained vector with one data-diff at the vector's own layer."""
    chosen = _one_direction(tables["trained_cosines"])
    own = chosen[(chosen["layer"] == chosen["vector_layer"]) & chosen["cosine"].notna()]
    if own.empty:
        return []
    row = greatest(own, "cosine", size=True)
    text = (
        f"At their own layer, trained vectors have cosines with {named(row['direction_b'])} of at most {{estimate}} in "
        f"size ({named(row['direction_a'])})"
    )
    null = said(NORMAL * value_of(row, "null_sd"))
    text += clause("; random directions stay within {}", null)
    given: dict[str, Any] = {"published": 0.04, "source": "P2, sec. 3.5: .04 for LoRA B", "first": True}
    given |= {"asked": "Trained vectors: largest cosine with it", "beside": clause("random within {}", null)}
    return [Finding(text, abs(value_of(row, "cosine")), len(own), "vectors", **given)]


def _one_direction(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the data-diff of each whole finetune, or of the first."""
    whole = table["direction_b"].str.endswith("/all:data-diff")
    return table[whole] if whole.any() or table.empty else table[table["direction_b"] == table["direction_b"].iloc[0]]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Cosine by layer of the direction, for one direction of each model and every run."""
    chosen = _one_direction(tables["trained_cosines"])
    title = "layer of the mean-diff (output of block)"
    figure = figures.lines_by(chosen, "layer", "cosine", "direction_a", title, "cosine")
    figures.null_band(figure, NORMAL * float(chosen["null_sd"].iloc[0]), f"random directions, {PERCENT}")
    for layer in chosen["vector_layer"].dropna().unique():
        figures.null_line(figure, float(layer), f"the vectors' own layer, {layer:g}", axis="x")
    figures.style(figure, title, "cosine")
    limit = max(0.1, 1.2 * float(chosen["cosine"].abs().max()))
    figure.update_yaxes(range=[-limit, limit])
    caption = f"The end of each run against {chosen['direction_b'].iloc[0]}, by layer."
    return {"trained_cosines": figures.captioned(figure, caption)}
