"""Every figure of every analysis, and of `em.plot`: titled, with units, intervals, nulls and names, on any screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import em_interp as em
from analyses.suite import ANALYSES, load_analysis
from em_interp.figures import INTERVAL
from em_interp.figures.layout import axes_of, caption_of, grid_of, legend_names
from em_interp.figures.phone import PHONE, narrow, narrow_layout
from tests.made_up_tables import MADE, SEEDED, without_intervals

COMMITTED = Path(__file__).parents[1] / "artifacts" / "results" / "pocket" / "tables"
UNIT = re.compile(r"\(.+\)|\bcosine\b|training step")
"""What an axis title has: its unit in brackets; cosines and steps are numbers."""
LAYERS = pd.DataFrame({"layer": [0, 1], "norm": [1.0, 2.0], "residual_norm": [9.0, 10.0]})
PLOTTED = {
    "steering": MADE["finetunes.steering"](1)["steering"],
    "ablation": MADE["finetunes.ablation"](1)["ablation"],
    "em_rates": MADE["finetunes.em_rates"](1)["em_rates"],
    "cosines": MADE["finetunes.cosines"](1)["cosines"].query("comparison == 'between finetunes'"),
    "efficiency": MADE["general_vs_narrow.efficiency"](1)["efficiency"].query("adapter == 'rank-1'"),
    "stability": MADE["general_vs_narrow.stability"](1)["stability"].query("adapter == 'rank-1'"),
    "influence": MADE["general_vs_narrow.influence"](1)["influence"].query("adapter == 'rank-1' and seed == 0"),
    "norms": LAYERS,
}
"""What `em.plot` draws."""
NO_INTERVAL = re.compile(
    r"released.*(cosines(_\w+)?|layer_cosines_adjacent|direction_norms)|runs\..*|plot/norms"
    r"|finetunes.cosines/(cosines|cosines_persona)|causes.pretraining/pretraining_trait"
)
"""Figures of what has none: single measurements or models, coordinates of runs, medians over pairs."""
NO_INTERVAL_OF = (
    "texts alone, in the chat model",
    "each random direction",
    "as close to both",
    "one world, no interval",
)
"""And names of such lines in the others."""
NULL = {
    r"(?!.*layer_).*cosines(_splits|_content_control|_readings|_persona)?": "random directions",
    r"finetunes.cosines/cosines_pairs": "no relation",
    r".*gradients.*": "random directions",
    r".*efficiency_lead": "no lead",
    r".*stability_gap": "no gap",
    r".*influence_ratio": "equal",
    r".*claims_.*": "no difference",
    r".*transfer_.*": "nothing removed",
    r".*lora_scalars": "chance",
    r".*local_cosine": "right turn",
    r"runs.kl_removal/.*": "as close to both",
}
"""Figure -> what its legend says of where no effect would be."""


SHIPPED = ("finetunes.ablation", "finetunes.lora_scalars", "runs.local_cosine", "general_vs_narrow.kl_sweep")
"""Analyses whose figures are drawn of the committed tables too: long names, many rows, panels and levels."""


def drawn() -> Iterator[tuple[str, go.Figure]]:
    for name in ANALYSES:
        plot = load_analysis(name).plot
        for figure_name, figure in plot(MADE[name](1)).items():
            yield f"{name}/{figure_name}", figure
    for name, table in PLOTTED.items():
        yield f"plot/{name}", em.plot(table)


FIGURES = dict(drawn())


def committed() -> Iterator[tuple[str, go.Figure]]:
    for name in ANALYSES:
        analysis = load_analysis(name)
        paths = {table: COMMITTED / f"{table}.csv" for table in analysis.TABLES}
        if name in SHIPPED and all(path.is_file() for path in paths.values()):
            for figure_name, figure in analysis.plot({t: pd.read_csv(path) for t, path in paths.items()}).items():
                yield f"{name}/{figure_name}", figure


def data_traces(figure: go.Figure) -> list[Any]:
    """Those with points of their own: no entries of the legend alone, no bands of an interval."""
    return [
        trace
        for trace in figure.data
        if trace.type == "scatter" and not str(trace.name).endswith(INTERVAL) and len(known(trace)) > 0
    ]


def known(trace: Any) -> np.ndarray:
    return np.flatnonzero(
        [x is not None and y is not None and y == y and x == x for x, y in zip(trace.x, trace.y, strict=True)]
    )


def bars(trace: Any) -> np.ndarray:
    """Which points have a bar along either axis."""
    has = np.zeros(len(trace.x), dtype=bool)
    for error in (trace.error_x, trace.error_y):
        if error.array is not None:
            has |= np.isfinite(np.asarray(error.array, dtype=float))
    return has


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_shows(name: str) -> None:
    figure = FIGURES[name]
    columns, n = grid_of(figure)
    assert caption_of(figure).endswith(".")
    if n > 1:
        titles = [note.text for note in figure.layout.annotations[:n]]
        assert all(titles) and len(set(titles)) == n
    axes = axes_of(figure)
    below = {x.title.text for x, _ in axes[-columns:] if x.title.text}
    left = {y.title.text for number, (_, y) in enumerate(axes) if number % columns == 0 and y.ticktext is None}
    assert below and None not in left
    for title in {*below, *left} - {"as logged"}:  # whose panels say the unit
        assert UNIT.search(title), title


@pytest.mark.parametrize("name", FIGURES)
def test_every_line_is_named_once(name: str) -> None:
    figure = FIGURES[name]
    names = legend_names(figure)
    assert len(set(names)) == len(names), names
    traces = [trace for trace in data_traces(figure) if trace.name]
    said = {*names, *(note.text for note in figure.layout.annotations)}
    for trace in traces if len({trace.name for trace in traces}) > 1 else []:
        assert trace.name in said, trace.name


@pytest.mark.parametrize("name", FIGURES)
def test_intervals_are_drawn_where_the_table_has_them(name: str) -> None:
    figure = FIGURES[name]
    if any(trace.type == "heatmap" for trace in figure.data) or NO_INTERVAL.fullmatch(name):
        return
    assert INTERVAL in legend_names(figure)
    banded = {trace.legendgroup for trace in figure.data if str(trace.name).endswith(f", {INTERVAL}")}
    for trace in data_traces(figure):
        if trace.name in NO_INTERVAL_OF or trace.line.dash == "dot" or trace.fill == "toself":
            continue
        assert bars(trace)[known(trace)].all() or trace.legendgroup in banded, trace.name


@pytest.mark.parametrize("name", FIGURES)
def test_what_no_effect_would_give_is_drawn(name: str) -> None:
    for pattern, said in NULL.items():
        if re.fullmatch(pattern, name):
            assert any(said in entry for entry in legend_names(FIGURES[name])), legend_names(FIGURES[name])
            assert FIGURES[name].layout.shapes or "kl_removal" in name
            return


def fits_a_phone(figure: go.Figure) -> None:
    """Panels one under another that do not touch, text in lines that the screen holds, a height for the legend."""
    phone, (_, n) = narrow(figure), grid_of(figure)
    inner = phone.layout.height - phone.layout.margin.t
    most = max((note.text.count("<br>") + 1 for note in phone.layout.annotations[:n]), default=0) if n > 1 else 0
    panels = sorted((tuple(y.domain), tuple(x.domain)) for x, y in axes_of(phone))
    for (low, high), (left, right) in panels:
        assert 0 <= low < high <= 1 + 1e-9 and 0 <= left < right <= 1
        assert (high - low) * inner >= 60
    for one, other in pairwise(panels):
        (_, top), across = one
        (above, _), beside = other
        side_by_side = across[1] <= beside[0] or beside[1] <= across[0]
        assert side_by_side or (above - top) * inner >= 20 + 16 * most  # numbers below the one, title of the other
    texts = [(str(note.text), 7) for note in phone.layout.annotations[: n if n > 1 else 0]]
    texts += [(entry, 6.5) for entry in legend_names(phone)]
    texts += [(str(x.title.text), 6.5) for x, _ in axes_of(phone) if x.title.text]
    for text, pixels in texts:
        assert max(map(len, text.split("<br>"))) * pixels <= PHONE - 40, text
    for _, y in axes_of(phone):
        for label in y.ticktext or ():
            assert max(map(len, str(label).split("<br>"))) * 6.5 <= PHONE / 2, label
    assert narrow_layout(figure)["height"] < 6000


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_fits_a_phone(name: str) -> None:
    fits_a_phone(FIGURES[name])


def test_figures_of_the_shipped_tables_fit_a_phone_and_name_their_lines() -> None:
    for _, figure in committed():
        fits_a_phone(figure)
        names = legend_names(figure)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ANALYSES)
def test_a_figure_is_drawn_whatever_came_out(name: str) -> None:
    """The other way round, without intervals; of one seed."""
    plot = load_analysis(name).plot
    assert {f"{name}/{figure}" for figure in plot(MADE[name](-1))} == {f for f in FIGURES if f.startswith(f"{name}/")}
    for figure in plot(without_intervals(MADE[name](1))).values():
        over_seeds = name.endswith(("stability", "register"))  # whose figures make their means themselves
        assert over_seeds or not any(bars(trace).any() for trace in data_traces(figure))
    if name in SEEDED:
        assert plot(SEEDED[name](1, [0]))
