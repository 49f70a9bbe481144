"""The seeds that every generator of random numbers here takes."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Final

from em_interp.errors import UsageError

MAX_SEED: Final = 2**32 - 1
"""The largest that numpy, torch and scikit-learn all take."""


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises UsageError unless it is a whole number from 0 to MAX_SEED."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) <= MAX_SEED:
        raise UsageError(f"the seed is {seed!r}. Use a whole number from 0 to {MAX_SEED}.")
    return int(seed)
