"""Checks of arguments that every public function shares: words of a closed set, counts, numbers."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any

from em_interp.errors import UsageError


def one_of(name: str, value: Any, allowed: Iterable[str]) -> Any:
    """`value`, which must be one of the words. Raises UsageError with the nearest one."""
    words = [str(word) for word in allowed]
    if isinstance(value, str) and value in words:
        return value
    raise UsageError(f"{name} is {value!r:.80}; it is one of {', '.join(words)}.{did_you_mean(value, words)}")


def did_you_mean(value: object, words: Iterable[str]) -> str:
    """' Did you mean X?', or nothing where no word is near."""
    near = difflib.get_close_matches(str(value), list(words), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def count(name: str, value: Any, *, at_least: int = 1, at_most: int | None = None) -> int:
    """A whole number (not True, not 2.0) within bounds. Raises UsageError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least or (at_most is not None and number > at_most):
        bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise UsageError(f"{name} is {value!r:.80}; give a whole number {bounds}.")
    return number


def seed_number(value: Any, name: str = "seed") -> int:
    """A seed that both numpy and torch take: a whole number from 0 to 2**63 - 1. Raises UsageError."""
    return count(name, value, at_least=0, at_most=2**63 - 1)


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """A finite number within bounds. Raises UsageError."""
    try:
        found = float(value) if not isinstance(value, (bool, str, bytes)) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not (math.isfinite(found) and above < found < below and at_least <= found <= at_most):
        limits = [("above", above), ("at least", at_least), ("at most", at_most), ("below", below)]
        bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
        raise UsageError(f"{name} is {value!r:.80}; give a finite number{' ' + bounds if bounds else ''}.")
    return found


def members(name: str, value: Any, *, of: str) -> list[Any]:
    """The items of a list, tuple, range or array; a bare string or number is none. Raises UsageError."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} is {value!r:.80}; give a list of {of}.")
    try:
        return list(value)
    except TypeError as error:  # a tensor of no dimension
        raise UsageError(f"{name} is {value!r:.80}; give a list of {of}.") from error
