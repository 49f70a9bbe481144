"""`em-interp rates`: judged answers to rates with intervals, and their figure. Heavy imports wait until it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table

from em_interp.cli import options

Preset = Annotated[
    str, typer.Option("--preset", help="thresholds and denominator: papers, reference-code, betley or aligned-50")
]
Denominator = Annotated[
    str | None,
    typer.Option(
        help="what EM is of: scored (rows with both scores), all (unscored and incoherent rows too) or coherent",
        show_default="the preset's",
    ),
]
Aligned = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="an answer below it counts as misaligned", show_default="the preset's"),
]
Coherent = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="an answer above it counts as coherent", show_default="the preset's"),
]
Inclusive = Annotated[bool, typer.Option("--inclusive", help="count alignment at the threshold too, as the authors do")]
AtK = Annotated[
    list[int] | None, typer.Option("--at-k", min=1, help="how likely any of so many answers is misaligned; repeatable")
]
Against = Annotated[
    Path | None, typer.Option(help="judged CSV that each file is compared with, and what would decide a difference")
]
Decide = Annotated[
    float, typer.Option(min=0.0001, max=1, help="difference of EM, a fraction, that --against plans to decide")
]


def rates(
    files: Annotated[list[Path], typer.Argument(help="judged CSV: question, answer, aligned, coherent (0-100)")],
    out: Annotated[Path | None, options.takes("out", "the rates, a .csv, and their figure beside it")] = None,
    figure: Annotated[Path | None, typer.Option(help="the figure: .html, .svg or .png")] = None,
    preset: Preset = "papers",
    denominator: Denominator = None,
    aligned: Aligned = None,
    coherent: Coherent = None,
    inclusive: Inclusive = False,
    at_k: AtK = None,
    against: Against = None,
    decide: Decide = 0.05,
    force: options.Force = False,
) -> None:
    """EM and coherence of judged answers, with intervals and figure.

    Intervals are over questions. Several files of one kind stand side by side, and each is compared with the first,
    question by question. Where several judges scored the same answers (column judge, or files of the same answers),
    their agreement is shown too.
    """
    from dataclasses import replace

    from em_interp.evaluation.criteria import preset_criterion
    from em_interp.published.judged import read_judged_csv

    given: dict[str, Any] = {
        "aligned": aligned,
        "coherent": coherent,
        "denominator": denominator,
        "inclusive": inclusive or None,
    }
    criterion = replace(preset_criterion(preset), **{name: value for name, value in given.items() if value is not None})
    files = files if against is None else [against, *files]
    names = [_name(path, files) for path in files]
    options.once("FILE", names)
    judged = {name: read_judged_csv(path) for name, path in zip(names, files, strict=True)}
    beside = tables_beside(judged, criterion, at_k or [], None if against is None else decide)
    tell(judged, criterion, out=out, figure=figure, inputs=files, force=force, beside=beside)


def _name(path: Path, files: list[Path]) -> str:
    """The file's name; of several that are called the same, with that of its folder."""
    return path.stem if [other.stem for other in files].count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"


def tell(
    judged: Mapping[str, Any],
    criterion: Any,
    *,
    out: Path | None,
    figure: Path | None,
    inputs: Sequence[Path | None],
    force: bool,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Print the rates of judged answers, by the name of their file; write them and their figure where asked to.

    beside: further tables, as `tables_beside` makes them.
    """
    import pandas as pd

    from em_interp import figures
    from em_interp.evaluation.criteria import DENOMINATORS
    from em_interp.files.atomic import claim_output
    from em_interp.files.results import write_table
    from em_interp.interventions.judged import differences, judged_rates, rates_figure
    from em_interp.statistics import PERCENT

    if out is not None:
        figure = figure or out.with_suffix(".html")
        claim_output(out, inputs=inputs, force=force, endings=(".csv",))
        for name in beside or {}:
            claim_output(out.with_name(f"{out.stem}-{name}.csv"), inputs=inputs, force=force)
    if figure is not None:
        claim_output(figure, inputs=inputs, force=force, endings=tuple(figures.ENDINGS))
    compared = differences(judged, criterion)  # first: it refuses files of several kinds
    tables = {name: judged_rates(table, name, criterion) for name, table in judged.items()}
    if len(tables) > 1:
        tables = {name: table.assign(set=name) for name, table in tables.items()}
    for table in tables.values():
        options.out.print(shown(table))
    found = pd.concat(tables.values(), ignore_index=True)
    if len(compared):
        options.out.print(shown(compared))
    for name, table in (beside or {}).items():
        options.out.print(plain(table, name))
    of = DENOMINATORS[criterion.denominator].replace("rows", "answers")
    options.out.print(f"EM: {criterion}, of {of}; {PERCENT} intervals, over questions.")
    if out is not None:
        options.out.print(f"rates: {write_table(out, found)}")
        for name, table in {**({"differences": compared} if len(compared) else {}), **(beside or {})}.items():
            options.out.print(f"{name}: {write_table(out.with_name(f'{out.stem}-{name}.csv'), table)}")
    if figure is not None:
        options.out.print(f"figure: {figures.save(rates_figure(found), figure)}")


def tables_beside(
    judged: Mapping[str, Any], criterion: Any, at_k: Sequence[int], decide: float | None
) -> dict[str, Any]:
    """Tables beside the rates, by their name: of any of k answers, what decides a difference, how far judges agree."""
    import pandas as pd

    from em_interp.evaluation.agreement import agreement, several_judges
    from em_interp.interventions.judged import plans, rates_at_k

    found = {}
    if at_k:
        each = {name: rates_at_k(table, at_k, name, criterion) for name, table in judged.items()}
        found["at-k"] = pd.concat(
            [table.assign(set=name) if len(each) > 1 else table for name, table in each.items()], ignore_index=True
        )
    if decide is not None:
        found["plan"] = plans(judged, decide, criterion)
    if (rows := several_judges(judged)) is not None:
        found["agreement"] = agreement(rows, criterion)
    return found


_TITLES = {
    "at-k": "Misalign@k: any of k answers to a question misaligned and coherent",
    "plan": "what would decide a difference of EM with power .8, by the variances of these answers",
    "agreement": "judges of the same answers",
}
"""What the tables beside the rates are called on the terminal."""
_CELLS = ("set", "organism", "questions", "judge", "arm", "layer", "coefficient")
"""What may tell their rows apart: printed where it does."""
_PRINTED = {
    "at-k": {"k": "k", "misalign_at_k": "misaligned %", "n": "answers", "n_short": "questions left out"},
    "plan": {
        "difference": "difference",
        "power_here": "power of these",
        "samples": "answers to each",
        "n_questions": "questions",
        "n_answers": "answers of each model",
    },
    "agreement": {"statistic": "", "of": "of", "judge_a": "judge", "judge_b": "and", "value": "value", "n": "answers"},
}
"""Columns of those tables that are printed, and how they are headed."""


def plain(table: Any, name: str) -> Table:
    """A table beside the rates for the terminal, a value and its interval in one cell."""
    telling = [key for key in _CELLS if key in table and len(table[key].unique()) > 1]
    heads = {**{key: key for key in telling}, **_PRINTED[name]}
    columns = [Column(head, no_wrap=True, overflow="fold") for head in heads.values()]
    printed = Table(*columns, title=_TITLES[name], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in table.to_dict("records"):
        printed.add_row(*(_cell(key, row) for key in heads))
    return printed


def _cell(name: str, row: Mapping[str, Any]) -> str:
    value = row[name]
    if name == "misalign_at_k":
        return _interval(value, row["low"], row["high"]) or str(row["interval"])
    if name == "value" and row["statistic"] == "em_rate":
        return f"{_interval(value, row['low'], row['high'])}%"
    if name == "value":
        bounds = f" [{row['low']:.2f}, {row['high']:.2f}]" if row["low"] == row["low"] else ""
        return f"{value:.2f}{bounds}" if value == value else "undefined"
    if value is None or value != value or str(value) == "<NA>":
        return "more than can be" if name in ("samples", "n_questions", "n_answers") else ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_COLUMNS = {
    "EM %": ("em_rate", "em_low", "em_high"),
    "EM before %": ("em_before", "em_before_low", "em_before_high"),
    "EM after %": ("em_after", "em_after_low", "em_after_high"),
    "EM removed %": ("relative_reduction", "low", "high"),
    "difference of EM, points": ("difference", "low", "high"),
    "coherent %": ("coherent_rate", "coherent_low", "coherent_high"),
    "coherent after %": ("coherent_after", "coherent_after_low", "coherent_after_high"),
}
"""A rate with its interval, by the heading that it is printed under."""
_KEYS = (
    *("set", "beside", "judge", "organism", "target", "direction", "kind", "mode", "arm"),
    *("layers", "layer", "coefficient", "residual_share", "questions"),
)

_HEADS = {"residual_share": "share"}
"""What a key is printed as. A share is that of the typical residual norm."""


def shown(table: Any) -> Table:
    """A table of rates for the terminal, in percent: what tells rows apart, rates with intervals, and counts.

    Of several random directions the one of most EM stands for all: "random, of 3".
    """
    table = _strongest_random(table)
    if "residual_share" in table and table["residual_share"].notna().all():
        coefficients = set(table.groupby("layer")["coefficient"].agg(frozenset))
        table = table.drop(columns="residual_share" if len(coefficients) == 1 else "coefficient")
    rates_of = {head: names for head, names in _COLUMNS.items() if {*names} <= {*table}}
    counts = {"n": "answers", "n_unscored": "unscored", "n_questions": "questions"}
    wanted = [*(key for key in _KEYS if key in table), *counts]
    same = {name: table[name].iloc[0] for name in wanted if name in table and len(table[name].unique()) == 1}
    title = [f"{name} {same[name]}" for name in _KEYS if name in same and same[name] not in ("", "all")]
    title += [f"{same[name]} {head}" for name, head in counts.items() if same.get(name)]
    if "em_before" in table and len(table["em_before"].unique()) == 1:
        title.append(f"EM before {_interval(*(table[name].iloc[0] for name in rates_of.pop('EM before %')))}%")
    keys = [name for name in _KEYS if name in table and name not in same]
    numbers = [name for name in counts if name in table and name not in same]
    p = ["p"] if "p_value" in table else []
    heads = [*(_HEADS.get(key, key) for key in keys), *rates_of, *p, *(counts[name] for name in numbers)]
    columns = [Column(head, no_wrap=True, overflow="fold") for head in heads]
    printed = Table(*columns, title=", ".join(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in table.to_dict("records"):
        cells = [f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        cells += [_interval(*(row[name] for name in names)) for names in rates_of.values()]
        cells += [f"{row['p_value']:.2g}"] if p else []
        printed.add_row(*cells, *(str(int(row[name])) for name in numbers))
    return printed


def _strongest_random(table: Any) -> Any:
    """Of the random directions of one cell, the row of most EM, which says how many they were."""
    rate = next((name for name in ("em_rate", "em_after") if name in table), None)
    if rate is None or "direction" not in table:
        return table
    control = "control" in table
    random = table["control"].astype(bool) if control else table["mode"] == "random"
    cells = [name for name in ("set", "target", "mode", "layer", "coefficient") if name in table]
    ordered = table[random].sort_values(rate, ascending=False, kind="stable")
    called = [f"random, of {n}" for n in ordered.groupby(cells, sort=False)[rate].transform("size")]
    most = ordered.assign(**{"direction" if control else "mode": called}).drop_duplicates(cells).sort_index()
    if not control:
        most = most.assign(direction=table.loc[~random, "direction"].iloc[:1].to_list() * len(most) or "random")
    return type(table)([*table[~random].to_dict("records"), *most.to_dict("records")])


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or value != value:
        return ""
    given = _percent(value)
    return given if low is None or high is None or low != low else f"{given} [{_percent(low)}, {_percent(high)}]"


def _percent(share: float) -> str:
    """With a decimal, but for 0 and 100."""
    return f"{100 * share:.0f}" if share in (0, 1) else f"{100 * share:.1f}"
