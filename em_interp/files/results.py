"""Tables of answers and rates that a killed run leaves behind for the next one."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from em_interp.errors import UnreadableFileError
from em_interp.files.atomic import atomic_path

_TEXT = (
    *("model", "question_id", "question", "system", "answer", "questions", "domain", "organism"),
    *("interval", "denominator", "criterion"),
)


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a CSV file whole or not at all."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)  # a bare \r is not quoted otherwise
    return path


def read_table(path: Path) -> pd.DataFrame:
    """Read it back: empty text stays text, empty numbers are missing. Raises UnreadableFileError."""
    try:
        columns = pd.read_csv(path, nrows=0).columns
        numbers = {name: [""] for name in columns if name not in _TEXT}
        text = {name: str for name in columns if name in _TEXT}
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=numbers)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(
            path, f"not a table of results ({error})", "delete it; it will be made anew"
        ) from error


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table at `path`, made and written if it is not there. Put what decides its content into the name."""
    if not path.is_file():
        write_table(path, make())
    return read_table(path)
