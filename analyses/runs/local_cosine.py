"""Does a training path turn? The local cosine of every run, at three window sizes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.training.trajectories import LOCAL_COSINE_MOVEMENT, Trajectory, local_cosine

TITLE = "Local cosine along training"
TEXT = (
    "Angle between the way a checkpoint was reached and the way it was left, over k training steps on either side: -1 "
    "is a straight path, 0 a right turn, +1 a reversal. Read only where the vector moved more than the threshold "
    f"({LOCAL_COSINE_MOVEMENT}, in raw units); the table keeps the others, marked. The papers report a turn for "
    "rank-1 LoRA runs and none for steering vectors. k is 5, 10 and 15 as in the papers where a run's checkpoints "
    "allow all three, else one, two and three times their spacing."
)
TABLES = ("local_cosine",)
NEEDS = (Need.CHECKPOINTS,)
WINDOWS = (5, 10, 15)


def windows(run: Trajectory) -> tuple[int, ...]:
    """The papers' windows where the run has checkpoints so far apart, else 1, 2 and 3 times its usual spacing."""
    steps = set(run.steps)
    if all(any({step - k, step + k} <= steps for step in steps) for k in WINDOWS) or len(run.steps) < 2:
        return WINDOWS
    spacings, counts = np.unique(np.diff(run.steps), return_counts=True)
    usual = int(spacings[counts.argmax()])
    return (usual, 2 * usual, 3 * usual)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each run, window and step that has both neighbours."""
    tables = []
    for run in suite.input.trajectories:
        for number, k in enumerate(windows(run), start=1):
            local = local_cosine(run.steps, run.vectors, k)
            if local.steps:
                tables.append(
                    pd.DataFrame(
                        {
                            "run": run.name,
                            "k": k,
                            "window": number,
                            "step": local.steps,
                            "local_cosine": local.values.numpy(),
                            "moved": local.moved.numpy(),
                            "movement_threshold": LOCAL_COSINE_MOVEMENT,
                            "parameter": run.parameter,
                        }
                    )
                )
    if not tables:
        raise nothing_of(suite, "run with three evenly spaced checkpoints", "training-lens-web")
    return {"local_cosine": pd.concat(tables, ignore_index=True)}


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """One panel a window, where the vector moved."""
    table = tables["local_cosine"]
    shown = {n: sorted(table.loc[table["window"] == n, "k"].unique()) for n in sorted(table["window"].unique())}
    titles = [f"k = {ks[0]}{f' to {ks[-1]}' if len(ks) > 1 else ''} steps" for ks in shown.values()]
    figure = figures.panels(titles, columns=len(shown), shared_yaxes=True)
    for index, (run, rows) in enumerate(table.groupby("run", sort=False)):
        for col, number in enumerate(shown, start=1):
            part = rows[rows["window"] == number]
            values = part["local_cosine"].where(part["moved"])
            figures.line(figure, part["step"], values, str(run), index, row=1, col=col)
    figures.style(figure, "training step", "local cosine")
    figure.update_yaxes(range=[-1.05, 1.05])
    for col in range(2, len(shown) + 1):
        figure.update_yaxes(title_text="", col=col)
    return {"local_cosine": figures.captioned(figure, "Where the vector moved enough for an angle.")}
