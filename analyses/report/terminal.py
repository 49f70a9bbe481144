"""What became of each analysis, and the story of what was found, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Column, Table

from analyses.report.section import Section
from analyses.story import Row, chapters


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


def story(sections: Sequence[Section]) -> str:
    """A chapter's sentence and a line for each of its rows; nothing where no analysis has a finding for it."""
    lines = []
    for chapter in chapters({section.name: section.findings for section in sections if section.error is None}):
        if chapter.heading:
            lines += [f"[bold]{chapter.heading}[/bold]", *(f"  {escape(_line(row))}" for row in chapter.rows)]
    return "\n".join(lines)


def _line(row: Row) -> str:
    """'Asked: number (interval), published number: verdict'."""
    several = len(row.findings) > 1
    numbers = [
        (f"{f.case} " if several else "") + f.estimate_said + (f" ({f.interval_said})" if f.has_interval else "")
        for f in row.findings
    ]
    published = "".join(f", published {f'{case} ' if case else ''}{value}" for case, value, _ in row.published)
    verdict = f": {row.verdict_said}" if row.verdict_said else ""
    return f"{row.asked}: {', '.join(numbers)}{published}{verdict}"
