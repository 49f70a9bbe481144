"""Tables -> plotly figures, in one house style that reads on screen and in print."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from em_interp.errors import OutputError, UsageError
from em_interp.files.atomic import atomic_path, write_text

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette: distinct for colour-blind readers and in grey."""
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
NULL_FILL: Final = "rgba(90,90,90,0.18)"
WIDTH: Final = 900
HEIGHT: Final = 480
_INK: Final = "#222222"
_CHROME: Final = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome")


def style(figure: go.Figure, x: str, y: str, *, height: int = HEIGHT, legend: str = "below") -> go.Figure:
    """Axis titles and the house layout. The title belongs to the page around the figure, not into it."""
    figure.update_layout(
        template="simple_white",
        width=WIDTH,
        height=height,
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": _INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 75, "r": 25, "t": 40, "b": 70},
        colorway=COLOURS,
        hoverlabel={"namelength": -1},
        legend={"bgcolor": "rgba(255,255,255,0.7)"}
        if legend == "inside"
        else {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    if legend == "below":
        names = [trace.name or "" for trace in figure.data if trace.showlegend is not False and trace.name]
        rows = _legend_rows(names)
        figure.update_layout(margin_b=75 + 24 * rows, height=height + 24 * rows)
    grid = {"showgrid": True, "gridcolor": "#E6E6E6", "zeroline": False, "ticks": "outside"}
    figure.update_xaxes(title_text=x, **grid)
    figure.update_yaxes(title_text=y, **grid)
    return figure


def captioned(figure: go.Figure, caption: str) -> go.Figure:
    """Attach the sentence that the report prints under the figure."""
    figure.update_layout(meta={"caption": caption})
    return figure


def caption_of(figure: go.Figure) -> str:
    """The sentence of `captioned`, or nothing."""
    return str((figure.layout.meta or {}).get("caption", ""))


def _legend_rows(names: Sequence[str]) -> int:
    """Rows that a horizontal legend takes at the house width: plotly gives every entry the widest one's room."""
    if not names:
        return 0
    widest = max(map(len, names)) * 7.3 + 60
    return -(-len(names) // max(1, int((WIDTH - 100) / widest)))


def line(
    figure: go.Figure,
    x: Sequence[Any] | pd.Series,  # type: ignore[type-arg]
    y: Sequence[Any] | pd.Series,  # type: ignore[type-arg]
    name: str,
    index: int,
    *,
    markers: bool = False,
    low: Sequence[Any] | pd.Series | None = None,  # type: ignore[type-arg]
    high: Sequence[Any] | pd.Series | None = None,  # type: ignore[type-arg]
    row: int | None = None,
    col: int | None = None,
    **trace: Any,
) -> None:
    """One line, told apart by colour and dash; with `low` and `high`, error bars.

    In a panel (`row`, `col`), a name stands once in the legend, by its line in the first column.
    """
    if col is not None:
        trace = {"showlegend": col == 1, "legendgroup": name, **trace}
    error = None
    if low is not None and high is not None:
        values = np.asarray(y, dtype=float)
        error = {
            "type": "data",
            "symmetric": False,
            "array": np.asarray(high, dtype=float) - values,
            "arrayminus": values - np.asarray(low, dtype=float),
            "thickness": 1.2,
            "width": 4,
        }
    figure.add_trace(
        go.Scatter(
            x=list(x),
            y=list(y),
            name=name,
            mode="lines+markers" if markers else "lines",
            line={"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // 4 % len(DASHES)], "width": 2},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
            error_y=error,
            **trace,
        ),
        row=row,
        col=col,
    )


def null_band(figure: go.Figure, half_width: float, name: str, x: pd.Series) -> None:  # type: ignore[type-arg]
    """The range in which a cosine is indistinguishable from that of random directions, over the span of `x`."""
    x0, x1 = float(x.min()), float(x.max())
    figure.add_trace(
        go.Scatter(
            x=[x0, x1, x1, x0],
            y=[half_width, half_width, -half_width, -half_width],
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor=NULL_FILL,
            name=name,
            hoverinfo="skip",
        )
    )


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
    """One line for each value of `by`, in order of appearance; with a band between the columns low and high."""
    figure = go.Figure()
    for index, (name, rows) in enumerate(table.groupby(by, sort=False)):
        line(
            figure,
            rows[x],
            rows[y],
            str(name),
            index,
            markers=markers,
            low=None if low is None else rows[low],
            high=None if high is None else rows[high],
        )
    return style(figure, x_title, y_title)


def points(figure: go.Figure, null: float) -> go.Figure:
    """Markers without lines, those of one place side by side, and a dotted line at what no effect would give."""
    figure.update_traces(mode="markers")
    figure.add_hline(y=null, line_dash="dot", line_color="#888888")
    return figure.update_layout(scattermode="group")


def heatmap(matrix: np.ndarray, labels: Sequence[Any], title: str, colour_title: str) -> go.Figure:
    """A square matrix of cosines on a diverging scale centred on zero."""
    figure = go.Figure(
        go.Heatmap(
            z=matrix,
            x=list(labels),
            y=list(labels),
            zmin=-1,
            zmax=1,
            colorscale="RdBu_r",
            colorbar={"title": {"text": colour_title, "side": "right"}},
            hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
        )
    )
    style(figure, title, title, height=620)
    figure.update_layout(width=720)
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


def bars_with_intervals(
    table: pd.DataFrame, label: str, groups: Sequence[tuple[str, str, str | None, str | None]], y_title: str
) -> go.Figure:
    """Grouped bars; each group is (name, column, low column, high column). Fractions are shown in percent."""
    figure = go.Figure()
    for index, (name, column, low, high) in enumerate(groups):
        values = table[column].astype(float)
        error = None
        if low is not None and high is not None:
            error = {
                "type": "data",
                "symmetric": False,
                "array": 100 * (table[high].astype(float) - values),
                "arrayminus": 100 * (values - table[low].astype(float)),
                "thickness": 1.2,
            }
        figure.add_trace(
            go.Bar(
                x=list(table[label]),
                y=100 * values,
                name=name,
                error_y=error,
                marker={"color": COLOURS[index], "pattern": {"shape": ("", "/", "x")[index % 3]}},
            )
        )
    style(figure, "", y_title)
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[0, 105])
    return figure


def panels(titles: Sequence[str], columns: int = 2, **options: Any) -> go.Figure:
    """Subplots with titles, for `line(..., row=, col=)`."""
    rows = -(-len(titles) // columns)
    return make_subplots(rows=rows, cols=columns, subplot_titles=list(titles), **options)


def save_html(figure: go.Figure, path: Path) -> Path:
    """An interactive page; plotly.js lies beside it once for all figures of the folder, so no network is needed."""
    script = path.parent / "plotly.min.js"
    if not script.exists():
        from plotly.offline import get_plotlyjs

        write_text(script, get_plotlyjs())
    return write_text(path, figure.to_html(include_plotlyjs="plotly.min.js", full_html=True, config=CONFIG))


def save(figure: go.Figure, path: Path) -> Path:
    """One figure as a file of its own: .html (interactive, with all that it needs inside), .svg or .png.

    Raises `UsageError` for another ending, `OutputError` where it cannot be written or drawn.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: a figure is written as {', '.join(ENDINGS)}. Give it one of those endings.")
    if path.suffix == ".html":
        return write_text(path, figure.to_html(include_plotlyjs=True, full_html=True, config=CONFIG))
    if not static_images_available():
        raise OutputError(f"{path}: drawing {path.suffix} needs Chrome and the extra `static`. Write .html instead.")
    _draw({path: figure}, {path.suffix: ENDINGS[path.suffix]})
    return path


ENDINGS: Final = {".html": 1, ".svg": 1, ".png": 2}
"""What a figure can be written as, and at which scale."""
CONFIG: Final = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg"}}


def static_images_available() -> bool:
    """Whether the `static` extra and a Chrome are here."""
    try:
        import kaleido  # noqa: F401
    except ImportError:
        return False
    return any(shutil.which(name) for name in _CHROME)


def save_static(figures: dict[Path, go.Figure]) -> list[Path]:
    """Write each figure as .svg and .png (2x) beside the given paths, through one Chrome for all.

    Raises `OutputError` with the reason if Chrome cannot be started; the interactive figures are not touched.
    """
    return _draw(figures, {ending: scale for ending, scale in ENDINGS.items() if ending != ".html"})


def _draw(figures: Mapping[Path, go.Figure], endings: Mapping[str, int]) -> list[Path]:
    import kaleido

    written: list[Path] = []
    try:
        kaleido.start_sync_server(silence_warnings=True)
        try:
            for path, figure in figures.items():
                for suffix, scale in endings.items():
                    options = {"format": suffix[1:], "scale": scale}
                    image = kaleido.calc_fig_sync(figure, opts=options)
                    with atomic_path(path.with_suffix(suffix)) as temporary:
                        temporary.write_bytes(image)
                    written.append(path.with_suffix(suffix))
        finally:
            kaleido.stop_sync_server(silence_warnings=True)
    except OutputError:
        raise
    except Exception as error:  # kaleido and choreographer raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"static images could not be drawn by Chrome ({type(error).__name__}: {reason}).") from error
    return written
