"""Batches that shrink when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from em_interp.errors import MemoryLimitError
from em_interp.models.chat import budget_groups


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host as torch reports it, has no memory left."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )


def run_in_batches(
    run: Callable[[list[int]], None],
    lengths: Sequence[int],
    tokens_per_batch: int,
    *,
    only: Iterable[int] | None = None,
) -> None:
    """Call `run(indices)` on length-sorted batches, longest rows first, each row once.

    Where memory runs out, that batch and all after it are made half as large. `run` must leave no trace of a
    batch that failed. only: the rows to run, all by default. Raises MemoryLimitError where one row alone does
    not fit.
    """
    rows = list(range(len(lengths))) if only is None else list(only)
    budget = tokens_per_batch
    while rows:
        groups = [[rows[j] for j in group] for group in budget_groups([lengths[i] for i in rows], budget)]
        done: set[int] = set()
        for group in groups:
            if not _fits(run, group):
                if len(group) == 1:
                    raise MemoryLimitError(
                        f"memory ran out on a single sequence of {lengths[group[0]]} tokens. Use fewer layers or "
                        "scopes, a smaller dtype, a larger device (device_map='auto'), or drop the long sequences."
                    )
                budget = len(group) * lengths[group[0]] // 2
                break
            done.update(group)
        rows = [i for i in rows if i not in done]


def _fits(run: Callable[[list[int]], None], group: list[int]) -> bool:
    try:
        run(group)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # out of the handler, so that the traceback no longer holds the failed batch
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
