"""Does what the paper claims of general and narrow solutions hold for these organisms? One sentence a claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.general_vs_narrow.efficiency import leads
from analyses.general_vs_narrow.influence import measured
from analyses.general_vs_narrow.stability import MIDDLE, gaps
from analyses.inputs.pocket import Organisms
from analyses.suite import Suite, nothing_of
from em_interp import figures
from em_interp.errors import MissingDataError
from em_interp.pocket.world.corpus import Task
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
DOMAIN = "medicine"


@dataclass(frozen=True)
class Claim:
    """What is claimed, and the measure that speaks for it above `neutral`."""

    text: str
    measure: str
    neutral: float = 0.0


CLAIMS = {
    "efficiency": Claim(
        "The general solution has the lower loss at equal norm",
        "its loss is lower by (nats per token, at the mean of both trained norms)",
    ),
    "stability": Claim(
        "The general solution is more stable under perturbation",
        "share of its gain that it loses less, mean over eps .2, .4, .6, .8 (percentage points)",
    ),
    "kl_removal": Claim(
        "Once the KL penalty is gone, the narrow solution drifts to the general one",
        "rise of the cosine to the general solution",
    ),
    "influence": Claim(
        "The general direction matters more on pre-training text at equal norm", "ratio of the two KLs", 1.0
    ),
}


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a task, claim and adapter."""
    tasks: tuple[Task, ...] = get_args(Task)
    rows = []
    for task in tasks:
        found = _by_seed(suite.organisms, task)
        if task == "persona" and "kl_removal" not in set(found["measured"]):
            suite.note(
                MissingDataError(
                    suite.organisms.root / "organisms",
                    "it holds no organisms that were trained on without KL, so the claim about KL removal has no row",
                    f"make them with `em-interp pocket organisms --out {suite.organisms.root}`",
                )
            )
        for (measured_by, adapter), group in found.groupby(["measured", "adapter"], sort=False):
            rows.append(_row(task, str(measured_by), str(adapter), group["value"].to_numpy(float)))
    if not rows:
        raise nothing_of(suite, "general and narrow organism of one kind on medicine")
    return {"claims": pd.DataFrame(rows)}


def _by_seed(organisms: Organisms, task: Task) -> pd.DataFrame:
    """measured (a key of `CLAIMS`), adapter, seed, value; KL ratios as logarithms."""
    parts = [_drifts(organisms, task).assign(measured="kl_removal")]
    lead, gap = leads(organisms, DOMAIN, task), gaps(organisms, DOMAIN, task)
    ratio = measured(organisms, DOMAIN, task)[1]
    if len(lead):  # where there are no pairs, none of the three has columns
        equal = lead[lead["relative_norm"] == 1].rename(columns={"lead": "value", "training_seed": "seed"})
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


def _drifts(organisms: Organisms, task: Task) -> pd.DataFrame:
    """adapter, seed, value (rise of the cosine to the general solution) of organisms trained on without KL."""
    found = []
    others = {(e.solution, e.adapter, e.seed): e for e in organisms.select(seed=None, task=task) if e.domain == DOMAIN}
    for (solution, adapter, seed), entry in others.items():
        general, narrow = others.get(("general", adapter, seed)), others.get(("narrow", adapter, seed))
        if solution != "kl-removed" or general is None or narrow is None:
            continue
        target, start, end = (organisms.solution(e) for e in (general, narrow, entry))
        cosines = [theta.inner(target) / (theta.norm * target.norm) for theta in (start, end)]
        found.append((adapter, seed, cosines[1] - cosines[0]))
    return pd.DataFrame(found, columns=["adapter", "seed", "value"])


def _row(task: Task, measured_by: str, adapter: str, values: np.ndarray) -> dict[str, Any]:
    claim = CLAIMS[measured_by]
    low, high = np.nan, np.nan
    if len(values) > 1:
        interval = t_interval(values)
        low, high = interval.low, interval.high
    estimate = float(values.mean())
    if measured_by == "influence":
        estimate, low, high = (float(np.exp(v)) for v in (estimate, low, high))
    verdict = "holds" if low > claim.neutral else "does not hold" if high < claim.neutral else "not decided here"
    spread = (
        f"{low:.3g} to {high:.3g}, {PERCENT} over {len(values)} seeds" if len(values) > 1 else "one seed, no interval"
    )
    where = "technical register, " if task == "register" else ""
    return {
        "claim": claim.text,
        "adapter": adapter,
        "estimate": estimate,
        "low": low,
        "high": high,
        "n_seeds": len(values),
        "verdict": verdict,
        "task": task,
        "measure": claim.measure,
        "neutral": claim.neutral,
        "sentence": f"{claim.text} ({where}{adapter}): {verdict}; {claim.measure}: {estimate:.3g} ({spread}).",
    }


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Estimate and interval by adapter, one figure a claim; its caption is the sentences."""
    drawn = {}
    table = tables["claims"].astype({"estimate": float, "low": float, "high": float})
    for key, claim in CLAIMS.items():
        shown = table[table["claim"] == claim.text]
        if shown.empty:
            continue
        figure = go.Figure()
        for index, (task, rows) in enumerate(shown.groupby("task", sort=False)):
            figures.line(
                figure,
                rows["adapter"],
                rows["estimate"],
                str(task),
                index,
                markers=True,
                low=rows["low"],
                high=rows["high"],
            )
        figure.update_traces(mode="markers")
        figure.add_hline(y=claim.neutral, line_dash="dot", line_color="#888888")
        figures.style(figure, "", claim.measure.split(",")[0].split(" (")[0])
        figure.update_layout(scattermode="group")
        drawn[f"claims_{key}"] = figures.captioned(figure, " ".join(shown["sentence"]))
    return drawn
