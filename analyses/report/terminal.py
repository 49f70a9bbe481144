"""What became of each analysis, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Column, Table

from analyses.report.section import Section


def summary(sections: Sequence[Section]) -> Table:
    """A row for each analysis, folder by folder."""
    widest = max((len(section.name.partition(".")[0]) for section in sections), default=0)
    names = Column("analysis", min_width=widest)  # a folder's name is a row of its own
    table = Table(names, "tables", "figures", "agree", "differ", "absent", "seconds")
    before = ""
    for section in sections:
        folder, _, name = section.name.rpartition(".")
        if folder != before:
            table.add_row(f"[bold]{folder}[/bold]")
            before = folder
        if section.error is not None:
            table.add_row(f" {name}", "no data" if section.missing else "failed")
            continue
        agrees = [] if section.comparison is None else list(section.comparison["agrees"])
        counts = [str(sum(a is value for a in agrees)) for value in (True, False, None)]
        time = "reused" if section.reused else f"{section.seconds:.1f}"
        table.add_row(f" {name}", " ".join(section.tables), str(len(section.figures)), *counts, time)
    return table
