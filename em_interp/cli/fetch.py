"""`em-interp fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from em_interp.cli import options


def fetch(
    data: Annotated[Path, options.takes("data", "to download into")],
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
        options.out.print(listing)
        return
    results = run(data, tuple(sources or ()))
    for result in results:
        mark = "[green]got[/green]    " if result.ok else "[red]not got[/red]"
        options.out.print(f"{mark} {result.source.name} ({result.source.holds}): {escape(result.detail)}")
    if not all(result.ok for result in results):
        missing = [result.source.name for result in results if not result.ok]
        options.err.print(f"{len(missing)} of {len(results)} sources could not be had: {', '.join(missing)}")
        raise typer.Exit(options.BAD_INPUT)
