"""Opening files that a user named: what is no readable file is refused before it is opened, so that nothing hangs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from em_interp.errors import MissingDataError, UnreadableFileError, UsageError


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, where it leads to a file with content that can be read to its end.

    Raises MissingDataError (absent, or a link to nothing), UnreadableFileError (folder, FIFO, device, socket, no
    permission), UsageError (not a path).
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"a file is named by a {type(path).__name__} ({path!r:.60}). Give its path.")
    found = Path(path)
    try:
        mode = found.stat().st_mode
    except FileNotFoundError as error:
        problem = "it is a link to nothing" if found.is_symlink() else "there is no such file"
        raise MissingDataError(found, problem, "check the path") from error
    except (OSError, ValueError) as error:
        raise UnreadableFileError(found, f"it cannot be reached ({error})", "check the path") from error
    if stat.S_ISDIR(mode):
        raise UnreadableFileError(found, "it is a folder", "name the file in it")
    if not stat.S_ISREG(mode):
        raise UnreadableFileError(found, "it is a FIFO, device or socket, not a file", "save the content to a file")
    if not os.access(found, os.R_OK):
        raise UnreadableFileError(found, "there is no permission to read it", "give yourself that permission")
    return found


@contextmanager
def open_text(path: str | os.PathLike[str], newline: Literal[""] | None = None) -> Iterator[TextIO]:
    r"""A UTF-8 file, with or without a byte order mark; its lines end at \n, \r\n or \r and nowhere else.

    newline: "" leaves line ends as they are.

    Raises what `regular_file` raises, and UnreadableFileError for other encodings and for binary content.
    """
    found = regular_file(path)
    try:
        with found.open("rb") as file:
            if b"\0" in file.read(8192):
                raise UnreadableFileError(found, "it holds binary data, not text", "give UTF-8 text")
        with found.open(encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise UnreadableFileError(found, f"it is not UTF-8 text ({error})", "save it as UTF-8") from error
    except OSError as error:
        raise UnreadableFileError(found, f"it cannot be read ({error})", "check the file and its disk") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole file; raises what `open_text` raises."""
    with open_text(path) as file:
        return file.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises what `open_text` raises, and UnreadableFileError for what is no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(path, f"it is not readable JSON ({error})", "write or download it again") from error


def read_csv(path: str | os.PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV, and its rows, as strings. Blank lines are left out.

    A carriage return alone belongs to its cell, quoted or not (pandas does not quote it), where lines end otherwise.
    Raises MissingDataError (empty), UnreadableFileError (open quote, a row of another length than the header).
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with open_text(path, newline="") as file:  # a quoted cell keeps its own line ends
            text = file.read()
        unused = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
        held = re.sub(r"\r(?!\n)", unused, text) if "\n" in text else text
        reader = csv.reader(io.StringIO(held, newline=""), strict=True)
        for row in reader:
            if row:
                rows.append([cell.replace(unused, "\r") for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UnreadableFileError(path, f"it is not a readable CSV ({error})", "write or download it again") from error
    if not rows:
        raise MissingDataError(path, "the file is empty", "write or download it again")
    header, *body = rows
    for line, row in zip(lines[1:], body, strict=True):
        if len(row) != len(header):
            raise UnreadableFileError(
                path,
                f"the row that ends in line {line} has {len(row)} cells, the header {len(header)}",
                "quote cells that hold commas, quotes or line ends",
            )
    return header, body
