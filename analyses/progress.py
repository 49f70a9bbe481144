"""What a run is doing now, beside the bar of what it has done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tqdm.auto import tqdm

_NAMED: Final = 3
"""Tasks whose names fit beside a bar."""


def now(running: Path, names: Mapping[str, str]) -> str:
    """The tasks that have begun and are not done. running: a folder with a file for each; names: by file."""
    begun = [name for mark, name in names.items() if (running / mark).exists()]
    more = len(begun) - _NAMED
    return ", ".join(begun[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def told(bar: tqdm[Any], running: Path, names: Mapping[str, str], *, every: float | None = None) -> Iterator[None]:
    """Inside, the bar says what is being done now, and its time goes on while nothing is finished.

    every: seconds; by default one on a terminal or in a notebook, and 30 in a file, where each is a line.
    """
    is_file = hasattr(bar.fp, "isatty") and not bar.fp.isatty() and not hasattr(bar, "container")

    def tell() -> bool:
        said = now(running, names)
        bar.set_postfix_str(said, refresh=False)
        bar.refresh(nolock=True)  # an interrupt inside would leave tqdm's lock taken for ever
        return True

    with watched(every if every is not None else 30.0 if is_file else 1.0, tell):
        yield


@contextmanager
def watched(seconds: float, look: Callable[[], bool]) -> Iterator[None]:
    """Inside, another thread calls `look` every so many seconds, until it says that it has seen enough (False)."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds) and look():
            pass

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
