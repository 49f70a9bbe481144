"""Checks of arguments that every public function shares: words of a closed set, counts, numbers."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Final

from em_interp.errors import ArgumentTypeError, EmInterpError, UsageError

if TYPE_CHECKING:
    import numpy as np


@cache
def check_every_call() -> None:
    """Check all modules imported from now on against their signatures, but the commands': Typer checks those.

    A wrong type is a typed error at the function that was given it, not a surprise deep inside. numpy's numbers are
    numbers.
    """
    from beartype import BeartypeConf, FrozenDict  # .1 s, which `import em_interp` does without
    from beartype.claw import beartype_package
    from beartype.vale import Is

    hints: Any = FrozenDict(
        {
            int: Annotated[Integral, Is[fits]],
            float: Annotated[Real, Is[is_a_float]],
            str: Annotated[str, Is[is_unicode]],
        }
    )
    beartype_package(
        "em_interp",
        conf=BeartypeConf(
            violation_param_type=ArgumentTypeError,
            hint_overrides=hints,
            claw_is_pep526=False,
            claw_skip_package_names=("em_interp.cli",),
            is_color=False,
        ),
    )


def fits(value: Integral) -> bool:
    """Within 64 bits, as torch and numpy hold them."""
    return -(2**63) <= int(value) < 2**63


def is_a_float(value: Real) -> bool:
    """A number that a float can hold."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_unicode(value: str) -> bool:
    """Free of lone surrogates, which no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_numbers(record: Any) -> None:
    """Turn numpy's numbers in a dataclass's fields into Python's, which torch's optimisers and JSON take."""
    for name, value in list(vars(record).items()):
        object.__setattr__(record, name, _plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) and fits(value) else float(value)
    return value


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


def numbers(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64. Raises UsageError for words and for what is no list of numbers."""
    import numpy as np  # here, because `import em_interp` needs this module and no numpy

    try:
        return np.asarray(members(name, values, of="numbers"), dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{name} are {values!r:.80}; give a list of numbers.") from error


def columns(what: str, table: Any, needed: Iterable[str], error: type[EmInterpError] = UsageError) -> None:
    """Raises `error` where a table lacks columns that it needs."""
    if lacking := [str(name) for name in needed if name not in table.columns]:
        raise error(f"{what} lacks the columns {', '.join(lacking)}; it has {', '.join(map(str, table.columns))}.")


MAX_SEED: Final = 2**32 - 1
"""The largest that numpy, torch and scikit-learn all take."""


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises UsageError unless it is a whole number from 0 to MAX_SEED."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) <= MAX_SEED:
        raise UsageError(f"the seed is {seed!r}. Use a whole number from 0 to {MAX_SEED}.")
    return int(seed)
