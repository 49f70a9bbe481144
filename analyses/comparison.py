"""Published numbers beside ours: `published_numbers.toml` says which cell of which table each one is."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from analyses.findings import AGREES, DIFFERS

NUMBERS: Final = Path(__file__).with_name("published_numbers.toml")
"""The file of published numbers."""
COLUMNS: Final = ("analysis", "what", "published", "ours", "difference", "agrees", "source", "note")
"""Of the table `comparison`."""
_REDUCE: Final = ("only", "min", "max", "first", "last", "argmin")


@dataclass(frozen=True)
class Number:
    """One published number and where its counterpart stands.

    analysis: the one that makes it; what: the quantity; table, column, where: the cells, and reduce (`only`, `min`,
    `max`, `first`, `last`, `argmin`) what is made of several. source: paper and place; note: why it may differ.
    """

    analysis: str
    what: str
    published: float
    tolerance: float
    """Largest difference that counts as agreement: the published number's rounding, or what the source states."""
    table: str
    column: str
    where: dict[str, Any]
    source: str
    reduce: str = "only"
    relation: str = "="
    """`=`, or `>` and `<` for a bound."""
    note: str = ""


def load_numbers(path: Path = NUMBERS) -> list[Number]:
    """All published numbers, in file order."""
    return [Number(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["number"]]


def compare(tables: dict[str, pd.DataFrame], numbers: list[Number]) -> pd.DataFrame:
    """One row for each number whose table is here; `ours` is empty where the table holds no such row."""
    rows = []
    for number in numbers:
        if number.table not in tables:
            continue
        ours = _look_up(tables[number.table], number)
        difference = None if ours is None else ours - number.published
        agrees = None
        if difference is not None:
            slack = number.tolerance + 1e-12
            agrees = {"=": abs(difference) <= slack, ">": difference >= -slack, "<": difference <= slack}[
                number.relation
            ]
        shown = f"{number.relation if number.relation != '=' else ''} {number.published:g}".strip()
        module = number.analysis.rpartition(".")[2]  # released numbers know one of each name
        rows.append((module, number.what, shown, ours, difference, agrees, number.source, number.note))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def beside(tables: dict[str, pd.DataFrame], analysis: str, what: str, ours: float | None = None) -> dict[str, Any]:
    """published, source and verdict of a finding, from one number; empty where the tables hold none such.

    ours: the finding's estimate, where it must be the very cell that the number is held against.
    """
    known = next(n for n in load_numbers() if (n.analysis, n.what) == (analysis, what))
    row = compare(tables, [known]).to_dict("records")
    if not row or pd.isna(row[0]["ours"]) or (ours is not None and abs(row[0]["ours"] - ours) > 1e-9):
        return {}
    verdict = AGREES if row[0]["agrees"] else DIFFERS
    return {"published": known.published, "source": known.source, "verdict": verdict}


def _look_up(table: pd.DataFrame, number: Number) -> float | None:
    rows = table
    for column, value in number.where.items():
        if column not in rows:
            return None
        rows = rows[rows[column].isin(value) if isinstance(value, list) else rows[column] == value]
    values = rows[number.column].dropna() if number.column in rows else pd.Series(dtype=float)
    if values.empty or (number.reduce == "only" and len(values) != 1):
        return None
    if number.reduce == "argmin":
        return float(rows["layer"].to_numpy()[values.to_numpy().argmin()])
    reduced = {
        "only": lambda v: v.iloc[0],
        "min": lambda v: v.min(),
        "max": lambda v: v.max(),
        "first": lambda v: v.iloc[0],
        "last": lambda v: v.iloc[-1],
    }
    return float(reduced[number.reduce](values))
