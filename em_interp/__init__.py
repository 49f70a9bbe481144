"""em_interp: the geometry of emergent misalignment.

The direction, what it does, who else learned it, and why the general solution wins over the narrow one.
"""

from importlib.metadata import PackageNotFoundError, version

from em_interp.errors import EmInterpError

try:
    __version__ = version("em_interp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["EmInterpError", "__version__"]
