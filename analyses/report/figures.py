"""Figures for the page: plain JSON that its script draws for any width, in light, in dark and on paper."""

from __future__ import annotations

import json
from typing import Any, Final

import plotly.graph_objects as go
import plotly.io

from em_interp.figures.layout import LINE, WIDTH, legend_rows
from em_interp.figures.phone import PHONE, narrow_layout

_DIGITS: Final = 6


def drawn(figure: go.Figure) -> dict[str, Any]:
    """data, layout, what a narrow page changes in the layout (as `Plotly.relayout` names it), and legend.

    legend: pixels that it takes of the height, wide and narrow; where it takes more, the figure must grow.

    The page decides on width, paper and colour of the text.
    """
    whole = _rounded(json.loads(plotly.io.to_json(figure)))
    layout = {key: value for key, value in whole["layout"].items() if key not in ("template", "width", "meta")}
    layout["paper_bgcolor"] = "rgba(0,0,0,0)"
    legend = {"wide": LINE * max(legend_rows(figure, WIDTH), 1), "narrow": LINE * legend_rows(figure, PHONE)}
    return {"data": whole["data"], "layout": layout, "narrow": narrow_layout(figure), "legend": legend}


def _rounded(value: Any) -> Any:
    """The same JSON with numbers to `_DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
