"""em_interp: the geometry of emergent misalignment.

The direction, what it does, who else learned it, and why the general solution wins over the narrow one.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from beartype import BeartypeConf
from beartype.claw import beartype_this_package

from em_interp.arguments import HINTS
from em_interp.errors import ArgumentTypeError, EmInterpError

_COMMANDS: Final = ("cli",)

# Every call of every function is checked against its signature: a wrong type is a typed error here, not a surprise deep
# inside. Typer checks what commands are given.
beartype_this_package(
    conf=BeartypeConf(
        violation_param_type=ArgumentTypeError,
        hint_overrides=HINTS,
        claw_is_pep526=False,
        claw_skip_package_names=tuple(f"em_interp.{name}" for name in _COMMANDS),
        is_color=False,
    )
)

try:
    __version__ = version("em_interp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["EmInterpError", "__version__"]
