"""The same figure on a narrow screen: panels under one another, fewer ticks, short lines of text."""

from __future__ import annotations

from typing import Any, Final

import plotly.graph_objects as go

from em_interp.figures.layout import LINE, axes_of, grid_of, legend_rows, lines_in, wrapped

PHONE: Final = 420
"""Pixels of a narrow screen."""
_BELOW: Final = 56  # tick labels and an axis title
_BETWEEN: Final = 46  # tick labels of one panel, title of the next but for its lines
_TITLE: Final = 16  # a line of that


def narrow(figure: go.Figure) -> go.Figure:
    """The figure as a phone shows it."""
    phone = go.Figure(figure)
    phone.plotly_relayout({**narrow_layout(figure), "width": PHONE})
    return phone


def narrow_layout(figure: go.Figure) -> dict[str, Any]:
    """What `Plotly.relayout` changes for a narrow screen."""
    _, n = grid_of(figure)
    columns = 1 if n <= 4 else 2
    rows = [range(n)[start : start + columns] for start in range(0, n, columns)]
    tall = [max(_tall(figure, number, n) for number in row) for row in rows]
    titles = [_titles(figure, row) for row in rows] if n > 1 else [[""]]
    above = [0, *(_BETWEEN + _TITLE * max(map(lines_in, row)) for row in titles[1:])]
    inside = sum(tall) + sum(above)
    top, below = figure.layout.margin.t, _BELOW + LINE * legend_rows(figure, PHONE)
    changes: dict[str, Any] = {"height": top + inside + below, "font.size": 12, "legend.font.size": 12}
    changes |= {"margin.l": 6, "margin.r": 10}
    start = 0
    for row, height, gap, said in zip(rows, tall, above, titles, strict=True):
        start += gap
        up = [1 - (start + height) / inside, 1 - start / inside]
        start += height
        for col, number in enumerate(row):
            width = 1.0 if len(row) == 1 else 0.44
            across = [0.0, width] if col == 0 else [1 - width, 1.0]
            changes |= _panel(figure, number, across, up, is_left=col == 0, is_lowest=row is rows[-1])
            if n > 1:
                title = f"annotations[{number}]."
                changes |= {title + "x": sum(across) / 2, title + "y": up[1], title + "font.size": 13}
                changes[title + "text"] = said[col]
    if figure.layout.coloraxis.colorbar.title.text:
        bar = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.5, "xanchor": "center", "title.side": "top"}
        changes |= {f"coloraxis.colorbar.{name}": value for name, value in bar.items()} | {"margin.t": 110}
        changes["height"] += 110 - top
        changes["xaxis.title.standoff"] = None  # which plotly.js measures wrongly under a horizontal colour bar
    return changes


def _titles(figure: go.Figure, row: range) -> list[str]:
    """Of a row's panels, in lines."""
    width = 54 if len(row) == 1 else 24
    return [wrapped(str(figure.layout.annotations[number].text), width) for number in row]


def _tall(figure: go.Figure, number: int, n: int) -> int:
    """Pixels of a panel: of its rows where the y axis has named ones."""
    labels = axes_of(figure)[number][1].ticktext
    if labels is not None:
        each = figure.layout.meta["row"]
        return int(sum(max(each, 15 * lines_in(wrapped(str(label), _label(n))) + 8) for label in labels)) + 12
    if figure.layout.coloraxis.colorbar.title.text:
        return 330
    return 290 if n == 1 else 190


def _label(n: int) -> int:
    """Characters of a line of a row's name."""
    return 18 if n <= 4 else 10


def _panel(
    figure: go.Figure, number: int, across: list[float], up: list[float], *, is_left: bool, is_lowest: bool
) -> dict[str, Any]:
    _, n = grid_of(figure)
    axes = axes_of(figure)
    titles = [next((axis[i].title.text for axis in axes if axis[i].title.text), "") for i in (0, 1)]
    name = "" if number == 0 else str(number + 1)
    x, y = f"xaxis{name}.", f"yaxis{name}."
    changes: dict[str, Any] = {
        x + "domain": across,
        y + "domain": up,
        x + "nticks": 5,
        x + "showticklabels": True,
        x + "title.text": wrapped(titles[0], 44 if n <= 4 else 22) if is_lowest else None,
        y + "title.text": wrapped(titles[1], 28) if is_left else None,
    }
    labels = axes[number][1].ticktext
    if labels is None:
        changes[y + "nticks"] = 5
    else:
        changes[y + "ticktext"] = [wrapped(str(label), _label(n)) for label in labels]
    shares = any(up.matches for _, up in axes)
    return changes | {y + "showticklabels": is_left or not shares}
