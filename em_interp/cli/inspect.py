"""`em-interp inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from em_interp.cli import options


def inspect(
    file: Annotated[Path, typer.Argument(help="a direction, a checkpoint, a finetune, a run folder or a judged CSV")],
    base: options.Base = None,
) -> None:
    """Say what a file or folder holds, after checking it."""
    from em_interp.cli.describe import describe

    for line in describe(file, base):
        options.out.print(escape(line))
