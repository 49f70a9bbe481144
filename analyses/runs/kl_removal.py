"""Does the narrow solution drift back once the KL penalty goes? Continued runs, first against last checkpoint."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

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


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """An arrow for each run in the plane of the two cosines."""
    table = tables["kl_removal"]
    figure = go.Figure()
    for index, row in enumerate(table.itertuples()):
        figures.line(
            figure,
            [row.cos_narrow_start, row.cos_narrow_end],
            [row.cos_general_start, row.cos_general_end],
            str(row.run),
            index,
            markers=True,
            text=[f"step {row.first_step}", f"step {row.last_step}"],
            hovertemplate="%{text}: to narrow %{x:.3f}, to general %{y:.3f}",
        )
        figure.add_annotation(
            x=row.cos_narrow_end,
            y=row.cos_general_end,
            ax=row.cos_narrow_start,
            ay=row.cos_general_start,
            xref="x",
            yref="y",
            axref="x",
            ayref="y",
            showarrow=True,
            arrowhead=2,
            arrowsize=1.5,
            arrowcolor=figures.COLOURS[index % 8],
        )
        for x, y, text, shift in (
            (row.cos_narrow_start, row.cos_general_start, f"step {row.first_step}", -16),
            (row.cos_narrow_end, row.cos_general_end, f"step {row.last_step}", 16),
        ):
            figure.add_annotation(x=x, y=y, text=text, showarrow=False, yshift=shift)
    figure.update_traces(showlegend=True)
    figures.style(figure, "cosine to the narrow solution", "cosine to the general solution")
    figure.update_xaxes(range=[0, 1.05])
    figure.update_yaxes(range=[0, 1.05])
    return {"kl_removal": figures.captioned(figure, "First to last checkpoint, in the plane of the two cosines.")}
