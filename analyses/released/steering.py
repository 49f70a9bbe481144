"""What adding the direction does to the chat model: EM and coherence against the coefficient."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import ONE_DIRECTION, UNDECIDED, Finding, apart, clause, greatest, named, percent, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.evaluation.criteria import REFERENCE_CODE
from em_interp.evaluation.rates import em_rates
from em_interp.figures.steering import dose_response, trade_off
from em_interp.published.scan import JudgedSet
from em_interp.statistics import PERCENT

TITLE = "Steering the chat model with a mean-diff direction"
TEXT = (
    "EM and coherence of the chat model when a multiple of the direction is added at one layer, at every token. The "
    "two EM lines differ by the answers that the judge would not score (code or refusal): the reference code leaves "
    f"them out, so that its EM can rise while the share of all answers does not. Intervals: {PERCENT}, over questions."
)
TABLES = ("steering",)
NEEDS = (Need.RELEASED,)
CHAPTER = ONE_DIRECTION
STORY = (1, "steering")
COHERENT = 0.9
"""The share of scored answers that must be coherent where a direction works best."""
FIRST = ("direction", "target", "layer", "coefficient", "em_rate", "em_low", "em_high", "coherent_rate", "n")


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each direction and coefficient; an experiment's unsteered file is coefficient 0 of all its arms."""
    data = suite.published
    steered = [judged for judged in data.judged if judged.role == "steering"]
    arms = {(j.experiment, j.arm, j.layers) for j in steered if j.scale != 0}
    rows = []
    for judged in steered:
        own = (judged.experiment, judged.arm, judged.layers)
        # An unsteered file that is no arm's own (a folder such as None/) is the zero of every arm that lacks one.
        shared = sorted(a for a in arms if a[0] == own[0] and a[2] == own[2] and not _has_zero(steered, a))
        places = [own] if own in arms or not shared else shared
        rows += [_row(judged, arm, str(data.root)) for _, arm, _ in places]
    if not rows:
        raise nothing_of(suite, "judged answers of a steered model", "EM_interp")
    table = pd.DataFrame(rows).sort_values(["experiment", "direction", "layer", "coefficient"], ignore_index=True)
    return {"steering": table[[*FIRST, *table.columns.difference(list(FIRST), sort=False)]]}


def _has_zero(steered: list[JudgedSet], arm: tuple[str, str, str | None]) -> bool:
    return any((j.experiment, j.arm, j.layers) == arm and j.scale == 0 for j in steered)


def _row(judged: JudgedSet, arm: str, root: str) -> dict[str, object]:
    assert judged.layers is not None  # a steering file lies in a layer_N folder
    return {
        "direction": arm,
        "target": judged.model,
        "layer": int(judged.layers),
        "coefficient": judged.scale,
        **em_rates(judged.answers, REFERENCE_CODE, cluster="base_question").columns(),
        "experiment": judged.experiment,
        "file": judged.path.relative_to(root).as_posix(),
    }


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """Where a direction makes most answers misaligned and leaves the model coherent, beside the unsteered model."""
    table = tables["steering"]
    known = table[table[["em_rate_all_rows", "coefficient"]].notna().all(axis=1)]
    known = known[known["coherent_rate"].astype(float) >= COHERENT]
    steered = known[known["coefficient"] != 0]
    if steered.empty:
        return []
    row = greatest(steered, "em_rate_all_rows")
    columns = ("em_all_rows_low", "em_all_rows_high")
    ends = value_of(row, columns[0], 100), value_of(row, columns[1], 100)
    text = (
        f"{named(row['direction'])}, added {value_of(row, 'coefficient'):g} times at layer {int(row['layer'])}, makes "
        f"{{estimate}} of all answers misaligned, with {percent(row, 'coherent_rate')} coherent: the most of "
        f"{len(steered)} coefficients that leave {COHERENT:.0%} so"
    )
    same = [table[column] == row[column] for column in ("experiment", "direction", "layer")]
    plain = table[same[0] & same[1] & same[2] & (table["coefficient"] == 0)]
    verdict = UNDECIDED
    beside_it = f"layer {int(row['layer'])}" + clause(", {} coherent", percent(row, "coherent_rate"))
    if len(plain):
        unsteered = percent(dict(plain.iloc[0]), "em_rate_all_rows")
        text += clause("; unsteered, {}", unsteered)
        beside_it += clause("; as it is {}", unsteered)
        verdict = apart(*ends, *(value_of(dict(plain.iloc[0]), column, 100) for column in columns))
    held = beside(tables, "released.steering", "coefficient 6, EM of all rows (P2: up to 50%)")
    verdict = held.get("verdict", verdict)
    given: dict[str, Any] = {"published": 50.0, "source": "P2, sec. 3.2: up to 50%", "verdict": verdict, "first": True}
    given |= {"asked": "Steering: the direction added to the chat model", "beside": beside_it}
    return [Finding(text, value_of(row, "em_rate_all_rows", 100), int(row["n"]), "answers", *ends, "%", **given)]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM and coherence against the coefficient, and one against the other; a panel an arm."""
    table = tables["steering"]
    table = table.assign(arm=table["direction"] + ", layer " + table["layer"].astype(str))
    rates = (
        ("EM, of rows with both scores", "em_rate", "em"),
        ("coherent, of rows with both scores", "coherent_rate", "coherent"),
        ("EM, of all rows", "em_rate_all_rows", "em_all_rows"),
    )
    by_strength = dose_response(table, "arm", "coefficient", "coefficient (multiples of the direction)", rates)
    trade = trade_off(table, "arm", "coefficient", "coefficient")
    return {
        "steering": figures.captioned(by_strength, "EM and coherence against the coefficient."),
        "steering_trade_off": figures.captioned(trade, "What EM costs in coherence as the coefficient grows."),
    }
