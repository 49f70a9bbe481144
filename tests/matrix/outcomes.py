"""Running one cell, and what came of it."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from em_interp.errors import EmInterpError
from tests.matrix.bench import sealed
from tests.matrix.templates import MustRefuse

SUPPORTED, REFUSED, SILENT, UNTYPED, BROKEN = KINDS = ("SUPPORTED", "REFUSED", "SILENT", "UNTYPED", "BROKEN")
FAILING = (SILENT, UNTYPED, BROKEN)
TOLERANCE = {"f32": 2e-4, "f64": 1e-4}
"""Largest relative error, in norm; transformers has norms, angles and some attention in float32 whatever the dtype."""
_REMEDY = re.compile(
    r"\b(use|give|load|pass|drop|call|add|take|choose|ablate|merge|set|make|read|leave|switch|strip|raise|cut|boot|"
    r"compare|train|fetch|install|lower|sample|end|check|save|see|keep|write|put|replace|run|encode|measure|convert|"
    r"name|ask|remove|train|retrain|fold|try|shorten|attach|lengthen|belongs|reload|clear|unset|restart)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. `reason`: the refusal's message, or what was wrong."""

    kind: str
    reason: str = ""
    seconds: float = 0.0


def gap(found: Any, expected: Any) -> float:
    """Relative error in norm; infinite for values that are not numbers and differ."""
    if isinstance(expected, (float, Tensor)):
        a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        return float((a - b).norm() / b.norm().clamp_min(1e-9))
    return 0.0 if found == expected else float("inf")


def compared(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> str:
    """Empty where all values agree, else the worst of them."""
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        return f"{len(odd)} values in one side only, e.g. {odd[0]}"
    gaps = {name: gap(found[name], expected[name]) for name in expected}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] <= tolerance:
        return ""
    if gaps[worst] == float("inf"):
        return f"{worst}: {str(found[worst])[:60]!r}, expected {str(expected[worst])[:60]!r}"
    return f"{worst} is off by {gaps[worst]:.2g}"


def attempt(
    found: Callable[[], Mapping[str, Any]], expected: Callable[[], Mapping[str, Any]], tolerance: float
) -> Outcome:
    """Run the package, then the oracle, then compare."""
    start = time.perf_counter()

    def out(kind: str, reason: str = "") -> Outcome:
        return Outcome(kind, " ".join(reason.split())[:400], time.perf_counter() - start)

    try:
        with sealed():
            values = found()
    except EmInterpError as error:
        message = str(error)
        if not _REMEDY.search(message):
            return out(UNTYPED, f"a refusal without a remedy: {message}")
        return out(REFUSED, f"{type(error).__name__}: {message}")
    except Exception as error:
        if type(error).__name__ == "NotMade":
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        return out(UNTYPED, f"{type(error).__name__}: {first} ({where.name})")
    try:
        wanted = expected()
    except MustRefuse as error:
        return out(SILENT, f"accepted: {error}")
    except Exception as error:
        return out(BROKEN, f"the oracle: {type(error).__name__}: {error}")
    worst = compared(values, wanted, tolerance)
    return out(SILENT, worst) if worst else out(SUPPORTED)
