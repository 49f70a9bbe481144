"""Figures for the page: plain JSON that its script draws for any width, in light, in dark and on paper."""

from __future__ import annotations

import json
from typing import Any, Final

import plotly.graph_objects as go
import plotly.io

from em_interp import figures as house

DARK: Final = {
    "rgb(36,36,36)": "#d8dadd",
    "rgb(232,232,232)": "#34383f",
    "#E6E6E6": "#34383f",
    "#222222": "#e6e7e9",
    "#000000": "#ffffff",
    "#0072B2": "#4aa8e8",
    house.NULL_FILL: "rgba(200,200,200,0.2)",
    "rgba(255,255,255,0.7)": "rgba(22,24,28,0.7)",
}
"""House colours that would sink into a dark page -> what stands for them there."""
_DIGITS: Final = 6
_PANEL: Final = 250
"""Pixels of a panel where all stand below each other."""


def template() -> dict[str, Any]:
    """The template that all house figures share: once in a page, not once a figure."""
    shared: dict[str, Any] = json.loads(plotly.io.to_json(go.Figure(layout={"template": "simple_white"})))
    found: dict[str, Any] = shared["layout"]["template"]
    return found


def drawn(figure: go.Figure) -> dict[str, Any]:
    """data, layout, and what of the layout is other on a narrow page. Without template and width."""
    whole = _rounded(json.loads(plotly.io.to_json(figure)))
    layout = whole["layout"]
    for key in ("template", "width", "meta"):
        layout.pop(key, None)
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    return {"data": whole["data"], "layout": layout, "narrow": _below_each_other(layout, _gap(whole["data"]))}


def _rounded(value: Any) -> Any:
    """The same JSON with numbers to `_DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def _gap(traces: list[dict[str, Any]]) -> float:
    """Pixels between panels that stand below each other: for the axis's title, and its labels where they are turned."""
    labels = (x for trace in traces if isinstance(trace.get("x"), list) for x in trace["x"] if isinstance(x, str))
    return 85.0 + 5.0 * max((len(label) for label in labels), default=0)


def _below_each_other(layout: dict[str, Any], gap: float) -> dict[str, Any]:
    """Axes, titles of panels and height that put panels which stand side by side into one column; {} for one column."""
    axes = {key.replace("axis", ""): key for key in layout if key.startswith(("xaxis", "yaxis"))}
    panels = [
        (axes[layout[key].get("anchor", "x")], key)
        for key in axes.values()
        if key.startswith("y") and "overlaying" not in layout[key] and layout[key].get("anchor", "x") in axes
    ]
    if len({tuple(layout[x].get("domain", (0, 1))) for x, _ in panels}) < 2:
        return {}
    panels.sort(key=lambda axis: (-layout[axis[1]]["domain"][0], layout[axis[0]]["domain"][0]))
    inside = len(panels) * _PANEL + (len(panels) - 1) * gap
    changed: dict[str, Any] = {"height": inside + layout["margin"]["t"] + layout["margin"]["b"]}
    titles = [dict(title) for title in layout.get("annotations", [])]
    for place, (x, y) in enumerate(panels):
        top = 1 - place * (_PANEL + gap) / inside
        old_x, old_y = layout[x]["domain"], layout[y]["domain"]
        for title in titles:
            if _is_title_of(title, old_x, old_y):
                title |= {"x": 0.0, "xanchor": "left", "y": top, "moved": True}
        changed[x] = {**layout[x], "domain": [0.0, 1.0], "showticklabels": True}
        changed[y] = {**layout[y], "domain": [max(0.0, top - _PANEL / inside), top], "showticklabels": True}
    for title in titles:
        title.pop("moved", None)
    return {**changed, "annotations": titles} if titles else changed


def _is_title_of(title: dict[str, Any], x: list[float], y: list[float]) -> bool:
    """Whether an annotation stands over the middle of a panel, which no other has taken."""
    if title.get("xref") != "paper" or title.get("yref") != "paper" or title.get("moved"):
        return False
    return abs(title["x"] - sum(x) / 2) < 1e-3 and abs(title["y"] - y[1]) < 1e-3
