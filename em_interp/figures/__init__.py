"""Tables -> plotly figures, in one house style that reads on screen, on a phone and in print.

A solid bar or a shaded band is always the interval, at the level of `statistics`. What is not (a range over pairs, all
perturbations) is a thin dotted line with a name of its own (`extent`). A hollow marker has no interval.

- `layout`: axis titles, panels, the legend; `phone`: the same on a narrow screen
- `steering`: figures of a table of steered answers
- `export`: pages, parts of a page, images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from em_interp.figures.export import CONFIG, ENDINGS, fragment, save, save_html, save_static, static_images_available
from em_interp.figures.layout import (
    HEIGHT,
    NEUTRAL,
    axes_of,
    caption_of,
    captioned,
    lines_in,
    panels,
    place,
    style,
    wrapped,
)
from em_interp.figures.phone import narrow
from em_interp.statistics import PERCENT

__all__ = [
    "COLOURS",
    "CONFIG",
    "DASHES",
    "ENDINGS",
    "HEIGHT",
    "NEUTRAL",
    "SYMBOLS",
    "caption_of",
    "captioned",
    "dot_plot",
    "dots",
    "extent",
    "fragment",
    "heatmap",
    "line",
    "lines_by",
    "narrow",
    "null_band",
    "null_line",
    "panels",
    "place",
    "save",
    "save_html",
    "save_static",
    "side_by_side",
    "static_images_available",
    "style",
    "ticks",
]

COLOURS: Final = ("#5A8FF5", "#BC8A00", "#356B57", "#7030FF", "#8992AB", "#855B1B", "#F5107A")
"""Told apart with and without red-green blindness, on white and on dark paper (contrast 2.9 or more on both)."""
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Of lines, in their order."""
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
"""Of points, in their order."""
NULL_FILL: Final = "rgba(128,128,128,0.25)"
INTERVAL: Final = f"{PERCENT} interval"
HOLLOW: Final = "hollow: no interval"
Group = tuple[str, str, str | None, str | None]
"""Name, column, and columns of the ends of the interval."""
LONG: Final = 44
"""Characters of a line of the legend: what a phone shows."""
Values = Sequence[Any] | NDArray[Any] | pd.Series  # type: ignore[type-arg]


def line(
    figure: go.Figure,
    x: Values,
    y: Values,
    name: str,
    index: int,
    *,
    markers: bool = False,
    low: Values | None = None,
    high: Values | None = None,
    x_low: Values | None = None,
    x_high: Values | None = None,
    hover: Sequence[str] | None = None,
    panel: int = 0,
) -> None:
    """One line, told apart by colour and by its dash or, with `markers`, by its symbol.

    low, high: the interval, as bars at markers, else as a band; x_low, x_high: of `x`. hover: what to say of a point.
    panel: which, from 0. In panels a name stands once in the legend.
    """
    name = wrapped(name, LONG) if len(name) > LONG else name
    given = {"low": low, "high": high, "x_low": x_low, "x_high": x_high}
    xs, ys = np.asarray(x), np.asarray(y, dtype=float)
    bounds = {key: np.asarray(values, dtype=float) for key, values in given.items() if values is not None}
    colour = COLOURS[index % len(COLOURS)]
    if "low" in bounds and not markers:
        _band(figure, xs, bounds["low"], bounds["high"], name, colour, panel)
    symbol = SYMBOLS[index % len(SYMBOLS)]
    has_bars = bool(bounds) and markers
    figure.add_trace(
        go.Scatter(
            x=list(x),
            y=list(y),
            name=name,
            legendgroup=name,
            showlegend=not _named(figure, name),
            mode="lines+markers" if markers else "lines",
            line={"color": colour, "dash": "solid" if markers else DASHES[index % len(DASHES)], "width": 2},
            marker={"symbol": _symbols(figure, symbol, ys, bounds.get("low")) if has_bars else symbol, "size": 8},
            error_y=_bars(ys, bounds.get("low"), bounds.get("high")) if markers else None,
            error_x=_bars(xs, bounds.get("x_low"), bounds.get("x_high")),
            text=hover,
            hovertemplate=None if hover is None else "%{text}<br>%{x:.4g}, %{y:.4g}",
        ),
        **place(figure, panel),
    )
    if any(np.isfinite(values).any() for values in bounds.values()):
        _note(figure, INTERVAL, symbol="line-ns-open" if markers else "square", colour=NEUTRAL)


def extent(
    figure: go.Figure,
    x: Values,
    low: Values,
    high: Values,
    name: str,
    index: int,
    *,
    panel: int = 0,
) -> None:
    """From the least to the greatest of several at each x: no interval, so a thin dotted line. name: of what."""
    ends = list(zip(x, low, high, strict=True))
    figure.add_trace(
        go.Scatter(
            x=[value for at, _, _ in ends for value in (at, at, None)],
            y=[value for _, least, most in ends for value in (least, most, None)],
            mode="lines",
            line={"color": COLOURS[index % len(COLOURS)], "width": 1.5, "dash": "dot"},
            name=name,
            showlegend=False,
            hoverinfo="skip",
        ),
        **place(figure, panel),
    )
    _note(figure, name, line={"color": NEUTRAL, "width": 1.5, "dash": "dot"})


def null_line(
    figure: go.Figure, value: float, name: str, *, axis: Literal["x", "y"] = "y", panel: int | None = None
) -> go.Figure:
    """A dotted line, in every panel or in one, at what no effect would give."""
    draw = figure.add_hline if axis == "y" else figure.add_vline
    dotted = {"color": NEUTRAL, "width": 1.5, "dash": "dashdot"}
    everywhere = {"row": "all", "col": "all"} if len(axes_of(figure)) > 1 else {}
    where = everywhere if panel is None else place(figure, panel)
    draw(value, line=dotted, opacity=1, layer="below", **where)
    _note(figure, name, line=dotted)
    return figure


def null_band(figure: go.Figure, half_width: float, name: str, *, panel: int = 0) -> None:
    """The range about 0 in which a cosine is indistinguishable from that of random directions."""
    figure.add_hrect(-half_width, half_width, fillcolor=NULL_FILL, line_width=0, layer="below", **place(figure, panel))
    _note(figure, name, symbol="square", colour=NULL_FILL)


def lines_by(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    x_title: str,
    y_title: str,
    *,
    markers: bool = False,
    low: str | None = None,
    high: str | None = None,
) -> go.Figure:
    """One line for each value of `by`, in order of appearance; low, high: columns of the interval."""
    figure = go.Figure()
    for index, (name, rows) in enumerate(table.groupby(by, sort=False)):
        bounds = (None if low is None else rows[low], None if high is None else rows[high])
        line(figure, rows[x], rows[y], str(name), index, markers=markers, low=bounds[0], high=bounds[1])
    return style(figure, x_title, y_title)


def dots(
    figure: go.Figure,
    table: pd.DataFrame,
    label: str,
    groups: Sequence[Group],
    *,
    scale: float = 1.0,
    apart: bool = True,
    panel: int = 0,
) -> None:
    """A named row for each row of the table, its estimates in it under one another, with intervals.

    groups: in the legend's order; columns that the table lacks are left out. scale:
    100 for fractions in percent. apart: under one another in their row, else all on its line.
    """
    groups = [group for group in groups if group[1] in table]
    step = 0.8 / max(len(groups), 2) if apart else 0.0
    for index, (name, column, low, high) in enumerate(groups):
        values = scale * table[column].to_numpy(dtype=float, na_value=np.nan)
        places = -np.arange(len(table)) - (index - (len(groups) - 1) / 2) * step
        known = {key: key is not None and key in table for key in (low, high)}
        bounds = [scale * table[k].to_numpy(dtype=float, na_value=np.nan) if known[k] else None for k in (low, high)]
        has = np.isfinite(bounds[0]) if bounds[0] is not None else np.ones(len(values), dtype=bool)
        shown = [*np.flatnonzero(np.isfinite(values) & has), *np.flatnonzero(np.isfinite(values) & ~has)]
        bounds = [None if bound is None else bound[shown] for bound in bounds]
        symbol = SYMBOLS[index % len(SYMBOLS)]
        figure.add_trace(
            go.Scatter(
                x=values[shown],
                y=places[shown],
                name=name,
                legendgroup=name,
                showlegend=not _named(figure, name) and len(groups) > 1,
                mode="markers",
                marker={
                    "color": COLOURS[index % len(COLOURS)],
                    "symbol": symbol if low is None else _symbols(figure, symbol, values[shown], bounds[0]),
                    "size": 9,
                },
                error_x=_bars(values[shown], *bounds),
                text=[str(table[label].iloc[i]) for i in shown],
                hovertemplate="%{text}: %{x:.4g}",
            ),
            **place(figure, panel),
        )
        if bounds[0] is not None and np.isfinite(bounds[0]).any():
            _note(figure, INTERVAL, symbol="line-ew-open", colour=NEUTRAL)
    shade = {"fillcolor": "rgba(128,128,128,0.08)", "line_width": 0, "layer": "below", **place(figure, panel)}
    for odd in range(1, len(table), 2):
        figure.add_hrect(-odd - 0.5, -odd + 0.5, **shade)
    names = [wrapped(str(name), 32) for name in table[label]]
    rows = {"tickvals": -np.arange(len(table)), "range": [0.5 - len(table), 0.5]}
    figure.update_yaxes(ticktext=names, **rows, **place(figure, panel))
    tall = max([12 + 13 * (len(groups) if apart else 1), *(8 + 16 * lines_in(name) for name in names)])
    figure.update_layout(meta={**(figure.layout.meta or {}), "row": tall})


def side_by_side(
    table: pd.DataFrame, label: str, by: str, columns: Sequence[str], names: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[Group]]:
    """A table and groups for `dots`: a row a `label`, a group a value of `by`, both in order of appearance.

    columns: of the estimate and the ends of its interval; those that the table lacks are left out. names: of the
    groups, in order, where they are others than the values.
    """
    wide = pd.DataFrame({label: table[label].drop_duplicates()}).set_index(label, drop=False)
    parts = {str(value): rows for value, rows in table.groupby(by, sort=False)}
    groups: list[Group] = []
    for value in parts if names is None else [value for value in names if value in parts]:
        rows = parts[value].drop_duplicates(label).set_index(label)
        estimate, low, high = (f"{column} {value}" for column in columns)
        for column in columns:
            if column in rows:
                wide[f"{column} {value}"] = rows[column]
        groups.append((value if names is None else names[value], estimate, low, high))
    return wide, groups


def ticks(figure: go.Figure, table: pd.DataFrame, label: str, column: str, name: str, index: int) -> None:
    """A thin upright tick for each of many values, under the `dots` in the row of their label."""
    rows = {
        str(text).replace("<br>", " "): at
        for text, at in zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True)
    }
    known = table[table[label].astype(str).isin(rows)]
    marker = {"symbol": "line-ns-open", "size": 10, "color": COLOURS[index], "line": {"width": 1.5}}
    places = known[label].astype(str).map(rows).astype(float) - 0.4
    given = {"name": name, "mode": "markers", "marker": marker, "hovertemplate": "%{x:.4g}"}
    figure.add_trace(go.Scatter(x=list(known[column]), y=list(places), **given))
    figure.update_layout(meta={**figure.layout.meta, "row": figure.layout.meta["row"] + 10})


def dot_plot(
    table: pd.DataFrame,
    label: str,
    groups: Sequence[Group],
    title: str,
    *,
    scale: float = 1.0,
    apart: bool = True,
) -> go.Figure:
    """A figure of `dots`; title: of the x axis, with its unit."""
    figure = go.Figure()
    dots(figure, table, label, groups, scale=scale, apart=apart)
    return style(figure, title, "")


def heatmap(matrix: NDArray[Any], labels: Sequence[Any], title: str, colour_title: str) -> go.Figure:
    """A square matrix of cosines on a diverging scale centred on zero."""
    figure = go.Figure(
        go.Heatmap(
            z=matrix,
            x=list(labels),
            y=list(labels),
            coloraxis="coloraxis",
            hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
        )
    )
    style(figure, title, title, height=620)
    bar = {"title": {"text": colour_title, "side": "right"}, "outlinewidth": 0}
    figure.update_layout(coloraxis={"cmin": -1, "cmax": 1, "colorscale": "RdBu_r", "colorbar": bar})
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


def _named(figure: go.Figure, name: str) -> bool:
    """Whether the legend has that name."""
    return any(trace.name == name and trace.showlegend is not False for trace in figure.data)


def _note(
    figure: go.Figure, name: str, *, symbol: str = "circle", colour: str = NEUTRAL, line: dict[str, Any] | None = None
) -> None:
    """What something means, once, at the end of the legend."""
    if _named(figure, name):
        return
    marker = {"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2, "color": colour}}
    how = {"mode": "markers", "marker": marker} if line is None else {"mode": "lines", "line": line}
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            name=name,
            legendgroup=name,
            showlegend=True,
            legendrank=2000,
            hoverinfo="skip",
            **how,
        )
    )


def _symbols(figure: go.Figure, symbol: str, values: NDArray[Any], low: NDArray[Any] | None) -> list[str]:
    """The symbol of each value, hollow where it has no interval, which the legend then says."""
    lacks = np.isfinite(values) & ~(np.isfinite(low) if low is not None else np.zeros(len(values), dtype=bool))
    if lacks.any():
        _note(figure, HOLLOW, symbol="circle-open")
    return [f"{symbol}-open" if each else symbol for each in lacks]


def _bars(values: NDArray[Any], low: NDArray[Any] | None, high: NDArray[Any] | None) -> dict[str, Any] | None:
    """Error bars from low to high; one without a bound has no bar."""
    if low is None or high is None:
        return None
    up, down = high - values.astype(float), values.astype(float) - low
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.6, "width": 3}


def _band(
    figure: go.Figure,
    x: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    name: str,
    colour: str,
    panel: int,
) -> None:
    """A shaded interval, broken where it has no bound."""
    known = np.isfinite(low) & np.isfinite(high)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known.astype(int))) + 1):
        if not len(part) or not known[part[0]]:
            continue
        around = np.concatenate([part, part[::-1]])
        figure.add_trace(
            go.Scatter(
                x=x[around],
                y=np.concatenate([low[part], high[part][::-1]]),
                fill="toself",
                mode="lines",
                line={"width": 0},
                fillcolor=f"rgba({red},{green},{blue},0.22)",
                name=f"{name}, {INTERVAL}",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            ),
            **place(figure, panel),
        )
