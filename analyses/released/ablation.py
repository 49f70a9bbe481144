"""What taking the direction out does to a misaligned finetune: EM and coherence before and after."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import ONE_DIRECTION, Finding, clause, middle, named, percent, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.errors import MissingDataError
from em_interp.evaluation.criteria import REFERENCE_CODE
from em_interp.evaluation.rates import Rates, em_rates
from em_interp.statistics import PERCENT

TITLE = "Ablating the direction from a misaligned finetune"
TEXT = (
    "EM and coherence before and after each layer's own direction is projected out of that layer's output. Coherence "
    "belongs beside EM: the model-diff and both-diff vectors bring EM to zero by destroying the model. Rates are of "
    f"rows with both scores; the interval after is {PERCENT}, over questions."
)
TABLES = ("ablation",)
NEEDS = (Need.RELEASED,)
CHAPTER = ONE_DIRECTION
FIRST = (
    *("direction", "target", "mode", "layers", "em_before", "em_after", "em_after_low", "em_after_high"),
    *("coherent_before", "coherent_after", "n"),
)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each ablated file, beside the unablated file of its experiment."""
    data = suite.published
    before: dict[str, Rates] = {}
    for judged in data.judged:
        if judged.role == "baseline":
            if judged.experiment in before:
                suite.note(
                    MissingDataError(
                        judged.path, "a second unablated file of its experiment", "keep one; it is not used"
                    )
                )
                continue
            before[judged.experiment] = em_rates(judged.answers, REFERENCE_CODE, cluster="base_question")
    rows = []
    for judged in data.judged:
        if judged.role != "ablation":
            continue
        baseline = before.get(judged.experiment)
        if baseline is None:
            suite.note(
                MissingDataError(
                    data.root / judged.experiment / "baseline",
                    f"the unablated answers that {judged.path.name} is held against are missing",
                    "fetch EM_interp again, or put the unablated CSV into baseline/no_ablate",
                )
            )
        after = em_rates(judged.answers, REFERENCE_CODE, cluster="base_question").columns()
        first = {} if baseline is None else baseline.columns()
        rows.append(
            {
                "direction": judged.arm,
                "target": judged.folder,
                "mode": "layerwise",
                "layers": judged.layers,
                "em_before": first.get("em_rate"),
                "em_after": after["em_rate"],
                "em_after_low": after["em_low"],
                "em_after_high": after["em_high"],
                "coherent_before": first.get("coherent_rate"),
                "coherent_after": after["coherent_rate"],
                "n": after["n"],
                "n_unscored": after["n_unscored"],
                "em_before_low": first.get("em_low"),
                "em_before_high": first.get("em_high"),
                "coherent_before_low": first.get("coherent_low"),
                "coherent_before_high": first.get("coherent_high"),
                "coherent_after_low": after["coherent_low"],
                "coherent_after_high": after["coherent_high"],
                "em_after_all_rows": after["em_rate_all_rows"],
                "scale": judged.scale,
                "n_questions": after["n_questions"],
                "interval": after["interval"],
                "denominator": after["denominator"],
                "criterion": after["criterion"],
                "file": judged.path.relative_to(data.root).as_posix(),
            }
        )
    if not rows:
        raise nothing_of(suite, "judged answers of an ablated model", "EM_interp")
    return {"ablation": pd.DataFrame(rows)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """EM and coherence of the middle target before and after, for each direction."""
    table = tables["ablation"]
    found = []
    held = beside(tables, "released.ablation", "R32, EM after each layer lost its own data-diff")
    for direction, rows in table.groupby("direction", sort=False):
        if (row := middle(rows, "em_after")) is None:
            continue
        em, coherent = ([percent(row, f"{rate}_{when}") for when in ("before", "after")] for rate in ("em", "coherent"))
        which = (
            named(row["target"]) if len(rows) == 1 else f"the middle of {len(rows)} finetunes, {named(row['target'])},"
        )
        text = (
            f"With {named(direction)} taken out of layers {named(row['layers'])} of {which} EM "
            + (clause("goes from {} to ", em[0]) or "is ")
            + "{estimate}"
            + clause(", and coherent answers from {} to {}", *coherent)
        )
        ends = value_of(row, "em_after_low", 100), value_of(row, "em_after_high", 100)
        is_papers = "data" in str(direction)
        asides = [clause("from {}", em[0]), clause("{} coherent", coherent[1])]
        given: dict[str, Any] = {"first": is_papers, "asked": "Ablation: EM left without it"}
        given |= {"beside": "; ".join(filter(None, asides))}
        if is_papers:
            given |= {"published": 0.0, "source": "P2: 11.25% to 0%", "verdict": held.get("verdict", "")}
        found.append(Finding(text, value_of(row, "em_after", 100), int(row["n"]), "answers", *ends, "%", **given))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM and coherence before and after, for each organism and direction."""
    table = tables["ablation"]
    label = table["target"] + ": " + table["direction"] + ", layers " + table["layers"].astype(str)
    figure = figures.panels(["EM", "coherent"])
    for number, rate in enumerate(("em", "coherent")):
        groups = [(when, f"{rate}_{when}", f"{rate}_{when}_low", f"{rate}_{when}_high") for when in ("before", "after")]
        figures.dots(figure, table.assign(label=label), "label", groups, scale=100, panel=number)
    figures.style(figure, "share of answers (%)", "").update_xaxes(range=[-3, 103])
    return {"ablation": figures.captioned(figure, "Each organism before and after a direction is taken out of it.")}
