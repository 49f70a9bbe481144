"""Figures of a `steering` table: rates against strength, and what EM costs in coherence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from em_interp import figures
from em_interp.arguments import columns
from em_interp.figures.layout import place

Rate = tuple[str, str, str]
"""As in `RATES`."""
RATES: Final[tuple[Rate, ...]] = (("EM", "em_rate", "em"), ("coherent", "coherent_rate", "coherent"))
"""Name in the legend, column, and what the columns of its interval begin with."""
MOST: Final = 9
"""Panels of a figure."""


def dose_response(table: pd.DataFrame, by: str, strength: str, title: str, rates: Sequence[Rate] = RATES) -> go.Figure:
    """Rates in percent against `strength`, a panel for each value of the column `by`; title: of the x axis."""
    columns("a steering table", table, (by, strength, *(column for _, column, _ in rates)))
    figure, parts = _panels(table, by)
    for number, rows in enumerate(parts):
        for index, (name, column, interval) in enumerate(rates):
            y, low, high = (_percent(rows, c) for c in (column, f"{interval}_low", f"{interval}_high"))
            figures.line(figure, rows[strength], y, name, index, markers=True, low=low, high=high, panel=number)
    figures.style(figure, title, "share of answers (%)", height=figures.HEIGHT if len(parts) == 1 else 300)
    return figure.update_yaxes(range=[-3, 103])


def trade_off(table: pd.DataFrame, by: str, strength: str, name: str) -> go.Figure:
    """EM against coherence as the strength grows, a panel for each value of `by`; name: of the strength."""
    columns("a steering table", table, (by, strength, "em_rate", "coherent_rate"))
    figure, parts = _panels(table, by)
    for number, rows in enumerate(parts):
        rows = rows.sort_values(strength)
        (x, x_low, x_high), (y, low, high) = (
            [_percent(rows, c) for c in (f"{kind}_rate", f"{kind}_low", f"{kind}_high")] for kind in ("coherent", "em")
        )
        said = [f"{name} {value:.3g}" for value in rows[strength]]
        bounds: dict[str, Any] = {"low": low, "high": high, "x_low": x_low, "x_high": x_high}
        figures.line(figure, x, y, f"growing {name}", 0, markers=True, **bounds, hover=said, panel=number)
        _said(figure, x, y, np.where(np.isfinite(high), high, y), said, number)
    figures.style(figure, "coherent answers (%)", "EM (%)", height=figures.HEIGHT if len(parts) == 1 else 300)
    highest = 100 * np.nanmax(
        [0.05, *table["em_rate"].astype(float), *table.get("em_high", pd.Series([])).astype(float)]
    )
    return figure.update_xaxes(range=[-3, 106]).update_yaxes(range=[-0.06 * highest, 1.2 * highest])


def _said(figure: go.Figure, x: Any, y: Any, top: Any, said: list[str], panel: int) -> None:
    """The strength of most EM, above its bar."""
    best = int(np.nan_to_num(y, nan=-1.0).argmax())
    where = {"x": x[best], "y": top[best], "yshift": 9, "xanchor": "right" if x[best] > 80 else "center"}
    figure.add_annotation(text=said[best], showarrow=False, **where, **place(figure, panel))


def _panels(table: pd.DataFrame, by: str) -> tuple[go.Figure, list[pd.DataFrame]]:
    """A figure and the rows of each of its panels: of many groups, that of most EM and some between the ends."""
    names = list(dict.fromkeys(table[by]))
    if len(names) > MOST:
        best = table[by].iloc[int(np.nan_to_num(table["em_rate"].to_numpy(float), nan=-1.0).argmax())]
        spread = [names[i] for i in np.linspace(0, len(names) - 1, MOST - 1).round().astype(int)]
        names = [name for name in names if name in {best, *spread}]
    titles = [name if isinstance(name, str) else f"{by} {name}" for name in names]
    return figures.panels(titles, share_x=True), [table[table[by] == name] for name in names]


def _percent(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column of fractions in percent; NaN where there is no such column."""
    return 100 * rows.get(column, pd.Series(np.nan, rows.index)).to_numpy(dtype=float, na_value=np.nan)
