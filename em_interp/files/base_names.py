"""Whether two names mean one base model: the one place that decides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from em_interp.errors import EmInterpError

_GENERIC_NAME = re.compile(r"checkpoint-\d+|final|best|last|merged|model|output")


def generic_name(name: str) -> bool:
    """Whether a folder's name tells nothing of what is in it: `checkpoint-500`, `final`."""
    return bool(_GENERIC_NAME.fullmatch(name.lower()))


def _base_key(name: str) -> str:
    path = name.replace("\\", "/").rstrip("/")
    path = Path(path).resolve().as_posix() if path.startswith(".") else path
    cached = re.search(r"models--[^/]+--([^/]+)/snapshots/[^/]+$", path)
    *parents, last = (cached[1] if cached else path).lower().split("/")
    last = re.sub(r"(-unsloth)?-bnb-[48]bit$", "", last)
    return f"{parents[-1]}/{last}" if parents and generic_name(last) else last


def same_base(recorded: str, *known_as: str) -> bool:
    """Whether a recorded base is the model that is known by any of these names.

    The last part of the name decides ('unsloth/Qwen2.5-14B' and 'Qwen/Qwen2.5-14B' are one base, and so is a
    '-bnb-4bit' copy of it), with its folder where that part says nothing ('run/checkpoint-500').
    """
    return _base_key(recorded) in {_base_key(name) for name in known_as if name}


def refuse_other_base(recorded: str | None, known_as: Iterable[str], error: EmInterpError) -> None:
    """Raise `error` if a base is recorded that is none of the names which the model in hand is known by."""
    if recorded and not same_base(recorded, *known_as):
        raise error
