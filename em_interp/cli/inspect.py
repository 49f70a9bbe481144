"""`em-interp inspect`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from em_interp.cli import options


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="folder of a model, finetune, run, activation store, result or release; file of a direction, "
            "control vector, chats, questions, answers, table or suite; or a pocket model such as pocket/chat"
        ),
    ],
    base: options.Base = None,
) -> None:
    """Say what a file or folder is, whether it is sound, what is next.

    Commands to copy are what can be done with it. No code that it holds is run.
    """
    from em_interp.cli.describe import describe

    for line in describe(options.located(file), base):
        options.out.print(escape(line))
