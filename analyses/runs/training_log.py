"""Loss and gradient norm over training, as the released trainer states recorded them."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, greatest, named
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures

TITLE = "Loss and gradient norm"
TEXT = (
    "From the last checkpoint's trainer_state.json of each run that has one. The gradient norm's prolonged peak in the "
    "rank-1 runs coincides with the turn of B; it has been traced to the empty assistant turn at the end of the "
    "reference training text, so compare only runs trained on the same text."
)
TABLES = ("training_log",)
NEEDS = (Need.RELEASED,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a logged step."""
    tables = [
        pd.DataFrame({"run": log.run, "step": log.steps, "loss": log.loss, "grad_norm": log.grad_norm})
        for log in suite.published.logs
    ]
    if not tables:
        raise nothing_of(suite, "trainer_state.json beside checkpoints", "Qwen2.5-14B-Instruct_R1_0_1_0_extended_train")
    return {"training_log": pd.concat(tables, ignore_index=True)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """When the gradient norm of each run is largest."""
    found = []
    for run, rows in tables["training_log"].groupby("run", sort=False):
        known = rows[rows["grad_norm"].notna()].reset_index(drop=True)
        if len(known):
            peak = greatest(known, "grad_norm")
            text = (
                f"{named(run)}: the gradient norm is largest, {{estimate}}, at step {int(peak['step'])} of "
                f"{int(known['step'].max())}"
            )
            found.append(Finding(text, float(peak["grad_norm"]), len(known), "logged steps"))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Loss and gradient norm, one panel each."""
    table = tables["training_log"]
    figure = figures.panels(["loss (nats per token)", "gradient norm"], share_y=False)
    for index, (run, rows) in enumerate(table.groupby("run", sort=False)):
        for number, column in enumerate(("loss", "grad_norm")):
            part = rows[rows[column].notna()]
            figures.line(figure, part["step"], part[column], str(run), index, panel=number)
    figures.style(figure, "training step", "as logged")
    return {"training_log": figures.captioned(figure, "Loss and gradient norm as the trainer logged them.")}
