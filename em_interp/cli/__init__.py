"""The command line: `em-interp COMMAND`, with `--help` for what each takes.

- `reproduce`, `fetch`: the papers' figures; `pocket`: pocket models
- `extract`, `steer`, `ablate`, `evaluate`, `rates`: any chat model and its finetunes
- `inspect` with `describe`, of `describe_files` and `describe_folders`: what a file or folder holds
- `doctor`: versions, devices, Chrome, network, disk
- `options`, `judging`: what they share; `evaluate_judged`: judges that are models
- `remedies`: messages of the package in their words; `pages`: of help

| exit status | meaning |
|---|---|
| 0 | done; data that is merely absent is named in the report and is no failure |
| 1 | results were made, but some input was refused or an analysis failed (`fetch`: a source could not be had) |
| 2 | nothing could be done: a wrong or empty option, no data, an unreadable suite |
| 130 | stopped with Ctrl-C, which loses nothing finished: run the same command again, `reproduce` with `--resume` |

Killed commands go on where they stopped when they are run again, and say what they kept. `evaluate` without `--out` has
a folder for each model, named after its weights too. Seeds are 0 to 4294967295.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer
from rich.markup import escape

from em_interp.cli import options
from em_interp.cli.ablate import ablate
from em_interp.cli.doctor import doctor
from em_interp.cli.evaluate import evaluate
from em_interp.cli.extract import extract
from em_interp.cli.fetch import fetch
from em_interp.cli.inspect import inspect
from em_interp.cli.pages import Command, Group
from em_interp.cli.pocket import app as pocket_app
from em_interp.cli.rates import rates
from em_interp.cli.remedies import in_options
from em_interp.cli.reproduce import reproduce
from em_interp.cli.steer import steer
from em_interp.errors import EmInterpError, UsageError

__all__ = ["main"]

app = typer.Typer(
    cls=Group,
    help="The geometry of emergent misalignment: what a finetune learned, what it does, and which others share it.",
    epilog="What a command takes: em-interp COMMAND --help",
    context_settings={"token_normalize_func": options.now_called, "max_content_width": 110},
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
GROUPS: Final = {
    "The papers' figures": (reproduce, fetch),
    "Any chat model and its finetunes": (extract, steer, ablate, evaluate, rates),
    "Files and this machine": (inspect, doctor),
}
for title, commands in GROUPS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=title)(command)
app.add_typer(pocket_app, name="pocket", rich_help_panel="Pocket models")


@app.command(cls=Command, rich_help_panel="Files and this machine")
def version() -> None:
    """Print the version."""

    from em_interp import __version__

    options.out.print(__version__)


SHARED: Final = ("extract", "steer", "ablate")
"""Commands whose work the processes of one launch share."""


@contextmanager
def _shared(words: list[str]) -> Iterator[None]:
    """Where several processes were launched together they share the work, and the first one speaks."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not set(SHARED) & set(words[:1]):
        raise UsageError(
            f"started as {os.environ['WORLD_SIZE']} processes: {', '.join(SHARED)} share their work among them. Start "
            "other commands once; `reproduce` has --workers and --backend ray."
        )
    from em_interp.models.ranks import data_parallel

    with data_parallel() as ranks:
        options.out.quiet = options.err.quiet = not ranks.is_first
        yield


def main() -> None:
    """Entry point: typed errors become one readable message and an exit status."""
    try:
        for word in sys.argv[1:]:
            if not word.partition("=")[2 if word.startswith("-") and "=" in word else 0].strip():
                raise UsageError(f"an argument is empty: {word!r}. Is a variable of the shell not set?")
        with _shared(sys.argv[1:]):
            app(standalone_mode=True)
    except EmInterpError as error:
        options.err.print(f"[bold red]{type(error).__name__}[/bold red]: {escape(in_options(str(error)))}")
        raise SystemExit(options.NOTHING_DONE) from None
