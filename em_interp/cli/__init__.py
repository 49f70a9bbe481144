"""The command line: ``em-interp reproduce | evaluate | extract | steer | ablate | fetch | inspect | pocket``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from em_interp import __version__
from em_interp.cli.evaluate import evaluate
from em_interp.cli.extract import extract
from em_interp.cli.interventions import register as register_interventions
from em_interp.cli.pocket import app as pocket_app
from em_interp.errors import EmInterpError, UsageError

app = typer.Typer(
    help="The geometry of emergent misalignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pocket_app, name="pocket")
app.command()(extract)
app.command()(evaluate)
register_interventions(app)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

BAD_INPUT = 1
"""Exit status where results were made but some input was refused."""
INTERRUPTED = 130
NOTHING_DONE = 2
"""Exit status where the command could not do anything."""


@app.command()
def reproduce(
    suite: Annotated[str, typer.Option(help="published, pocket, or a TOML file")] = "pocket",
    data: Annotated[Path | None, typer.Option(help="folder of the released files, or of another pocket build")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="results go to OUT/SUITE")] = Path("out"),
    only: Annotated[list[str] | None, typer.Option(help="analysis or table to make; may be repeated")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what is finished for the same input and code")] = False,
    general: Annotated[str | None, typer.Option(help="run that stands for the general solution")] = None,
    narrow: Annotated[str | None, typer.Option(help="run that stands for the narrow solution")] = None,
    static: Annotated[bool, typer.Option(help="also write .svg and .png where Chrome is found")] = True,
) -> None:
    """Regenerate the papers' tables and figures, with a manifest and a self-contained report."""
    from analyses.report import summary
    from analyses.reproduce import reproduce as run
    from analyses.suite import Suite

    chosen = Suite.load(suite)
    chosen.data = data or chosen.data
    chosen.general, chosen.narrow = general or chosen.general, narrow or chosen.narrow
    try:
        # Small models: a second process costs little memory. Others take one, and whatever devices they ask for.
        parallel = chosen.source == "pocket" and _cores() > 1
        outcome = run(chosen, out_folder, only=tuple(only or ()), resume=resume, static=static, parallel=parallel)
    except KeyboardInterrupt:
        err.print("Stopped. Finished analyses are kept: run the same command with --resume.")
        raise typer.Exit(INTERRUPTED) from None
    out.print(summary(outcome.sections))
    for section in outcome.sections:
        if section.error is not None:
            reason = section.error.strip().splitlines()[-1]  # of a traceback, the error itself
            err.print(f"[bold]{section.name}[/bold]: {escape(reason)}")
    if outcome.problems:
        err.print(f"[bold]Not everything could be used ({len(outcome.problems)}):[/bold]")
        for problem in outcome.problems:
            err.print(f"  - {escape(problem)}")
    out.print(f"report: {outcome.report}")
    if outcome.failed:
        raise typer.Exit(BAD_INPUT)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def fetch(
    data: Annotated[Path, typer.Option(help="folder to download into")],
    sources: Annotated[list[str] | None, typer.Argument(help="names of sources; all by default")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="say what there is, and stop")] = False,
) -> None:
    """Download what the papers' authors released. Needs network; says exactly what it could not get."""
    from em_interp.published.fetch import SOURCES
    from em_interp.published.fetch import fetch as run

    if list_only:
        listing = Table("source", "kind", "holds", "from")
        for source in SOURCES:
            listing.add_row(source.name, source.kind, source.holds, source.where)
        out.print(listing)
        return
    results = run(data, tuple(sources or ()))
    for result in results:
        mark = "[green]got[/green]    " if result.ok else "[red]not got[/red]"
        out.print(f"{mark} {result.source.name} ({result.source.holds}): {escape(result.detail)}")
    if not all(result.ok for result in results):
        missing = [result.source.name for result in results if not result.ok]
        err.print(f"{len(missing)} of {len(results)} sources could not be had: {', '.join(missing)}")
        raise typer.Exit(BAD_INPUT)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="a direction, a checkpoint, a run folder or a judged CSV")],
) -> None:
    """Say what a file or folder holds, after checking it."""
    from em_interp.cli.inspect import describe

    for line in describe(file):
        out.print(escape(line))


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


def main() -> None:
    """Entry point: typed errors become one readable message and an exit status."""
    try:
        for word in sys.argv[1:]:
            if not word.partition("=")[2 if word.startswith("-") and "=" in word else 0].strip():
                raise UsageError(f"an argument is empty: {word!r}. Is a variable of the shell not set?")
        app(standalone_mode=True)
    except EmInterpError as error:
        err.print(f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}")
        raise SystemExit(NOTHING_DONE) from None


if __name__ == "__main__":
    main()
