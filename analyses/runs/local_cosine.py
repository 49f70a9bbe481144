"""Does a training path turn? The local cosine of every run, at three window sizes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import Finding, named, said
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.training.trajectories import LOCAL_COSINE_MOVEMENT, Trajectory, local_cosine

TITLE = "Local cosine along training"
TEXT = (
    "Angle between the way a checkpoint was reached and the way it was left, over k training steps on either "
    "side: -1 is a straight path, 0 a right turn, +1 a reversal. Read only where the vector moved more than the "
    f"threshold ({LOCAL_COSINE_MOVEMENT}, in raw units); the table keeps the others, marked. The papers report a "
    "turn for rank-1 LoRA runs and none for steering vectors. k is 5, 10 and 15 as in the papers where a run's "
    "checkpoints allow all three, else one, two and three times their spacing."
)
TABLES = ("local_cosine",)
NEEDS = (Need.CHECKPOINTS,)
WINDOWS = (5, 10, 15)
WINDOW_NAMES = ("shortest window", "middle window", "longest window")


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
                            "kl_weight": run.run.kl_weight,
                            "phase": run.run.phase,
                        }
                    )
                )
    if not tables:
        raise nothing_of(suite, "run with three evenly spaced checkpoints", "training-lens-web")
    return {"local_cosine": pd.concat(tables, ignore_index=True)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """Between what the local cosine of the first run of each kind lies, over the longest window."""
    table = tables["local_cosine"]
    found = []
    for kind, rows in table.groupby("parameter", sort=False):
        run = rows["run"].iloc[0]
        known = rows[(rows["run"] == run) & rows["moved"].astype(bool) & rows["local_cosine"].notna()]
        if known.empty:
            continue
        last = known[known["window"] == known["window"].max()]
        values = last["local_cosine"].astype(float)
        text = (
            f"{named(run)} ({kind}): over {int(last['k'].iloc[0])} steps on either side the local cosine lies between "
            f"{said(float(values.min()))} and {{estimate}}, where -1 is a straight path and 0 a right turn"
        )
        held = beside({"local_cosine": last}, "runs.local_cosine", "no-KL run, k = 15, largest")
        is_vector = kind == "steering-vector"
        given: dict[str, Any] = {"published": -0.13, "source": "LW, fn. 5"} if is_vector else {}
        verdict = held.get("verdict", "")
        found.append(Finding(text, float(values.max()), len(values), "checkpoints", verdict=verdict, **given))
    return found


def labels(rows: pd.DataFrame) -> pd.Series:  # type: ignore[type-arg]
    """What distinguishes a run within its family: KL weight and phase where the names say them, else the name."""
    if not {"kl_weight", "phase"} <= set(rows):
        return rows["run"]
    weights, phases = rows["kl_weight"], rows["phase"]

    def label(run: str, weight: float, phase: object) -> str:
        if not np.isfinite(weight):
            return run
        text = "no KL" if weight == 0 else "KL " + re.sub(r"e\+0*", "e", f"{weight:.3g}")
        return text + (f", {str(phase).replace('_', ' ')}" if isinstance(phase, str) else "")

    made = [
        label(r, float(w) if w is not None else np.nan, p) for r, w, p in zip(rows["run"], weights, phases, strict=True)
    ]
    unique = pd.DataFrame({"run": rows["run"], "label": made}).drop_duplicates()
    return pd.Series(rows["run"] if unique["label"].duplicated().any() else made, index=rows.index)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """A panel a run, a line a window, where the vector moved."""
    table = tables["local_cosine"]
    table = table.assign(label=labels(table))
    runs = table[["run", "label"]].drop_duplicates("run").set_index("run")["label"]
    figure = figures.panels([str(label) for label in runs], share_x=False)
    for number, run in enumerate(runs.index):
        rows = table[table["run"] == run]
        for window, part in rows.groupby("window"):
            values = part["local_cosine"].where(part["moved"].astype(bool))
            figures.line(figure, part["step"], values, WINDOW_NAMES[int(window) - 1], int(window) - 1, panel=number)
    figures.null_line(figure, -1.0, "straight path (0: a right turn)")
    figures.style(figure, "training step", "local cosine", height=figures.HEIGHT if len(runs) == 1 else 290)
    figure.update_yaxes(range=[-1.1, 1.05])
    caption = "Local cosine of each run over three windows, where the vector moved enough for an angle."
    return {"local_cosine": figures.captioned(figure, caption)}
