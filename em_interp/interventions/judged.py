"""What judged answers say, whichever command sampled them: a table of rates, and its figure.

Three kinds of answers, told apart by their columns: of a model while a direction is added (direction, layer,
coefficient), of a finetune with directions taken out (arm), and of models as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go

from em_interp import figures
from em_interp.arguments import columns
from em_interp.errors import StatisticsError, UsageError
from em_interp.evaluation.agreement import JUDGE
from em_interp.evaluation.at_k import misalign_at_k
from em_interp.evaluation.comparison import Comparison, compare
from em_interp.evaluation.criteria import PAPER, Criterion
from em_interp.evaluation.rates import em_rates
from em_interp.interventions.steering import steering_rows
from em_interp.interventions.transfer import transfer_rows
from em_interp.statistics import PERCENT
from em_interp.statistics.units import FRACTION, with_units

CELLS: Final = {
    "steering": ("layer", "coefficient"),
    "ablation": ("arm",),
    "answers": ("questions",),
}
"""What tells the cells of one file apart that another file has too, by kind."""
_DRAWN: Final = {
    "steering": (
        *("target", "direction", "control", "layer", "coefficient", "residual_share"),
        *(f"{rate}_{of}" for rate in ("em", "coherent") for of in ("rate", "low", "high")),
    ),
    "ablation": (
        *("target", "direction", "mode"),
        *(
            f"{rate}_{when}{end}"
            for rate in ("em", "coherent")
            for when in ("before", "after")
            for end in ("", "_low", "_high")
        ),
    ),
    "answers": ("organism", *(f"{rate}_{of}" for rate in ("em", "coherent") for of in ("rate", "low", "high"))),
}
"""What the figure of each kind of table shows."""
_STEERED: Final = ("direction", "layer", "coefficient")
_RANDOM: Final = r"random( \d+)?"
"""What the controls of a sweep or of an ablation are called."""
_NULL: Final = "random directions"


def kind_of(judged: pd.DataFrame) -> str:
    """steering, ablation or answers. Raises UsageError for half of a sweep's columns."""
    if "arm" in judged:
        return "ablation"
    found = [name for name in _STEERED if name in judged]
    if "coefficient" in found and len(found) < len(_STEERED):
        raise UsageError(f"judged answers with {', '.join(found)}: those of a sweep have {', '.join(_STEERED)}.")
    return "steering" if len(found) == len(_STEERED) else "answers"


def judged_rates(judged: pd.DataFrame, name: str = "model", criterion: Criterion = PAPER) -> pd.DataFrame:
    """The table `steering`, `ablation` or `em_rates` of judged answers, by their `kind_of`.

    judged: columns question, aligned, coherent (0-100), those of its kind, and for answers `questions` (the group),
    where there are several. name: of the model, where no column organism, target, adapter or model says it. Intervals
    are clustered by question; by question_id, where the column `wording` says that several wordings were asked. Rates
    are of each judge, where the column `judge` names several. Raises UsageError for lacking columns, and as `em_rates`.
    """
    if judged.empty:
        raise StatisticsError("no judged answers: a rate needs at least one row.")
    if JUDGE in judged and len(judged[JUDGE].unique()) > 1:
        by_judge = judged.groupby(JUDGE, sort=False, dropna=False)
        found = pd.concat([judged_rates(own, name, criterion).assign(judge=judge) for judge, own in by_judge])
        return with_units(found.reset_index(drop=True), low=FRACTION, high=FRACTION)
    judged = _prepared(judged, name)
    cluster = _cluster(judged)
    rows = []
    for target, own in judged.groupby("organism", sort=False):
        match kind_of(judged):
            case "steering":
                table = steering_rows(own, str(target), criterion, cluster=cluster)
            case "ablation":
                table = _ablation_rows(own, str(target), criterion, cluster)
            case _:
                table = _answer_rows(own, str(target), criterion, cluster)
        rows.append(table)
    found = pd.concat(rows, ignore_index=True)
    return with_units(found, low=FRACTION, high=FRACTION)


def differences(judged: Mapping[str, pd.DataFrame], criterion: Criterion = PAPER) -> pd.DataFrame:
    """EM of each set of judged answers minus that of the first, cell by cell, paired by question.

    judged: by name, all of one kind. A row for each cell (`CELLS`, and the judge) that two sets share, where they share
    questions: set, beside, the cell, difference, low, high, p_value, n_questions, interval, and the others of
    `Comparison.columns`. Raises UsageError for several kinds.
    """
    keys, compared = _compared(judged, criterion)
    rows = [{**cell, **found.columns()} for cell, found in compared]
    named = [*keys, "difference", "low", "high", "p_value", "n_questions", "interval"]
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=named)
    return with_units(table[[*named, *table.columns.difference(named, sort=False)]], low=FRACTION, high=FRACTION)


def plans(judged: Mapping[str, pd.DataFrame], difference: float, criterion: Criterion = PAPER) -> pd.DataFrame:
    """How many questions and answers would decide a difference (a fraction) of each set and the first, cell by cell.

    `Comparison.plan`, and `power_here`: that of these answers. Raises as `differences`.
    """
    keys, compared = _compared(judged, criterion)
    tables = [found.plan(difference).assign(**cell, power_here=found.power(difference)) for cell, found in compared]
    named = [*keys, "difference", "power_here", "power", "samples", "n_questions", "n_answers"]
    return pd.concat(tables, ignore_index=True)[named] if tables else pd.DataFrame(columns=named)


def _compared(
    judged: Mapping[str, pd.DataFrame], criterion: Criterion
) -> tuple[list[str], list[tuple[dict[str, Any], Comparison]]]:
    """What names a row, and each row's names with its comparison."""
    kinds = {name: kind_of(table) for name, table in judged.items()}
    if len(set(kinds.values())) > 1:
        raise UsageError(f"judged answers of several kinds: {kinds}. Compare those of one kind.")
    if not kinds:
        raise UsageError("no judged answers were given.")
    first, *others = {name: _without_random(_prepared(table, name)) for name, table in judged.items()}.items()
    keys = list(CELLS[kinds[first[0]]]) + ([JUDGE] if all(JUDGE in table for table in judged.values()) else [])
    before = dict(list(first[1].groupby(keys, sort=False, dropna=False)))
    rows = []
    for name, table in others:
        for cell, answers in table.groupby(keys, sort=False, dropna=False):
            if cell not in before:
                continue
            try:
                found = compare(answers, before[cell], criterion, cluster=_cluster(table))
            except StatisticsError:  # no question in common
                continue
            rows.append((dict(zip(("set", "beside", *keys), (name, first[0], *cell), strict=True)), found))
    return ["set", "beside", *keys], rows


def rates_at_k(
    judged: pd.DataFrame, k: Sequence[int], name: str = "model", criterion: Criterion = PAPER
) -> pd.DataFrame:
    """`misalign_at_k` of judged answers, cell by cell (`CELLS`, and the judge). Raises as `judged_rates`."""
    judged = _prepared(judged, name)
    if judged.empty:
        raise StatisticsError(f"{name}: no judged answers were given.")
    keys = ["organism", *([JUDGE] if JUDGE in judged else []), *CELLS[kind_of(judged)]]
    cluster, rows = _cluster(judged), []
    for cell, answers in judged.groupby(keys, sort=False, dropna=False):
        table = misalign_at_k(answers, list(k), criterion, cluster=cluster)
        rows.append(pd.DataFrame({**dict(zip(keys, cell, strict=True)), **row} for row in table.to_dict("records")))
    return with_units(pd.concat(rows, ignore_index=True), low=FRACTION, high=FRACTION)


def rates_figure(table: pd.DataFrame) -> go.Figure:
    """The figure of a table of `judged_rates`, or of several below each other: EM beside coherence, with intervals.

    Raises UsageError for a table of other columns.
    """
    kind, draw = ("answers", _answers_figure)
    if "coefficient" in table:
        kind, draw = "steering", _steering_figure
    elif "em_after" in table:
        kind, draw = "ablation", _ablation_figure
    columns("a table of rates", table, _DRAWN[kind])
    return draw(table)


def _cluster(judged: pd.DataFrame) -> str:
    return "question_id" if {"wording", "question_id"} <= set(judged) else "question"


def _prepared(judged: pd.DataFrame, name: str) -> pd.DataFrame:
    """With organism, the columns that a sweep may lack, and the group of questions."""
    named = pd.Series(name, index=judged.index)
    for column in ("model", "adapter", "target", "organism"):  # the last that says something counts
        if column in judged:
            text = judged[column].astype(object).where(judged[column].notna(), "").astype(str)
            named = named.where(text == "", text.map(_short))
    judged = judged.assign(organism=named)
    if kind_of(judged) == "steering":
        if "control" in judged:
            control = judged["control"].astype(str).str.lower().isin(["true", "1", "1.0"])
        else:
            control = judged["direction"].astype(str).str.fullmatch(_RANDOM)
        for column in ("layer", "coefficient"):
            if not pd.to_numeric(judged[column], errors="coerce").notna().all():
                raise UsageError(f"{name}: the column {column} of a sweep holds something that is no number.")
        judged = judged.assign(control=control, layer=judged["layer"].astype(float).astype(int))
        lacking = [column for column in ("residual_share", "added_norm") if column not in judged]
        return judged.assign(**dict.fromkeys(lacking, float("nan")))
    return judged if "questions" in judged else judged.assign(questions="all")


def _without_random(judged: pd.DataFrame) -> pd.DataFrame:
    """Without the controls of a sweep or of an ablation."""
    if "control" in judged:
        return judged[~judged["control"].astype(bool)]
    return judged[~judged["arm"].astype(str).str.fullmatch(_RANDOM)] if "arm" in judged else judged


def _short(name: str) -> str:
    """A hub name as it is; of a path its last part."""
    name = name.rstrip("/")
    return name.rpartition("/")[2] if name.count("/") > 1 or name.startswith((".", "/", "~")) else name


def _answer_rows(judged: pd.DataFrame, organism: str, criterion: Criterion, cluster: str) -> pd.DataFrame:
    rows = []
    for group, asked in judged.groupby("questions", sort=False):
        said = {name: asked[name].iloc[0] for name in ("solution", "adapter", "domain") if name in asked}
        rates = em_rates(asked, criterion, cluster=cluster).columns()
        rows.append({"organism": organism, **said, "questions": group, **rates})
    return pd.DataFrame(rows)


def _ablation_rows(judged: pd.DataFrame, target: str, criterion: Criterion, cluster: str) -> pd.DataFrame:
    if not (judged["arm"] == "none").any():
        raise UsageError(
            f"{target}: no answers of the model as it is (arm none), beside which those under ablation are held. Keep "
            "them in the file, as `em-interp ablate` writes them."
        )
    named = judged.assign(direction_from=judged["arm"], organism=target)
    table = transfer_rows(named, criterion=criterion, cluster=cluster)
    first = judged.drop_duplicates("arm").set_index("arm")
    random = table["direction_from"].str.fullmatch(_RANDOM)
    told = {name: list(first[name].reindex(table["direction_from"])) for name in ("layers", "kind") if name in first}
    direction = "ablated" if "direction" not in judged else str(judged["direction"].iloc[0])
    table = table.drop(columns=["direction_from", "organism"]).assign(
        direction=table["direction_from"].where(random, direction),
        target=target,
        mode=table["direction_from"].where(~random, "random"),
        **told,
    )
    leading = ["direction", "target", "mode", *told]
    return table[[*leading, *table.columns.difference(leading, sort=False)]]


_TIMES: Final = "coefficient (times the direction)"


def _steering_figure(table: pd.DataFrame) -> go.Figure:
    """EM and coherence against strength, a line for each direction and layer; the range of random directions."""
    own = table[~table["control"].astype(bool)]
    share = len(set(own.groupby("layer")["coefficient"].agg(frozenset))) > 1 and own["residual_share"].notna().all()
    x, x_title = ("residual_share", "strength (norm added / residual norm)") if share else ("coefficient", _TIMES)
    names = _telling(own, "set", "target", "direction")
    panels = figures.panels(["EM", "coherent"])
    for col, rate in enumerate(("em", "coherent")):
        null = table[table["control"].astype(bool)].dropna(subset=[f"{rate}_rate"]).sort_values(x)
        if len(null):
            low, high = (null[f"{rate}_{side}"].fillna(null[f"{rate}_rate"]) for side in ("low", "high"))
            span = null.assign(low=low, high=high).groupby(x).agg({"low": "min", "high": "max"})
            band = {"fill": "toself", "fillcolor": figures.NULL_FILL, "line": {"width": 0}, "mode": "lines"}
            panels.add_trace(
                go.Scatter(
                    x=[*span.index, *span.index[::-1]],
                    y=[*(100 * span["high"]), *(100 * span["low"])[::-1]],
                    name=f"{_NULL}, range of their {PERCENT} intervals",
                    showlegend=col == 0,
                    hoverinfo="skip",
                    **band,
                ),
                **figures.place(panels, col),
            )
        for index, (cell, rows) in enumerate(own.groupby([*names, "layer"], sort=False)):
            rows = rows.sort_values(x)
            *called, layer = cell
            figures.line(
                panels,
                rows[x],
                100 * rows[f"{rate}_rate"].astype(float),
                ", ".join([*map(str, called), f"layer {layer}"]),
                index,
                markers=True,
                low=100 * rows[f"{rate}_low"].astype(float),
                high=100 * rows[f"{rate}_high"].astype(float),
                panel=col,
            )
    figures.style(panels, x_title, "share of answers (%)")
    panels.update_yaxes(range=[-3, 103])
    caption = "EM and coherence against what is added, one line a layer; intervals over questions."
    return figures.captioned(panels, caption)


def _ablation_figure(table: pd.DataFrame) -> go.Figure:
    """EM and coherence of each target as it is, and with each direction taken out."""
    names = _telling(table, "set", "target")
    rows = []
    for _, own in table.groupby([*names, "direction", "mode"], sort=False):
        for when in ("before", "after"):
            shown = own.iloc[0]
            what = "as it is" if when == "before" else f"{shown['mode']}: {shown['direction']}"
            rates = {
                f"{rate}{end}": shown[f"{rate}_{when}{end}"]
                for rate in ("em", "coherent")
                for end in ("", "_low", "_high")
            }
            label = ", ".join([*(str(shown[name]) for name in names), what.removeprefix("random: ")])
            rows.append({"label": label, **rates})
    bars = pd.DataFrame(rows).drop_duplicates("label")
    return _dots(bars, "as it is, and with directions taken out")


def _answers_figure(table: pd.DataFrame) -> go.Figure:
    """EM and coherence of each model and group of questions."""
    names = _telling(table, "set", "organism", "questions") or ["organism"]
    bars = table.rename(columns={"em_rate": "em", "coherent_rate": "coherent"})
    bars = bars.assign(label=table[names].astype(str).agg(", ".join, axis=1))
    return _dots(bars, "by model and group of questions")


def _telling(table: pd.DataFrame, *columns: str) -> list[str]:
    """Those of the columns that tell rows apart, and say what no other says."""
    found = [column for column in columns if column in table and len(table[column].unique()) > 1]
    return [c for i, c in enumerate(found) if not any((table[c] == table[other]).all() for other in found[i + 1 :])]


def _dots(table: pd.DataFrame, of: str) -> go.Figure:
    figure = figures.panels(["EM", "coherent"])
    for number, (name, rate) in enumerate((("EM", "em"), ("coherent", "coherent"))):
        groups = [(name, rate, f"{rate}_low", f"{rate}_high")]
        figures.dots(figure, table, "label", groups, scale=100, panel=number)
    figures.style(figure, "share of answers (%)", "").update_xaxes(range=[-3, 103])
    return figures.captioned(figure, f"EM and coherence {of}; intervals over questions.")
