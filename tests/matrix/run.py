"""Running cells, bench by bench."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch

from em_interp.errors import EmInterpError
from tests.matrix.adapters import NotMade
from tests.matrix.bench import Bench, sealed
from tests.matrix.cells import Cell
from tests.matrix.findings import FINDINGS
from tests.matrix.operations import OPERATIONS, THROUGH_MODEL
from tests.matrix.outcomes import TOLERANCE, Outcome, attempt


def run(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome | None]]:
    """The outcome of each cell, in order; None where PEFT cannot make the adapter, or loading it or making the
    bridge is refused, which one cell says."""
    key, bench, refused = None, None, False
    for cell in cells:
        if cell.family == "finding":
            yield cell, attempt(*FINDINGS[cell.feature](), TOLERANCE["f32"])
            continue
        if cell.bench != key or bench is None:
            if bench is not None:
                bench.close()
            key, bench = cell.bench, Bench(cell.family, cell.feature, cell.dtype, cell.texts, cell.template)
            refused = _refused(bench)
        if refused and cell.operation in THROUGH_MODEL and not _first_load(cell):
            yield cell, None
            continue
        again = cell.way.through == "bridge" and (cell.operation, cell.way.side) != ("load", "left")
        yield cell, None if again and _refused(bench, bridge=True) else one(bench, cell)
    if bench is not None:
        bench.close()


def _first_load(cell: Cell) -> bool:
    return cell.operation == "load" and cell.way.through == "hf"


def _refused(bench: Bench, *, bridge: bool = False) -> bool:
    try:
        with sealed():
            _ = bench.model.bridge if bridge else bench.model
    except EmInterpError:
        return True
    except Exception:  # cells report it
        return False
    return False


def one(bench: Bench, cell: Cell) -> Outcome | None:
    """The outcome of one cell."""
    found, expected = OPERATIONS[cell.operation]
    with suppress(NotMade):
        tolerance = TOLERANCE.get(cell.dtype) or max(2e-2, 3 * bench.rounding)
        if cell.operation == "gradients":  # theta is float32, whose rounding grows on the way back
            tolerance *= 10
        torch.manual_seed(0)
        return attempt(lambda: found(bench, cell.way), lambda: expected(bench, cell.way), tolerance)
    return None
