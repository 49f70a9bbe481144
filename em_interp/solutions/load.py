"""Any folder -> the solution in it."""

from __future__ import annotations

import re
from pathlib import Path

from em_interp.errors import SolutionError
from em_interp.files.adapters import VectorConfig, describe, read_config
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector


def load(path: str | Path) -> SteeringVector | LoraAdapter:
    """The solution in a folder, of whichever kind; a checkpoint's folder is one."""
    vector = isinstance(describe(path, read_config(Path(path))), VectorConfig)
    return SteeringVector.load(path) if vector else LoraAdapter.load(path)


def load_checkpoints(path: str | Path) -> dict[int, SteeringVector | LoraAdapter]:
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
