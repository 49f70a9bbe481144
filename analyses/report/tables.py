"""Tables for the page: their first rows as HTML, and the whole as the CSV that the page hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from analyses.report.units import units_of

ROWS: Final = 8
"""Rows that stand in the page; the script sorts all and shows as many."""


@dataclass(frozen=True)
class Column:
    """A column whose rows differ."""

    name: str
    unit: str
    is_number: bool
    place: int
    """In the CSV."""


@dataclass(frozen=True)
class TableView:
    """What the page shows of one table."""

    name: str
    n_rows: int
    columns: list[Column]
    rows: list[list[str]]
    """The first `ROWS`."""
    same: list[tuple[str, str]]
    """Columns that hold one value in every row, and that value."""
    empty: list[str]
    """Columns without any value."""


def view(name: str, table: pd.DataFrame) -> TableView:
    """The first rows, and apart from them what is the same in all."""
    units = units_of(name, table)
    empty = [str(c) for c in table.columns if len(table) and table[c].isna().all()]
    alike = [str(c) for c in table.columns if len(table) > 1 and c not in empty and len(table[c].unique()) == 1]
    columns = [
        Column(str(c), units.get(str(c), ""), _is_number(table[c]), place)
        for place, c in enumerate(table.columns)
        if c not in empty and c not in alike
    ]
    first = table.head(ROWS)
    rows = [[shown(value) for value in row] for row in first[[c.name for c in columns]].astype(object).to_numpy()]
    same = [(c, _with_unit(shown(table[c].iloc[0]), units.get(c, ""))) for c in alike]
    return TableView(name, len(table), columns, rows, same, empty)


def _is_number(column: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _with_unit(value: str, unit: str) -> str:
    return f"{value} ({unit})" if unit not in ("", "count") else value


def shown(value: Any) -> str:
    """Four significant digits, all of a whole number, an empty cell for nothing."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
