"""The check on every call: a wrong type is a typed error at the function that was given it, not a surprise deep inside.

Importing this module puts beartype's hook in place, so that all that is imported afterwards is checked against its
signatures; `em_interp` imports it before the first module that has calls. Typer checks what commands are given.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Annotated, Any, Final

from beartype import BeartypeConf, FrozenDict
from beartype.claw import beartype_package
from beartype.vale import Is

from em_interp.arguments import fits, is_a_float, is_unicode
from em_interp.errors import ArgumentTypeError

HINTS: Final[Any] = FrozenDict(
    {
        int: Annotated[Integral, Is[fits]],
        float: Annotated[Real, Is[is_a_float]],
        str: Annotated[str, Is[is_unicode]],
    }
)
"""What counts as a whole number, a number and a text: numpy's numbers are numbers."""

beartype_package(
    "em_interp",
    conf=BeartypeConf(
        violation_param_type=ArgumentTypeError,
        hint_overrides=HINTS,
        claw_is_pep526=False,
        claw_skip_package_names=("em_interp.cli",),
        is_color=False,
    ),
)
