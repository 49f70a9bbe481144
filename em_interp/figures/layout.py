"""Where things stand in a figure: axis titles, panels, the legend under them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

WIDTH: Final = 900
"""Pixels at which figures are laid out and exported; on a page they take its width."""
HEIGHT: Final = 420
"""Pixels of one row of panels, with its axis title and one row of legend."""
INK: Final = "#222222"
"""Text. A dark page sets `font.color` instead."""
NEUTRAL: Final = "#808080"
"""Axes, null lines and notes: legible on white and on dark paper."""
LINE: Final = 22
"""Pixels of a row of the legend."""
_GRID: Final = "rgba(128,128,128,0.22)"
_ABOVE_PANELS: Final = 58  # the toolbar, and under it the panels' titles
_ABOVE: Final = 34
_TITLE: Final = {1: 90, 2: 52, 3: 30}  # characters of a line of a panel's title, by the number of columns


def style(figure: go.Figure, x: str, y: str, *, height: int = HEIGHT) -> go.Figure:
    """Axis titles and the house layout. Panels that share an axis title have it once, at the edge.

    height: of one row of panels; that of `dots` follows from their rows. The figure's own title belongs to the page
    around it.
    """
    columns, n = grid_of(figure)
    rows = -(-n // columns)
    named = [len(up.ticktext) for _, up in axes_of(figure) if up.ticktext is not None]
    height = figure.layout.meta["row"] * max(named) + 120 if named else height
    line = {"showline": True, "linecolor": NEUTRAL, "ticks": "outside", "tickcolor": NEUTRAL, "automargin": True}
    axis = {**line, "showgrid": True, "gridcolor": _GRID, "zeroline": False, "title_standoff": 8}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    for number, (across, up) in enumerate(axes_of(figure)):
        across.title.text = x if number // columns == rows - 1 else None
        up.title.text = y if number % columns == 0 else None
        up.showgrid = up.ticktext is None
    top = [str(note.text) for note in figure.layout.annotations[:columns]] if n > 1 else []
    above = max((_ABOVE_PANELS + 18 * (lines_in(text) - 1) for text in top), default=_ABOVE)
    bottom_left = {"x": 0.01, "xanchor": "left", "y": 0, "yanchor": "bottom"}
    return figure.update_layout(
        template="none",
        height=rows * height + LINE * max(legend_rows(figure, WIDTH) - 1, 0),
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 16, "t": above, "b": 12},
        hovermode="closest",
        hoverlabel={"namelength": -1},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": NEUTRAL, "activecolor": NEUTRAL},
        legend={"orientation": "h", "xref": "container", "yref": "container", "font": {"size": 13}, **bottom_left},
    )


def panels(
    titles: Sequence[str], columns: int | None = None, *, share_x: bool = False, share_y: bool = True
) -> go.Figure:
    """A panel for each title, numbered from 0; the last one fills what is left of its row.

    A single panel has no title. columns: by default one row of up to three panels, two for four, three for more.
    """
    n = len(titles)
    columns = min(n, 2 if n == 4 else 3) if columns is None else columns
    rows = -(-n // columns)
    specs: list[list[dict[str, Any] | None]] = [[{} for _ in range(columns)] for _ in range(rows)]
    if rest := n % columns:
        specs[-1][rest - 1 :] = [{"colspan": columns - rest + 1}, *[None] * (columns - rest)]
    shown = [wrapped(title, _TITLE[columns]) for title in titles]
    lines = max((lines_in(title) for title in shown[columns:]), default=1)
    between = 0.09 if share_x and not rest else 0.14  # where the last row is not full, panels above it have tick labels
    figure = make_subplots(
        rows=rows,
        cols=columns,
        specs=specs,
        subplot_titles=shown if n > 1 else None,
        shared_xaxes=share_x,
        shared_yaxes=share_y,
        horizontal_spacing=0.05 if share_y else 0.09,
        vertical_spacing=0.0 if rows == 1 else (between + 0.05 * (lines - 1)) * 2 / rows,
    )
    return figure.update_layout(meta={"columns": columns, "panels": n})


def place(figure: go.Figure, panel: int) -> dict[str, Any]:
    """`row` and `col` of a panel (from 0), as plotly counts them; nothing in a figure of one."""
    columns, n = grid_of(figure)
    return {} if n == 1 else {"row": panel // columns + 1, "col": panel % columns + 1}


def grid_of(figure: go.Figure) -> tuple[int, int]:
    """Columns and number of panels."""
    meta = figure.layout.meta or {}
    return meta.get("columns", 1), meta.get("panels", 1)


def axes_of(figure: go.Figure) -> list[tuple[Any, Any]]:
    """The x and y axis of each panel, in reading order."""
    names = ["" if number == 0 else str(number + 1) for number in range(grid_of(figure)[1])]
    return [(figure.layout[f"xaxis{name}"], figure.layout[f"yaxis{name}"]) for name in names]


def captioned(figure: go.Figure, caption: str) -> go.Figure:
    """Attach the sentence that the report prints under the figure."""
    return figure.update_layout(meta={**(figure.layout.meta or {}), "caption": caption})


def caption_of(figure: go.Figure) -> str:
    """The sentence of `captioned`, or nothing."""
    return str((figure.layout.meta or {}).get("caption", ""))


def wrapped(text: str, width: int) -> str:
    """Text in lines of about `width` characters, broken with <br> after a space or a separator of names."""
    lines = [""]
    for word in re.findall(
        r"[^\s/_:,-]+[\s/_:,-]*|[\s/_:,-]+", re.sub("(?<=[_/-])<br>", "", text).replace("<br>", " ")
    ):
        if lines[-1] and len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "<br>".join(line.rstrip() for line in lines)


def lines_in(text: str) -> int:
    """Lines of a text with <br>."""
    return text.count("<br>") + 1


def legend_names(figure: go.Figure) -> list[str]:
    """What the legend shows, in order."""
    return [str(trace.name) for trace in figure.data if trace.name and trace.showlegend is not False]


def legend_rows(figure: go.Figure, width: int) -> int:
    """Rows that the legend takes at that width of the figure, in pixels."""
    rows, used = 0, float(width)
    for name in legend_names(figure):
        entry = 50 + 7.0 * max(map(len, name.split("<br>")))
        if used + entry > width - 20:
            rows, used = rows + 1, 0.0
        used += entry
    return rows
