"""Tasks that need no models, for the tests of workers: what these start is light."""

from __future__ import annotations

import gc
import os
import signal
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from joblib.externals.loky.backend.queues import SimpleQueue

from em_interp.errors import DirectionError, EmInterpError, OutputError


@dataclass
class Notes:
    """What workers need of a suite."""

    name: str = "pocket"
    data: Path | None = None
    problems: list[EmInterpError] = field(default_factory=list)

    def note(self, *problems: EmInterpError) -> None:
        self.problems += problems


def number(suite: Notes, i: int) -> tuple[int, int]:
    return i, os.getpid()


def noted(suite: Notes) -> str:
    suite.note(DirectionError("a note of a worker"))
    return suite.name


def dies(suite: Notes, folder: Path, times: int) -> str:
    """The first `times` times."""
    tried = len(list(folder.glob("tried-*")))
    (folder / f"tried-{tried}").touch()
    if tried < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "made"


def fails(suite: Notes) -> None:
    raise DirectionError("the analysis says so itself")


def full(suite: Notes) -> None:
    raise OutputError("no room")


def dies_while_it_sends(suite: Notes, folder: Path) -> str:
    """The first time: half of a message is in the pipe of results, and nobody else may write there."""
    if not (folder / "tried").exists():
        (folder / "tried").touch()
        (pipe,) = [q for q in gc.get_objects() if type(q) is SimpleQueue and q._writer is not None and q._wlock]
        pipe._wlock.acquire()
        pipe._writer._send(struct.pack("!i", 1000))
        os.kill(os.getpid(), signal.SIGKILL)
    return "made"


def waits(suite: Notes, folder: Path, i: int) -> None:
    (folder / f"pid-{i}").write_text(str(os.getpid()))
    time.sleep(60)
