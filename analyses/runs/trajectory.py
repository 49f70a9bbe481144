"""Where training goes: norm, cosine to both solutions and principal components at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.comparison import beside
from analyses.findings import Finding, clause, named, said, value_of
from analyses.runs.local_cosine import labels, windows
from analyses.runs.pca import fit_families
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.statistics import NORMAL, PERCENT, cosine_null_sd
from em_interp.training.trajectories import Trajectory, cosines_to, find_references, local_cosine

TITLE = "Training trajectories"
TEXT = (
    "Every checkpoint of every run. norm is that of the effective parameter theta (alpha times the vector; for LoRA "
    "the scaled product B A), raw_norm that of the vector as stored. Cosines are to the ends of the general and the "
    "narrow reference run. pc1 to pc3 are coordinates on the standardised PCA of the runs that were trained in one go; "
    "continued runs are projected on it. local_cosine is over local_k training steps (15 where the checkpoints allow "
    "it) and left empty where the vector moved too little for an angle. null_sd is the standard deviation of a random "
    "direction's cosine."
)
ALSO = {
    "published": "The authors' web app shows raw_norm.",
}
TABLES = ("trajectory",)
NEEDS = (Need.CHECKPOINTS,)
STORY = (5, "trajectory_cosines")
FIRST = ["run", "step", "norm", "cos_general", "cos_narrow", "local_cosine", "pc1", "pc2", "pc3"]


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a checkpoint, families one after another."""
    fits = fit_families(suite)
    tables = []
    for family, runs in suite.input.families().items():
        references = find_references(runs, suite.input.trajectories, suite.general, suite.narrow)
        suite.note(*references.problems)
        for run in runs:
            general = None if references.general is None else references.general.final()
            narrow = None if references.narrow is None else references.narrow.final()
            norms = run.norms()
            local_k = windows(run)[-1]
            local = local_cosine(run.steps, run.vectors, local_k)
            angles = {
                s: v for s, v, m in zip(local.steps, local.values.tolist(), local.moved.tolist(), strict=True) if m
            }
            table = pd.DataFrame(
                {
                    "run": run.name,
                    "step": run.steps,
                    "norm": np.nan if norms is None else norms.numpy(),
                    "cos_general": _cosines(run, general),
                    "cos_narrow": _cosines(run, narrow),
                    "local_cosine": [angles.get(step, np.nan) for step in run.steps],
                }
            )
            for prefix, standardised in (("pc", True), ("raw_pc", False)):
                fit = fits.get((family, standardised))
                points = None if fit is None else fit.project(run.vectors)
                for i in range(3):
                    has = points is not None and points.shape[1] > i
                    table[f"{prefix}{i + 1}"] = points[:, i] if has and points is not None else np.nan
            table["raw_norm"] = run.raw_norms().numpy()
            table["read_norm"] = np.nan if run.read_norms is None else run.read_norms.numpy()
            table["null_sd"] = cosine_null_sd(run.d)
            table["family"] = family
            table["local_k"] = local_k
            table["parameter"] = run.parameter
            table["layer"] = run.layer
            table["kl_weight"] = run.run.kl_weight
            table["phase"] = run.run.phase
            table["general_run"] = None if references.general is None else references.general.name
            table["narrow_run"] = None if references.narrow is None else references.narrow.name
            tables.append(table)
    if not tables:
        raise nothing_of(suite, "training run with checkpoints", "training-lens-web")
    return {"trajectory": pd.concat(tables, ignore_index=True)}


def _cosines(run: Trajectory, reference: Float[Tensor, " d"] | None) -> np.ndarray:
    """Cosine at each checkpoint; empty without a reference and where the vector is still zero (a fresh LoRA B)."""
    values = np.full(len(run.steps), np.nan)
    if reference is None or reference.numel() != run.d or not bool(torch.any(reference != 0)):
        return values
    nonzero = (run.vectors != 0).any(dim=1).numpy()
    values[nonzero] = cosines_to(run.vectors[torch.from_numpy(nonzero)], reference).numpy()
    return values


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """How close the narrow run of each family ends to the general one, and their norms."""
    table = tables["trajectory"]
    found = []
    for family, rows in table.groupby("family", sort=False):
        ends = rows.sort_values("step").drop_duplicates("run", keep="last").set_index("run", drop=False)
        general, narrow = ends["general_run"].iloc[0], ends["narrow_run"].iloc[0]
        if general not in ends.index or narrow not in ends.index or pd.isna(ends.loc[narrow, "cos_general"]):
            continue
        norm = "norm" if ends["norm"].notna().all() else "raw_norm"
        norms = [said(value_of(ends.loc[run].to_dict(), norm)) for run in (narrow, general)]
        text = f"{named(family)}: the narrow solution ends at a cosine of {{estimate}} to the general one"
        text += clause(", with a norm of {} against {}", *norms)
        held = beside({"trajectory": rows}, "runs.trajectory", "KL1e6: cosine to general at the end")
        verdict = held.get("verdict", "")
        published, source = 0.536, "released runs (P1, App. K.3: .55 for LoRA B)"
        n = int((rows["run"] == narrow).sum())
        estimate = float(ends.loc[narrow, "cos_general"])
        given: dict[str, Any] = {"published": published, "source": source, "verdict": verdict}
        found.append(Finding(text, estimate, n, "checkpoints", **given))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """The PCA plane, the norms, and the cosines to both ends, for each family of at least two runs (or each run)."""
    table = tables["trajectory"]
    drawn: dict[str, go.Figure] = {}
    sizes = table.groupby("family", sort=False)["run"].nunique().sort_values(ascending=False, kind="stable")
    for number, family in enumerate(sizes.index):
        rows = table[table["family"] == family].sort_values(["kl_weight", "phase", "run", "step"], na_position="first")
        suffix = "" if number == 0 else f"_{number + 1}"
        shown = rows.assign(label=labels(rows))
        if shown["pc2"].notna().any():
            caption = f"{family}: the first two principal components over training; markers at the last step."
            drawn[f"trajectory{suffix}"] = figures.captioned(_plane(shown), caption)
        norm = "norm" if shown["norm"].notna().any() else "raw_norm"
        unit = "effective norm ‖θ‖ (residual-stream units)" if norm == "norm" else "raw norm ‖v‖ (alpha unknown)"
        norms = figures.lines_by(shown, "step", norm, "label", "training step", unit)
        norms.update_yaxes(rangemode="tozero")
        drawn[f"trajectory_norms{suffix}"] = figures.captioned(norms, f"{family}: norm over training.")
        if shown[["cos_general", "cos_narrow"]].notna().any(axis=None):
            caption = f"{family}: cosine to the ends of the general and of the narrow run."
            drawn[f"trajectory_cosines{suffix}"] = figures.captioned(_cosine_panels(shown), caption)
    return drawn


def _plane(rows: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for index, (label, run) in enumerate(rows.groupby("label", sort=False)):
        figures.line(
            figure,
            run["pc1"],
            run["pc2"],
            str(label),
            index,
            hover=[f"step {s}" for s in run["step"]],
        )
        figure.add_trace(
            go.Scatter(
                x=run["pc1"].iloc[[-1]],
                y=run["pc2"].iloc[[-1]],
                mode="markers",
                marker={
                    "color": figures.COLOURS[index % len(figures.COLOURS)],
                    "symbol": figures.SYMBOLS[index % len(figures.SYMBOLS)],
                    "size": 12,
                },
                legendgroup=str(label),
                showlegend=False,
                hoverinfo="skip",
            )
        )
    return figures.style(figure, "PC1 (standardised coordinates)", "PC2 (standardised coordinates)", height=560)


def _cosine_panels(rows: pd.DataFrame) -> go.Figure:
    columns: Sequence[tuple[str, str]] = (
        ("cos_general", "to the general solution"),
        ("cos_narrow", "to the narrow solution"),
    )
    figure = figures.panels([title for _, title in columns])
    for index, (label, run) in enumerate(rows.groupby("label", sort=False)):
        for number, (column, _) in enumerate(columns):
            figures.line(figure, run["step"], run[column], str(label), index, panel=number)
    if "null_sd" in rows and rows["null_sd"].notna().any():
        for number in range(len(columns)):
            half = NORMAL * float(rows["null_sd"].max())
            figures.null_band(figure, half, f"random directions, {PERCENT}", panel=number)
    return figures.style(figure, "training step", "cosine")
