"""What is expensive to make, on disk: made once, whichever process, run or analysis asks for it first."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from em_interp.errors import UnreadableFileError
from em_interp.files.atomic import atomic_path, one_at_a_time, remove_leftovers, write_text
from em_interp.files.manifest import code_hash, fingerprint
from em_interp.files.tables import Parts, load_state, save_state

_UNUSED_SECONDS: Final = 30 * 86_400
_Found = TypeVar("_Found")

_TEXT = (
    *("model", "question_id", "question", "system", "answer", "questions", "domain", "organism"),
    *("interval", "denominator", "criterion"),
    *("judge", "reason", "unscored_reasons", "aligned_how", "coherent_how"),
    *("experiment", "arm", "condition", "em_counts", "coherent_counts"),
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


class KeptWarning(UserWarning):
    """What was said when a result was made, said again where it is taken from disk."""


@dataclass(frozen=True)
class Results:
    """A folder of results: `KIND/NAME-HASH.csv` or `.safetensors`, HASH of all that made them.

    `NAME-HASH.json` beside each says what that was, so that one can see why something was made anew. Safe for several
    processes, on any file system with locks: of two that want the same, one makes it and the other waits. What a killed
    process had not finished is made again, but for finished batches of answers. Without a folder nothing is kept.
    """

    folder: Path | None = None

    def table(
        self,
        kind: str,
        name: str,
        made_by: Mapping[str, Any],
        make: Callable[[Parts | None], pd.DataFrame],
        *,
        code: Sequence[str],
    ) -> pd.DataFrame:
        """A table that `make` makes, given where to keep finished batches of answers (`sampling.sample_rows`).

        made_by: JSON values, all that decides its content. code: the modules that do, by their full names; what they
        import counts too. Raises OutputError, UnreadableFileError.
        """
        if self.folder is None:
            return make(None)
        return self._found(kind, name, ".csv", made_by, code, read_table, lambda path, at: write_table(path, make(at)))

    def tensors(
        self,
        kind: str,
        name: str,
        made_by: Mapping[str, Any],
        make: Callable[[], tuple[dict[str, Tensor], Any]],
        *,
        code: Sequence[str],
    ) -> tuple[dict[str, Tensor], Any]:
        """The same for named tensors with a JSON note."""
        if self.folder is None:
            return make()
        return self._found(
            kind, name, ".safetensors", made_by, code, load_state, lambda path, _: save_state(path, *make())
        )

    def _found(
        self,
        kind: str,
        name: str,
        ending: str,
        made_by: Mapping[str, Any],
        code: Sequence[str],
        read: Callable[[Path], _Found],
        write: Callable[[Path, Parts], object],
    ) -> _Found:
        key: dict[str, Any] = {"made_by": dict(made_by), "code": {"modules": list(code), "hash": code_hash(*code)}}
        readable = re.sub(r"[^\w.+-]+", "_", name).strip("_")[-80:]
        stem = f"{readable}-{fingerprint(key)[:16]}"
        assert self.folder is not None
        path, told = self.folder / kind / f"{stem}{ending}", self.folder / kind / f"{stem}.json"
        lock, parts = path.with_name(f".{stem}.lock"), path.with_name(f".{stem}.parts")
        if not path.is_file() or lock.exists():
            with one_at_a_time(lock):
                if not path.is_file():
                    with warnings.catch_warnings(record=True) as said:
                        write(path, Parts(parts))
                    key["said"] = list(
                        dict.fromkeys(str(each.message) for each in said if issubclass(each.category, UserWarning))
                    )
                    write_text(told, json.dumps(key, indent=1, default=str) + "\n")
                shutil.rmtree(parts, ignore_errors=True)
        found = read(path)
        os.utime(path)
        for message in _said(told):
            warnings.warn(message, KeptWarning, stacklevel=4)
        return found

    def __len__(self) -> int:
        """How many there are."""
        return 0 if self.folder is None else len([*self.folder.glob("*/*.csv"), *self.folder.glob("*/*.safetensors")])

    def say_kept(self) -> None:
        """Tell the user, on stderr, that there are some."""
        if len(self):
            tqdm.write(f"kept {len(self)} results of earlier runs in {self.folder}", file=sys.stderr)

    def tidy(self) -> None:
        """Remove what nobody used for 30 days, and what killed processes left. No other process may write here."""
        if self.folder is None:
            return
        for path in [*self.folder.glob("*/*.csv"), *self.folder.glob("*/*.safetensors")]:
            remove_leftovers(path)
            remove_leftovers(path.with_suffix(".json"))
            if time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)
        for path in self.folder.glob("*/.*"):
            stem = path.name[1:].removesuffix(path.suffix)
            whole = any(path.with_name(f"{stem}{ending}").is_file() for ending in (".csv", ".safetensors"))
            if path.suffix == ".lock":
                path.unlink()
            elif path.suffix == ".parts" and whole:
                shutil.rmtree(path, ignore_errors=True)


def _said(told: Path) -> list[str]:
    try:
        return list(json.loads(told.read_text(encoding="utf-8"))["said"])
    except (OSError, ValueError, KeyError):
        return []


KEEPING_NOTHING: Final = Results()
"""What is asked for is made every time."""
