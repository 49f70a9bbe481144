"""Any folder or name -> the solution in it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from huggingface_hub import hf_hub_download

from em_interp.errors import SolutionError
from em_interp.files.adapters import CONFIG, local
from em_interp.models.adapters import hub_folder
from em_interp.models.pretrained import base_of_adapter
from em_interp.solutions.base import Base, Solution
from em_interp.solutions.dora import DoraAdapter
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.solutions.weight_delta import WeightDelta


@runtime_checkable
class Kind(Protocol):
    """A class of `Solution`, as its folders know it."""

    @property
    def ADAPTERS(self) -> tuple[str, ...]:
        """What tables call its members."""
        ...

    @property
    def OF_BASE(self) -> bool:
        """Whether it needs the base to be read."""
        ...

    def glance(self, folder: Path) -> str:
        """What a folder says without its base."""
        ...

    def holds(self, folder: Path) -> bool:
        """Whether a folder is of this kind. Raises AdapterError for one that no kind reads."""
        ...

    def read(self, source: Path, base: Base) -> Solution:
        """What the folder holds."""
        ...


KINDS: Final[tuple[Kind, ...]] = (
    WeightDelta,
    SteeringVector,
    DoraAdapter,
    LoraAdapter,
)
"""All kinds: the first that a folder is of reads it."""


def kind_of(path: str | Path) -> Kind:
    """The kind of the solution in a folder. Raises AdapterError."""
    folder = Path(path)
    return next(kind for kind in KINDS if kind.holds(folder))


def folder_of(source: str | Path) -> Path:
    """A folder, or the local copy of a finetune on the hub. Raises AdapterError."""
    folder = local(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)+", str(source)):
        folder = hub_folder(str(source))
        if not (folder / CONFIG).exists():
            folder = hub_folder(str(source), model=True)
    return folder


def is_model(source: str | Path) -> bool:
    """Whether a folder or hub name is a whole model, such as a full finetune, rather than an adapter."""
    folder = local(source)
    if folder.exists() or str(source).count("/") != 1:
        return WeightDelta.holds(folder)
    with suppress(Exception):  # of many kinds: no such file, no network. Whoever loads it says so
        hf_hub_download(str(source), "config.json")
        return base_of_adapter(source, None) is None
    return False


def load(source: str | Path, base: Base = None) -> Solution:
    """The solution in a folder, of whichever kind; a checkpoint's folder is one.

    base: what the finetune was made from, a ChatModel, or its folder or hub name. A full finetune is read against it,
    and of a ChatModel takes the weights that are in memory; adapters of their own weights do without. `source` may be
    a hub name where a base is given. Raises SolutionError.
    """
    folder = local(source) if base is None else folder_of(source)
    return kind_of(folder).read(folder, base).read_from(source)


def load_checkpoints(path: str | Path, base: Base = None) -> dict[int, Solution]:
    """All of a run's `checkpoints/checkpoint-N`, by step. Raises SolutionError if there are none."""
    root = Path(path) / "checkpoints"
    found = {
        int(match[1]): child
        for child in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name))
    }
    if not found:
        raise SolutionError(f"{path}: no checkpoints/checkpoint-N folders in it. Train with save_steps.")
    return {step: load(found[step], base) for step in sorted(found)}
