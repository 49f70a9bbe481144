"""The seeds that every generator of random numbers here takes."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from em_interp.errors import UsageError


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises UsageError unless it is a whole number from 0 to 2^32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise UsageError(f"the seed is {seed!r}. Use a whole number from 0 to {2**32 - 1}.")
    return int(seed)
