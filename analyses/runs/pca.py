"""Principal components of the training runs, standardised as published and raw, held against the stored ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import Finding, named, said
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.errors import EmInterpError
from em_interp.published.scan import StoredPCA
from em_interp.training.trajectories import Trajectory, TrajectoryPCA, fit_pca

TITLE = "PCA of the training runs"
TEXT = (
    "Explained variance of the stacked checkpoints of one family of runs, each coordinate standardised first and "
    "raw. Continued runs (then_...) are projected, not fitted."
)
ALSO = {
    "published": (
        "The authors' web app standardises. Where its pca_results.json lies beside the runs, its basis is fitted and "
        "our ratios and projections are held against the stored ones; a component's sign is arbitrary and aligned "
        "first."
    ),
}
TABLES = ("pca", "pca_raw", "pca_stored")
NEEDS = (Need.CHECKPOINTS,)


def fit_families(suite: Suite) -> dict[tuple[str, bool], TrajectoryPCA]:
    """(family, standardised) -> fit. The basis is the stored PCA's where there is one, else the uncontinued runs."""
    fits: dict[tuple[str, bool], TrajectoryPCA] = {}
    for family, runs in suite.input.families().items():
        names = {run.name for run in runs}
        stored = [s for s in suite.input.stored_pca if set(s.basis) <= names]
        basis = [r for r in runs if (r.name in stored[0].basis if stored else r.run.phase is None)] or runs
        for standardised in (True, False):
            if sum(len(run.steps) for run in basis) < 3:
                continue
            try:
                fits[family, standardised] = fit_pca(basis, standardised=standardised)
            except EmInterpError as error:
                suite.note(error)
    return fits


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """`pca` (standardised, as published), `pca_raw`: a row a component. `pca_stored`: disagreement by run."""
    fits = fit_families(suite)
    if not fits:
        raise nothing_of(suite, "training run with at least 3 checkpoints", "training-lens-web")
    families = suite.input.families()
    rows = []
    for (family, standardised), fit in fits.items():
        stored = _stored_for(suite, family, fit) if standardised else None
        for i, ratio in enumerate(fit.explained_variance_ratio):
            known = stored is not None and i < len(stored.explained_variance_ratio)
            rows.append(
                {
                    "component": i + 1,
                    "explained_variance_ratio": ratio,
                    "variant": "standardised" if standardised else "raw",
                    "family": family,
                    "cumulative": float(fit.explained_variance_ratio[: i + 1].sum()),
                    "stored": stored.explained_variance_ratio[i] if known and stored is not None else np.nan,
                    "basis": " ".join(fit.basis),
                }
            )
    checks = []
    for (family, standardised), fit in fits.items():
        stored = _stored_for(suite, family, fit) if standardised else None
        if stored is not None:
            checks += _compare(stored, fit, families[family])
    columns = ["run", "component", "n_checkpoints", "max_abs_difference", "stored_rms", "relative_difference"]
    table = pd.DataFrame(rows)
    return {
        "pca": table[table["variant"] == "standardised"],
        "pca_raw": table[table["variant"] == "raw"].drop(columns="stored"),
        "pca_stored": pd.DataFrame(checks, columns=columns),
    }


def _stored_for(suite: Suite, family: str, fit: TrajectoryPCA) -> StoredPCA | None:
    return next((s for s in suite.input.stored_pca if set(s.basis) == set(fit.basis)), None)


def _compare(
    stored: StoredPCA, fit: TrajectoryPCA, runs: list[Trajectory]
) -> list[tuple[str, int, int, float, float, float]]:
    pairs = []
    for run in runs:
        if run.name not in stored.projections:
            continue
        steps, points = stored.projections[run.name]
        index = {step: i for i, step in enumerate(run.steps)}
        common = [(i, index[s]) for i, s in enumerate(steps) if s in index]
        width = min(points.shape[1], len(fit.components))
        ours = fit.project(run.vectors)[[j for _, j in common], :width]
        pairs.append((run.name, points[[i for i, _ in common], :width], ours))
    rows = []
    width = min((theirs.shape[1] for _, theirs, _ in pairs), default=0)
    for c in range(width):
        sign = np.sign(sum(float(theirs[:, c] @ ours[:, c]) for _, theirs, ours in pairs)) or 1.0
        for name, theirs, ours in pairs:
            worst = float(np.abs(theirs[:, c] - sign * ours[:, c]).max())
            rms = float(np.sqrt(np.mean(theirs[:, c] ** 2)))
            rows.append((name, c + 1, len(theirs), worst, rms, worst / rms if rms else np.inf))
    return rows


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """What three components hold, for the family of most runs."""
    both = _largest_family(tables)
    shares = {
        str(variant): 100 * float(rows.sort_values("component")["explained_variance_ratio"].head(3).sum())
        for variant, rows in both.groupby("variant", sort=False)
        if rows["explained_variance_ratio"].notna().any()
    }
    if "standardised" not in shares:
        return []
    n = int(both["basis"].iloc[0].count(" ")) + 1
    family = named(both["family"].iloc[0])
    raw = f"; of the raw ones, {said(shares['raw'], '%')}" if "raw" in shares else ""
    text = f"Three components hold {{estimate}} of the variance of the standardised checkpoints of {family}{raw}"
    held = beside(tables, "runs.pca", "PC1-3 together")
    verdict = held.get("verdict", "") if len(tables["pca"]["family"].unique()) == 1 else ""
    source = "LW: 79% in three components"
    return [Finding(text, shares["standardised"], n, "runs", unit="%", published=79.05, source=source, verdict=verdict)]


def _largest_family(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of both variants of the family of most runs."""
    table = pd.concat([tables["pca"], tables["pca_raw"]], ignore_index=True)
    families = table.assign(runs=table["basis"].str.count(" ")).sort_values("runs", kind="stable")
    return table[table["family"] == families["family"].iloc[-1]] if len(table) else table


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Explained variance by component, standardised, raw and stored, for the family of most runs."""
    table = _largest_family(tables)
    wide = table.pivot(index="component", columns="variant", values="explained_variance_ratio")
    wide["stored by the authors"] = table[table["variant"] == "standardised"].set_index("component")["stored"]
    wide = wide.dropna(axis="columns", how="all").reset_index()
    wide["component"] = "PC" + wide["component"].astype(str)
    names = [name for name in ("standardised", "raw", "stored by the authors") if name in wide]
    groups = [(name, name, None, None) for name in names]
    figure = figures.dot_plot(wide, "component", groups, "explained variance (%)", scale=100)
    figure.update_xaxes(rangemode="tozero")
    caption = f"Share of variance by principal component; family {table['family'].iloc[0]}."
    return {"pca": figures.captioned(figure, caption)}
