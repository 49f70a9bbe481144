"""`em-interp reproduce`. Heavy imports wait until the command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from em_interp.cli import options


def reproduce(
    suite: Annotated[str, typer.Option(help="published, pocket, or a TOML file")] = "pocket",
    data: Annotated[Path | None, typer.Option(help="folder of the released files, or of another pocket build")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="results go to OUT/SUITE")] = Path("out"),
    only: Annotated[list[str] | None, typer.Option(help="analysis or table to make; may be repeated")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what is finished for the same input and code")] = False,
    general: Annotated[str | None, typer.Option(help="run that stands for the general solution")] = None,
    narrow: Annotated[str | None, typer.Option(help="run that stands for the narrow solution")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="processes; by default the cores for pocket, one for other models, and a Ray cluster's own"),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="loky: on this machine; ray: on the cluster of RAY_ADDRESS, or here")
    ] = "loky",
    static: Annotated[bool, typer.Option(help="also write .svg and .png where Chrome is found")] = True,
) -> None:
    """Regenerate the papers' tables and figures, with a manifest and a self-contained report."""
    from analyses.report import summary
    from analyses.run import reproduce as run
    from analyses.suite import Suite

    chosen = Suite.load(suite)
    chosen.data = data or chosen.data
    chosen.general, chosen.narrow = general or chosen.general, narrow or chosen.narrow
    try:
        # Small models: a second process costs little memory. Others take one, and whatever devices they ask for.
        n = workers if workers is not None else _cores() if chosen.source == "pocket" or backend == "ray" else 1
        outcome = run(
            chosen, out_folder, only=tuple(only or ()), resume=resume, static=static, workers=n, backend=backend
        )
    except KeyboardInterrupt:
        options.err.print("Stopped. Finished analyses are kept: run the same command with --resume.")
        raise typer.Exit(options.INTERRUPTED) from None
    options.out.print(summary(outcome.sections))
    for section in outcome.sections:
        if section.error is not None:
            reason = section.error.strip().splitlines()[-1]  # of a traceback, the error itself
            options.err.print(f"[bold]{section.name}[/bold]: {escape(reason)}")
    if outcome.problems:
        options.err.print(f"[bold]Not everything could be used ({len(outcome.problems)}):[/bold]")
        for problem in outcome.problems:
            options.err.print(f"  - {escape(problem)}")
    options.out.print(f"report: {outcome.report}")
    if outcome.failed:
        raise typer.Exit(options.BAD_INPUT)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
