"""One pass shared by several processes: each reads its part, all get the whole. On the GPUs of a machine:

    accelerate launch --multi_gpu --num_processes 4 -m em_interp.cli extract MODEL --device-map cuda --answers ...

and on CPUs, `torchrun --nproc-per-node 4 -m -- em_interp.cli extract ...`. In a script of one's own all processes run
the same lines:

    with em.data_parallel():
        found = em.collect(model, chats, store="activations")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from torch import Tensor

from em_interp.errors import UsageError

_T = TypeVar("_T")
_LONGEST_WAIT: Final = timedelta(days=7)
"""For the slowest process. One that died is seen by the launcher, which ends the others."""


def launched() -> int:
    """How many processes torchrun, or `accelerate launch` by it, started together; 1 without them."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdigit() else 1


@dataclass(frozen=True)
class Ranks:
    """The processes of a pass: this one's number, and how many they are (n)."""

    number: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes results."""
        return self.number == 0

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """Every n-th of the rows: this process's. Give them sorted by length, and the shares cost alike."""
        return list(rows[self.number :: self.n])

    def own(self, output: Path) -> Path:
        """Where this process keeps its part of the work on an output: the first one's name is the output's."""
        return output if self.is_first else output.with_name(f"{output.stem}-rank{self.number}{output.suffix}")

    def wait(self) -> None:
        """Until all processes are here."""
        if self.n > 1:
            _state().wait_for_everyone()

    def total(self, part: Tensor) -> Tensor:
        """The sum of all processes' tensors, which are of one shape, on the device of `part`."""
        if self.n == 1:
            return part
        from accelerate.utils import reduce

        return reduce(part.to(_state().device), reduction="sum").to(part.device)

    def gather(self, part: Sequence[_T]) -> list[_T]:
        """All processes' entries, which can be pickled."""
        if self.n == 1:
            return list(part)
        from accelerate.utils import gather_object

        return list(gather_object(list(part)))

    def device(self, name: Any) -> Any:
        """The device of this process where one kind is asked for: of "cuda" its own."""
        return f"cuda:{_state().local_process_index}" if self.n > 1 and name == "cuda" else name


_ALONE: Final = Ranks()
_NOW: ContextVar[Ranks] = ContextVar("ranks", default=_ALONE)


def ranks() -> Ranks:
    """The processes that share passes now: one, but inside `data_parallel`."""
    return _NOW.get()


def _state() -> Any:
    """accelerate's own; it joins the processes when it is first asked for."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)


@contextmanager
def data_parallel() -> Iterator[Ranks]:
    """Inside, `collect` and `sample` (and what is made of them) share their rows among the processes of the launch.

    All processes must make the same calls in the same order; each gets the whole result. In a single process nothing
    changes. Raises UsageError inside itself.

    >>> import em_interp as em
    >>> with em.data_parallel() as ranks:
    ...     print(ranks.n)
    1
    """
    if _NOW.get().n > 1:
        raise UsageError("data_parallel inside data_parallel: the processes share the work already. Leave one out.")
    n = launched()
    token = _NOW.set(Ranks(int(_state().process_index), n) if n > 1 else _ALONE)
    try:
        yield _NOW.get()
    finally:
        _NOW.reset(token)
