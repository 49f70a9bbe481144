"""Where does the training loss pull along each run: towards the general or towards the narrow solution?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, clause, decided, named, said, value_of
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.errors import EmInterpError, UsageError
from em_interp.statistics import NORMAL, PERCENT
from em_interp.training import gradients
from em_interp.training.gradients import gradient_cosines
from em_interp.training.trajectories import Trajectory, find_references

TITLE = "Gradients along the training runs"
TEXT = (
    "Minus the gradient of the training loss (without KL, on chats of the kind trained on) at checkpoints of "
    "every run, and its cosine with the general and the narrow solution (P1 App. K.3): where the data alone would "
    "move theta. null_sd is the standard deviation of a random direction's cosine. For LoRA the space is that of "
    "the changed weights; the columns cos_..._b hold the papers' convention, B alone."
)
TABLES = ("gradients",)
NEEDS = (Need.CHECKPOINTS, Need.LOSSES)
CHECKPOINTS = 6
CHATS = 60


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a run and checkpoint."""
    tables = []
    for family, runs in suite.finetunes.families().items():
        references = find_references(runs, suite.finetunes.trajectories, suite.general, suite.narrow)
        suite.note(*references.problems)
        if references.general is None or references.narrow is None:
            continue
        for run in runs:
            try:
                table = cosines(suite, family, run.name)
            except EmInterpError as error:
                suite.note(error)
                continue
            tables.append(table.assign(run=run.name, family=family, parameter=run.parameter))
    if not tables:
        raise nothing_of(suite, "training run with checkpoints and both reference runs")
    return {"gradients": pd.concat(tables, ignore_index=True)}


def tasks(suite: Suite) -> list[Task]:
    """The gradients of each run."""
    families = suite.finetunes.families()
    return [Task(f"gradients of {r.name}", cosines, (f, r.name), 5.0) for f, runs in families.items() for r in runs]


def cosines(suite: Suite, family: str, name: str) -> pd.DataFrame:
    """`gradient_cosines` of a run of a family. Raises `UsageError` where that has no general and narrow run."""
    finetunes = suite.finetunes
    runs = finetunes.families()[family]
    references = find_references(runs, finetunes.trajectories, suite.general, suite.narrow)
    if references.general is None or references.narrow is None:
        raise UsageError(f"{family} has no general and narrow run to compare with: name them with --general, --narrow.")
    general, narrow = (
        list(finetunes.checkpoints(run.name).values())[-1] for run in (references.general, references.narrow)
    )
    chats = finetunes.training_chats(_domain(family), CHATS)
    checkpoints = finetunes.checkpoints(name)
    chosen = {step: checkpoints[step] for step in _spread(next(run for run in runs if run.name == name))}
    fingerprints = {step: theta.fingerprint for step, theta in chosen.items()}
    made_by = finetunes.made_of(
        chats=finetunes.texts_hash(chats),
        checkpoints=fingerprints,
        general=general.fingerprint,
        narrow=narrow.fingerprint,
    )
    return suite.results.table(
        "losses",
        f"{name} gradients",
        made_by,
        lambda _: gradient_cosines(finetunes.chat, chosen, chats, general=general, narrow=narrow, progress=False),
        code=(gradients.__name__,),
    )


def _domain(family: str) -> str:
    return family.split("-")[0]


def _spread(run: Trajectory) -> list[int]:
    """At most `CHECKPOINTS` steps, evenly spaced, both ends included."""
    index = np.linspace(0, len(run.steps) - 1, min(CHECKPOINTS, len(run.steps))).round().astype(int)
    return [run.steps[i] for i in dict.fromkeys(index.tolist())]


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """Where the loss pulls at the end of each narrow run, or of the last run of a family without one."""
    found = []
    for _, rows in tables["gradients"].groupby("family", sort=False):
        names = list(dict.fromkeys(rows["run"]))
        run = next((name for name in names if str(name).endswith("narrow")), names[-1])
        known = rows[(rows["run"] == run) & rows["cos_general"].notna()].sort_values("step")
        if known.empty:
            continue
        row = dict(known.iloc[-1])
        ends = value_of(row, "cos_general_low"), value_of(row, "cos_general_high")
        null = NORMAL * value_of(row, "null_sd")
        text = (
            f"{named(run)}, last checkpoint: the direction in which the loss falls has a cosine of {{estimate}} with "
            "the general solution"
        )
        text += clause(" and of {} with the narrow one", said(value_of(row, "cos_narrow")))
        text += clause("; random directions stay within {}", said(null))
        n = int(row["n_conversations"])
        found.append(Finding(text, value_of(row, "cos_general"), n, "chats", *ends, verdict=decided(*ends, null)))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Both cosines against the step, a line a run; one figure a family."""
    drawn = {}
    columns = (("cos_general", "with the general solution"), ("cos_narrow", "with the narrow solution"))
    for number, (family, rows) in enumerate(tables["gradients"].groupby("family", sort=False)):
        panels = figures.panels([title for _, title in columns])
        for index, (name, run) in enumerate(rows.groupby("run", sort=False)):
            label = str(name).removeprefix(f"{family}-")
            for panel, (column, _) in enumerate(columns):
                low, high = (run.get(f"{column}_{end}") for end in ("low", "high"))
                figures.line(
                    panels, run["step"], run[column], label, index, markers=True, low=low, high=high, panel=panel
                )
        half = NORMAL * float(rows["null_sd"].max())
        for panel in range(len(columns)):
            figures.null_band(panels, half, f"random directions, {PERCENT}", panel=panel)
        figures.style(panels, "training step", "cosine of minus the gradient")
        caption = f"{family}: where the loss pulls at each checkpoint; intervals over chats."
        drawn["gradients" if number == 0 else f"gradients_{number + 1}"] = figures.captioned(panels, caption)
    return drawn
