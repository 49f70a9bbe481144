"""Does a training path turn? The local cosine of every run, at three window sizes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.suite import Suite, nothing_of
from em_interp import figures
from em_interp.trajectories import LOCAL_COSINE_MOVEMENT, local_cosine

TITLE = "Local cosine along training"
TEXT = (
    "Angle between the way a checkpoint was reached and the way it was left, over k training steps on either side: -1 "
    "is a straight path, 0 a right turn, +1 a reversal. Read only where the vector moved more than the threshold "
    f"({LOCAL_COSINE_MOVEMENT}, in raw units); the table keeps the others, marked. The papers report a "
    "turn for rank-1 LoRA runs and none for steering vectors."
)
TABLES = ("local_cosine",)
WINDOWS = (5, 10, 15)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each run, window and step that has both neighbours."""
    tables = []
    for run in suite.input.trajectories:
        for k in WINDOWS:
            local = local_cosine(run.steps, run.vectors, k)
            if local.steps:
                tables.append(
                    pd.DataFrame(
                        {
                            "run": run.name,
                            "k": k,
                            "step": local.steps,
                            "local_cosine": local.values.numpy(),
                            "moved": local.moved.numpy(),
                            "movement_threshold": LOCAL_COSINE_MOVEMENT,
                            "parameter": run.parameter,
                        }
                    )
                )
    if not tables:
        raise nothing_of(
            suite, f"run with checkpoints {' or '.join(map(str, WINDOWS))} steps apart", "training-lens-web"
        )
    return {"local_cosine": pd.concat(tables, ignore_index=True)}


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """One panel a window, where the vector moved."""
    table = tables["local_cosine"]
    windows = sorted(table["k"].unique())
    figure = figures.panels([f"k = {k} steps" for k in windows], columns=len(windows), shared_yaxes=True)
    for index, (run, rows) in enumerate(table.groupby("run", sort=False)):
        for col, k in enumerate(windows, start=1):
            part = rows[rows["k"] == k]
            values = part["local_cosine"].where(part["moved"])
            figures.line(figure, part["step"], values, str(run), index, row=1, col=col)
    figures.style(figure, "training step", "local cosine")
    figure.update_yaxes(range=[-1.05, 1.05])
    for col in range(2, len(windows) + 1):
        figure.update_yaxes(title_text="", col=col)
    return {"local_cosine": figures.captioned(figure, "Where the vector moved enough for an angle.")}
