"""Does what the paper claims of general and narrow solutions hold for these organisms? One sentence a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, decided
from analyses.general_vs_narrow.stability import MIDDLE
from analyses.inputs.finetunes import Finetunes
from analyses.suite import Suite, nothing_of
from em_interp import figures
from em_interp.statistics import PERCENT, t_interval

TITLE = "The paper's claims, one by one"
TEXT = (
    "Each claim of P1 about general and narrow solutions, measured once for every training seed. Intervals are "
    f"Student's, {PERCENT}, over training seeds: three seeds make them wide. A claim holds where the whole interval is "
    "on its side, does not hold where the whole interval is on the other, and is not decided here in between or "
    "without two seeds. The tables of efficiency, stability and influence hold the intervals over questions and "
    "documents."
)
TABLES = ("claims",)
NEEDS = tuple(f"general_vs_narrow.{name}" for name in ("efficiency", "stability", "influence", "register"))
STORY = (3, "claims_stability")


@dataclass(frozen=True)
class Claim:
    """What is claimed (`text`), and the measure, in its unit, that speaks for it above `neutral`."""

    text: str
    measure: str
    found: str
    """What was measured, whichever way it came out, as a finding's text says it."""
    axis: str
    """Title of the figure's axis, with its unit."""
    unit: str = ""
    neutral: float = 0.0


CLAIMS = {
    "efficiency": Claim(
        "The general solution has the lower loss at equal norm",
        "its loss is lower by (nats per token, at the mean of both trained norms)",
        "narrow minus general loss is {estimate}",
        "narrow minus general loss (nats per token)",
        "nats per token",
    ),
    "stability": Claim(
        "The general solution is more stable under perturbation",
        "share of its gain that it loses less, mean over eps .2, .4, .6, .8 (percentage points)",
        "of its gain the narrow one loses {estimate} more",
        "narrow minus general: gain lost (percentage points)",
        "percentage points",
    ),
    "kl_removal": Claim(
        "Once the KL penalty is gone, the narrow solution drifts to the general one",
        "rise of the cosine to the general solution",
        "the change of their cosine is {estimate}",
        "rise of the cosine to the general solution",
    ),
    "influence": Claim(
        "The general direction matters more on pre-training text at equal norm",
        "ratio of the two KLs",
        "its KL is {estimate} the narrow one's",
        "KL of general / KL of narrow (ratio)",
        "times",
        neutral=1.0,
    ),
}


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a task, claim and adapter."""
    rows = []
    for task in suite.finetunes.tasks:
        found = _by_seed(suite, task)
        if task == "persona" and "kl_removal" not in set(found["measured"]):
            what = "organism that was trained on without KL, so the claim about KL removal has no row"
            suite.note(nothing_of(suite, what))
        for (measured_by, adapter), group in found.groupby(["measured", "adapter"], sort=False):
            rows.append(_row(task, str(measured_by), str(adapter), group["value"].to_numpy(float)))
    if not rows:
        raise nothing_of(suite, "general and narrow organism of one kind")
    return {"claims": pd.DataFrame(rows)}


def _by_seed(suite: Suite, task: str) -> pd.DataFrame:
    """measured (a key of `CLAIMS`), adapter, seed, value; KL ratios as logarithms."""
    domain = suite.finetunes.compared(task)
    parts = [_drifts(suite.finetunes, domain, task).assign(measured="kl_removal")]
    if suite.finetunes.pairs(domain, task):
        lead, gap, ratio = _measures(suite, task)
        equal = lead[(lead["relative_norm"] == 1) & (lead["domain"] == domain)]
        equal = equal.rename(columns={"lead": "value", "training_seed": "seed"})
        middle = gap[gap["epsilon"].isin(MIDDLE)].rename(columns={"gap": "value", "training_seed": "seed"})
        means = middle.groupby(["adapter", "seed"], sort=False)["value"].mean().reset_index()
        shown = ratio[(ratio["denominator"] == "narrow") & (ratio["relative_norm"] == 1)]
        logarithms = shown.assign(value=np.log(shown["ratio"].to_numpy(float)))
        parts += [equal.assign(measured="efficiency"), means.assign(measured="stability")]
        parts.append(logarithms.assign(measured="influence"))
    columns = ["measured", "adapter", "seed", "value"]
    found = {part["measured"].iloc[0]: part[columns] for part in parts if len(part)}
    ordered = [found[name] for name in CLAIMS if name in found]
    return pd.concat(ordered, ignore_index=True) if ordered else pd.DataFrame(columns=columns)


def _measures(suite: Suite, task: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Lead, stability gap and influence ratio of every pair, from the tables of the analyses that measure them."""
    if task == "register":
        tables, prefix = suite.tables_of("general_vs_narrow.register"), "register_"
    else:
        measured_by = (f"general_vs_narrow.{name}" for name in ("efficiency", "stability", "influence"))
        tables, prefix = {n: table for name in measured_by for n, table in suite.tables_of(name).items()}, ""
    return tables[f"{prefix}efficiency_lead"], tables[f"{prefix}stability_gap"], tables[f"{prefix}influence_ratio"]


def _drifts(finetunes: Finetunes, domain: str, task: str) -> pd.DataFrame:
    """adapter, seed, value (rise of the cosine to the general solution) of organisms trained on without KL."""
    found = []
    others = {(e.solution, e.adapter, e.seed): e for e in finetunes.select(seed=None, task=task) if e.domain == domain}
    for (solution, adapter, seed), organism in others.items():
        general, narrow = others.get(("general", adapter, seed)), others.get(("narrow", adapter, seed))
        if solution != "kl-removed" or general is None or narrow is None:
            continue
        target, start, end = (finetunes.solution(e) for e in (general, narrow, organism))
        cosines = [theta.inner(target) / (theta.norm * target.norm) for theta in (start, end)]
        found.append((adapter, seed, cosines[1] - cosines[0]))
    return pd.DataFrame(found, columns=["adapter", "seed", "value"])


def _row(task: str, measured_by: str, adapter: str, values: np.ndarray) -> dict[str, Any]:
    claim = CLAIMS[measured_by]
    low, high = np.nan, np.nan
    if len(values) > 1:
        interval = t_interval(values)
        low, high = interval.low, interval.high
    estimate = float(values.mean())
    if measured_by == "influence":
        estimate, low, high = (float(np.exp(v)) for v in (estimate, low, high))
    row = {
        "claim": claim.text,
        "adapter": adapter,
        "estimate": estimate,
        "low": low,
        "high": high,
        "n_seeds": len(values),
        "verdict": decided(low, high, claim.neutral),
        "task": task,
        "measure": claim.measure,
        "neutral": claim.neutral,
    }
    finding = _finding(row)
    return {**row, "sentence": f"{finding.sentence.rstrip('.')} ({finding.evidence}): {finding.verdict}."}


def _finding(row: Mapping[Any, Any]) -> Finding:
    """What a row of the table says; the first task's claims are the paper's."""
    claim = next(claim for claim in CLAIMS.values() if claim.text == row["claim"])
    where = "technical register, " if row["task"] == "register" else ""
    return Finding(
        f"Claim: {claim.text} ({where}{row['adapter']}); {claim.found}",
        row["estimate"],
        row["n_seeds"],
        "seeds",
        row["low"],
        row["high"],
        claim.unit,
        verdict=decided(row["low"], row["high"], claim.neutral),
        first=row["task"] == "persona",
        claim=f"{claim.text}; {claim.found.format(estimate=f'… {claim.unit}'.strip())}",
        case=f"{where}{row['adapter']}",
    )


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """One of every row that has an estimate."""
    return [_finding(row) for row in tables["claims"].dropna(subset="estimate").to_dict("records")]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Estimate and interval by adapter, a colour a task; one figure a claim."""
    drawn = {}
    table = tables["claims"].astype({"estimate": float, "low": float, "high": float})
    for key, claim in CLAIMS.items():
        shown = table[table["claim"] == claim.text]
        if shown.empty:
            continue
        wide, groups = figures.side_by_side(shown, "adapter", "task", ["estimate", "low", "high"])
        figure = figures.dot_plot(wide, "adapter", groups, claim.axis)
        figures.null_line(figure, claim.neutral, "no difference", axis="x")
        if key == "influence":
            figure.update_xaxes(type="log", dtick=1)
        drawn[f"claims_{key}"] = figures.captioned(figure, f"{claim.text}: intervals over training seeds.")
    return drawn
