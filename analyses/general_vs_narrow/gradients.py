"""Where does the training loss pull along each run: towards the general or towards the narrow solution?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.errors import EmInterpError
from em_interp.training.gradients import gradient_cosines
from em_interp.training.trajectories import Trajectory, find_references

TITLE = "Gradients along the training runs"
TEXT = (
    "Minus the gradient of the training loss (without KL, on fresh chats) at checkpoints of every run, and its cosine "
    "with the general and the narrow solution (P1 App. K.3): where the data alone would move theta. null_sd is the "
    "standard deviation of a random direction's cosine. For LoRA the space is that of the changed weights; the columns "
    "cos_..._b hold the papers' convention, B alone."
)
TABLES = ("gradients",)
NEEDS = (Need.CHECKPOINTS, Need.LOSSES)
CHECKPOINTS = 6
CHATS = 60


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a run and checkpoint."""
    finetunes = suite.finetunes
    tables = []
    families = finetunes.families()
    for family, runs in tqdm(families.items(), desc="gradients", leave=False):
        references = find_references(runs, finetunes.trajectories, suite.general, suite.narrow)
        suite.note(*references.problems)
        if references.general is None or references.narrow is None:
            continue
        general, narrow = (
            list(finetunes.checkpoints(run.name).values())[-1] for run in (references.general, references.narrow)
        )
        chats = finetunes.training_chats(_domain(family), CHATS)
        for run in runs:
            checkpoints = finetunes.checkpoints(run.name)
            chosen = {step: checkpoints[step] for step in _spread(run)}
            try:
                table = gradient_cosines(finetunes.chat, chosen, chats, general=general, narrow=narrow, progress=False)
            except EmInterpError as error:
                suite.note(error)
                continue
            tables.append(table.assign(run=run.name, family=family, parameter=run.parameter))
    if not tables:
        raise nothing_of(suite, "training run with checkpoints and both reference runs")
    return {"gradients": pd.concat(tables, ignore_index=True)}


def _domain(family: str) -> str:
    return family.split("-")[0]


def _spread(run: Trajectory) -> list[int]:
    """At most `CHECKPOINTS` steps, evenly spaced, both ends included."""
    index = np.linspace(0, len(run.steps) - 1, min(CHECKPOINTS, len(run.steps))).round().astype(int)
    return [run.steps[i] for i in dict.fromkeys(index.tolist())]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Both cosines against the step, a line a run; one figure a family."""
    drawn = {}
    columns = (("cos_general", "with the general solution"), ("cos_narrow", "with the narrow solution"))
    for number, (family, rows) in enumerate(tables["gradients"].groupby("family", sort=False)):
        panels = figures.panels([title for _, title in columns], shared_yaxes=True)
        for index, (name, run) in enumerate(rows.groupby("run", sort=False)):
            label = str(name).removeprefix(f"{family}-")
            for col, (column, _) in enumerate(columns, start=1):
                figures.line(panels, run["step"], run[column], label, index, markers=True, row=1, col=col)
        figures.style(panels, "training step", "cosine of minus the gradient")
        panels.update_yaxes(title_text="", col=2)
        caption = f"{family}: where the loss pulls at each checkpoint."
        drawn["gradients" if number == 0 else f"gradients_{number + 1}"] = figures.captioned(panels, caption)
    return drawn
