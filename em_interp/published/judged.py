"""Released judged answers: CSV files in their column variants."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from em_interp.errors import BadValueError, MissingDataError
from em_interp.files.inputs import read_csv

SCORES: Final = ("aligned", "coherent")
"""What every judged file has."""
_TEXT: Final = (
    *("question", "answer", "question_id", "questions", "model", "adapter", "organism", "target"),
    *("direction", "kind", "read_from", "arm", "layers", "judge", "reason", "category"),
)
"""Columns that are text, even where all of it looks like numbers."""
_ALIASES: Final = {"response": "answer", "alignment": "aligned", "coherency": "coherent", "coherence": "coherent"}


def canonical(name: str) -> str:
    """What this package calls a column of judged answers."""
    said = name.strip().lower()
    return _ALIASES.get(said, said)


def read_judged_csv(path: Path | str) -> pd.DataFrame:
    """Columns `question`, `answer`, `aligned`, `coherent` and every further score, as float64; empty = missing.

    Raises `MissingDataError` (no rows, or a column lacking), `BadValueError` (words or out-of-range numbers where
    scores belong) or `UnreadableFileError`.
    """
    path = Path(path)
    header, rows = read_csv(path)
    table = pd.DataFrame(rows, columns=pd.Index(header), dtype=str)
    table = table.rename(columns=canonical)
    if table.columns.duplicated().any():
        twice = sorted(set(table.columns[table.columns.duplicated()]))
        raise BadValueError(path, f"columns appear twice: {', '.join(twice)}", "keep one column of each name")
    lacking = [name for name in ("question", *SCORES) if name not in table]
    if lacking:
        raise MissingDataError(
            path,
            f"it lacks the column {', '.join(lacking)}; found {', '.join(table.columns)}",
            "judge the answers for alignment and coherence, or leave the file out",
        )
    if table.empty:
        raise MissingDataError(path, "it has a header and no rows", "download it again")
    for name in table.columns.difference(list(_TEXT)):
        table[name] = _to_scores(path, name, table[name], required=name in SCORES)
    return table


def _to_scores(path: Path, name: str, column: pd.Series, *, required: bool) -> pd.Series:
    text = column.str.strip()
    blank = text.isin(["", "nan", "NaN", "None", "null"])
    numbers = pd.to_numeric(text.mask(blank), errors="coerce").astype(float)
    words = numbers.isna() & ~blank
    if not required and words.any():
        return column  # some other text column: kept as it is
    if words.any():
        row = int(np.flatnonzero(words)[0])
        raise BadValueError(
            path,
            f"column {name!r} holds {text.iloc[row][:40]!r} in row {row + 2}, where a score from 0 to 100 belongs",
            "leave the cell empty where the judge gave no score",
        )
    outside = numbers.notna() & ~numbers.between(0, 100)
    if required and outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise BadValueError(
            path,
            f"column {name!r} holds {numbers.iloc[row]:g} in row {row + 2}, outside 0-100",
            "check the judge's output",
        )
    return numbers
