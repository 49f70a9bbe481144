"""Does the narrow solution drift back once the KL penalty goes? Continued runs, first against last checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import WHY_GENERAL, Finding, clause, named, said, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.errors import EmInterpError
from em_interp.training.trajectories import drift, find_references

TITLE = "KL removed: drift from narrow to general"
TEXT = (
    "Runs that were continued under another loss (their names say then_...): cosine to the general and to the narrow "
    "solution, and norm, at the first and the last checkpoint. The paper's claim is that without the KL penalty the "
    "solution leaves the narrow one and moves towards the general one."
)
TABLES = ("kl_removal",)
NEEDS = (Need.CHECKPOINTS,)
CHAPTER = WHY_GENERAL


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a continued run, and one for the two reference solutions against each other."""
    rows = []
    for runs in suite.input.families().values():
        continued = [run for run in runs if run.run.phase is not None]
        references = find_references(runs, suite.input.trajectories, suite.general, suite.narrow)
        for run in continued:
            try:
                d = drift(run, references)
            except EmInterpError as error:
                suite.note(error)
                continue
            assert references.general is not None and references.narrow is not None  # drift raised otherwise
            effective = run.norms()
            ends = references.general.vectors[-1].double(), references.narrow.vectors[-1].double()
            rows.append(
                {
                    "run": run.name,
                    "first_step": d.first_step,
                    "last_step": d.last_step,
                    "cos_general_start": d.cos_general[0],
                    "cos_general_end": d.cos_general[1],
                    "cos_narrow_start": d.cos_narrow[0],
                    "cos_narrow_end": d.cos_narrow[1],
                    "raw_norm_start": d.raw_norm[0],
                    "raw_norm_end": d.raw_norm[1],
                    "norm_start": None if effective is None else float(effective[0]),
                    "norm_end": None if effective is None else float(effective[-1]),
                    "drift_to_general": d.towards_general,
                    "cos_general_narrow": float(ends[0] @ ends[1] / (ends[0].norm() * ends[1].norm())),
                    "general_run": references.general.name,
                    "narrow_run": references.narrow.name,
                }
            )
    if not rows:
        raise nothing_of(suite, "continued run (named ..._then_...) with both reference runs", "training-lens-web")
    return {"kl_removal": pd.DataFrame(rows)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """How both cosines of each continued run changed."""
    table = tables["kl_removal"]
    found = []
    for row in table.to_dict("records"):
        general, narrow = (
            [value_of(row, f"cos_{of}_{when}") for when in ("start", "end")] for of in ("general", "narrow")
        )
        if math.isnan(general[1] - general[0]):
            continue
        text = (
            f"{named(row['run'])}: with another loss, the cosine to the general solution goes from {said(general[0])} "
            f"to {said(general[1])}, a change of {{estimate}}"
        )
        text += clause("; to the narrow one from {} to {}", *map(said, narrow))
        given: dict[str, Any] = beside({"kl_removal": pd.DataFrame([row])}, "runs.kl_removal", "cos general end")
        if given:
            given |= {"published": 0.304, "source": "P1, Fig. 5: .545 to .849", "first": True}
            given |= {"asked": "Drift: rise of the cosine to the general solution, once KL is gone"}
            given |= {"beside": f"from {said(general[0])} to {said(general[1])}"}
        found.append(Finding(text, general[1] - general[0], 1, "runs", **given))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """An arrow for each run in the plane of the two cosines."""
    table = tables["kl_removal"]
    figure = go.Figure()
    for index, row in enumerate(table.itertuples()):
        x, y = [row.cos_narrow_start, row.cos_narrow_end], [row.cos_general_start, row.cos_general_end]
        steps = [f"step {row.first_step}", f"step {row.last_step}"]
        figures.line(figure, x, y, str(row.run), index, markers=True, hover=steps)
        ends = {"x": x[1], "y": y[1], "ax": x[0], "ay": y[0]} | dict.fromkeys(("xref", "axref"), "x")
        ends |= dict.fromkeys(("yref", "ayref"), "y")
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        figure.add_annotation(
            **ends, text="", showarrow=True, arrowhead=2, arrowsize=1.5, arrowwidth=2, arrowcolor=colour
        )
    line = {"color": figures.NEUTRAL, "width": 1.5, "dash": "dashdot"}
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, name="as close to both", hoverinfo="skip"))
    figures.style(figure, "cosine to the narrow solution", "cosine to the general solution")
    cosines = table[[f"cos_{of}_{when}" for of in ("general", "narrow") for when in ("start", "end")]]
    least = min(0.0, float(cosines.to_numpy(dtype=float).min()) - 0.05)
    figure.update_xaxes(range=[least, 1.05]).update_yaxes(range=[least, 1.05])
    caption = "Arrows from the first to the last checkpoint after the loss changed."
    return {"kl_removal": figures.captioned(figure, caption)}
