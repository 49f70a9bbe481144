"""The figure of a table, one call away: the table's columns say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from em_interp import figures
from em_interp.errors import UsageError
from em_interp.interventions.judged import rates_figure
from em_interp.landscape.stability import dispersion
from em_interp.statistics import NORMAL, PERCENT


def plot(table: pd.DataFrame) -> go.Figure:
    """The figure of a table of `rates`, `cosines`, `efficiency`, `stability`, `influence`, or of a contrast's `norms`.

    A figure of plotly's in the house style: `.show()`, or `figures.save(figure, path)`. Raises UsageError for a table
    of other columns, with what to do where one step is missing.
    """
    for needed, draw in _KINDS.items():
        if set(needed) <= set(table.columns):
            return draw(table)
    if "answer" in table:
        raise UsageError(
            "answers are not plotted as they are. Let a judge add the columns aligned and coherent (0-100), then: "
            "plot(rates(judged))."
        )
    known = "; ".join(", ".join(needed) for needed in _KINDS)
    raise UsageError(
        f"no figure is made of the columns {', '.join(map(str, table.columns))}. Known tables have {known}."
    )


def _efficiency(table: pd.DataFrame) -> go.Figure:
    """Loss against norm."""
    ordered = _in_order(table, "solution", "norm")
    axes = ("norm of theta (Frobenius)", "loss (nats per response token)")
    drawn = _lines(ordered, "norm", "loss", "solution", *axes, ("loss_low", "loss_high"))
    return figures.captioned(drawn, f"Loss against norm, each solution scaled; bars: {PERCENT} over questions.")


def _stability(table: pd.DataFrame) -> go.Figure:
    """Share of the gain that is lost against eps."""
    axes = ("eps (sine of the turn)", "loss increase (% of the gain)")
    drawn = _lines(dispersion(table), "epsilon", "mean", "solution", *axes)
    return figures.captioned(drawn, f"Mean over random turns; bars: {PERCENT} of the mean.")


def _influence(table: pd.DataFrame) -> go.Figure:
    """KL on text against norm, random directions as the range of their intervals."""
    table = table[table["tokens"] == "all"] if (table["tokens"] == "all").any() else table
    random = table["kind"] == "random"
    ordered = _in_order(table[~random], "direction", "norm")
    axes = ("norm of theta (Frobenius)", "KL from the chat model (nats per token)")
    drawn = _lines(ordered, "norm", "kl_nats_per_token", "direction", *axes)
    if random.any():
        bounds = table[random].groupby("norm").agg({"low": "min", "high": "max"})
        _band(drawn, bounds, f"{table.loc[random, 'direction'].nunique()} random directions")
    return figures.captioned(drawn, f"Bars: {PERCENT} over documents; band: the range of random directions' intervals.")


def _cosines(table: pd.DataFrame) -> go.Figure:
    """Cosine against layer, a line a pair, with what random directions give."""
    pairs = table.assign(pair=table["direction_a"].astype(str) + " and " + table["direction_b"].astype(str))
    value = "cosine_debiased" if "cosine_debiased" in table and table["cosine_debiased"].notna().any() else "cosine"
    drawn = _lines(pairs, "layer", value, "pair", "layer (output of block)", "cosine")
    figures.null_band(drawn, NORMAL * float(table["null_sd"].max()), f"random directions, {PERCENT}")
    return figures.captioned(drawn, f"Bars: {PERCENT} over questions, where the responses were kept.")


def _norms(table: pd.DataFrame) -> go.Figure:
    """Norm of a direction beside that of a token's residual."""
    named = {"norm": "direction", "residual_norm": "residual of a token, mean"}
    long = table.melt("layer", list(named), "of", "length").replace({"of": named})
    drawn = figures.lines_by(
        long, "layer", "length", "of", "layer (output of block)", "norm (residual stream)", markers=True
    )
    return figures.captioned(drawn, "Norms by layer, in units of the residual stream.")


def _lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    x_title: str,
    y_title: str,
    ends: tuple[str, str] = ("low", "high"),
) -> go.Figure:
    """A line with markers for each value of `by`; ends: the columns of the interval."""
    return figures.lines_by(table, x, y, by, x_title, y_title, markers=True, low=ends[0], high=ends[1])


def _in_order(table: pd.DataFrame, by: str, x: str) -> pd.DataFrame:
    """Lines in the order in which they first come, each from left to right."""
    return pd.concat([rows.sort_values(x) for _, rows in table.groupby(by, sort=False)])


def _band(figure: go.Figure, bounds: pd.DataFrame, name: str) -> None:
    x = [*bounds.index, *bounds.index[::-1]]
    y = np.concatenate([bounds["high"], bounds["low"][::-1]])
    style: dict[str, Any] = {"fill": "toself", "mode": "lines", "line": {"width": 0}, "fillcolor": figures.NULL_FILL}
    figure.add_trace(go.Scatter(x=x, y=y, name=name, hoverinfo="skip", **style))


_KINDS: Final[dict[tuple[str, ...], Callable[[pd.DataFrame], go.Figure]]] = {
    ("direction", "layer", "coefficient", "em_rate"): rates_figure,
    ("mode", "em_before", "em_after"): rates_figure,
    ("organism", "questions", "em_rate"): rates_figure,
    ("direction_a", "direction_b", "layer", "cosine", "null_sd"): _cosines,
    ("solution", "scale", "norm", "loss", "loss_low"): _efficiency,
    ("solution", "epsilon", "seed", "relative_increase_percent"): _stability,
    ("direction", "kind", "kl_nats_per_token", "relative_norm", "tokens"): _influence,
    ("layer", "norm", "residual_norm"): _norms,
}
"""Columns -> what is drawn of a table that has all of them."""
