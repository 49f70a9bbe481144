"""Any folder -> the solution in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from em_interp.errors import SolutionError
from em_interp.solutions.base import Solution
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector

KINDS: Final[tuple[type[SteeringVector] | type[LoraAdapter], ...]] = (
    SteeringVector,
    LoraAdapter,
)
"""All kinds: the first that a folder is of reads it."""


def kind_of(path: str | Path) -> type[SteeringVector] | type[LoraAdapter]:
    """The kind of the solution in a folder. Raises AdapterError."""
    folder = Path(path)
    return next(kind for kind in KINDS if kind.holds(folder))


def load(path: str | Path) -> Solution:
    """The solution in a folder, of whichever kind; a checkpoint's folder is one."""
    return kind_of(path).load(path)


def load_checkpoints(path: str | Path) -> dict[int, Solution]:
    """All of a run's `checkpoints/checkpoint-N`, by step. Raises SolutionError if there are none."""
    root = Path(path) / "checkpoints"
    found = {
        int(match[1]): child
        for child in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name))
    }
    if not found:
        raise SolutionError(f"{path}: no checkpoints/checkpoint-N folders in it. Train with save_steps.")
    return {step: load(found[step]) for step in sorted(found)}
