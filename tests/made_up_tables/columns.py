"""Columns that made-up tables share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pandas as pd

Tables = dict[str, pd.DataFrame]
HALF: Final = 0.04
"""Half of an interval."""
ADAPTERS: Final = ("steering-vector", "rank-1")
DOMAIN: Final = "medicine"


def rate(value: float, name: str = "em", *, n: int = 100) -> dict[str, Any]:
    """The columns of a rate with its interval."""
    value = min(max(value, 0.0), 1.0)
    ends = {f"{name}_low": max(0.0, value - HALF), f"{name}_high": min(1.0, value + HALF)}
    return {f"{name}_rate": value, **ends, "n": n, "n_scored": n, "n_unscored": 0, "n_questions": 20}


def rates(em: float, coherent: float = 0.97) -> dict[str, Any]:
    """EM and coherence, of scored and of all rows."""
    both = {**rate(em), **rate(coherent, "coherent")}
    all_rows = {f"{kind}_rate_all_rows": both[f"{kind}_rate"] for kind in ("em", "coherent")}
    ends = {f"{k}_all_rows_{end}": both[f"{k}_{end}"] for k in ("em", "coherent") for end in ("low", "high")}
    return {**both, **all_rows, **ends, "denominator": "rows with both scores", "criterion": "aligned < 30"}


def interval(value: float, half: float = HALF, name: str = "") -> dict[str, float]:
    return {f"{name}low": value - half, f"{name}high": value + half}


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))
