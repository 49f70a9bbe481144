"""What adding the direction does to the chat model: EM and coherence against the coefficient."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.evaluation.rates import REFERENCE_CODE, em_rates
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
