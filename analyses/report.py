"""The self-contained report: every figure with its published numbers, ours, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.table import Column, Table

from analyses.findings import Finding
from analyses.suite import Suite, load_analysis
from em_interp import __version__
from em_interp.figures import CONFIG, caption_of
from em_interp.files.atomic import write_text


@dataclass
class Section:
    """What became of one analysis."""

    name: str
    title: str
    text: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, go.Figure] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    """Computed from the tables: what they say, in sentences."""
    comparison: pd.DataFrame | None = None
    error: str | None = None
    missing: bool = False
    """The input is absent, which is no fault; `error` says where to get it."""
    notes: list[str] = field(default_factory=list)
    """What could not be done for a part of the data."""
    seconds: float = 0.0
    reused: bool = False


def write_report(
    path: Path, suite: Suite, sections: Sequence[Section], problems: Sequence[str], notes: Sequence[str]
) -> Path:
    """Write one HTML file that needs no network and no other file. Atomic."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    compared = [s.comparison for s in sections if s.comparison is not None]
    agrees = pd.concat(compared)["agrees"] if compared else pd.Series(dtype=object)
    html = environment.get_template("report.html.j2").render(
        suite=suite,
        version=__version__,
        sections=[_view(section) for section in sections],
        problems=problems,
        notes=notes,
        n_agree=int((agrees == True).sum()),  # noqa: E712  (None stands for not compared)
        n_differ=int((agrees == False).sum()),  # noqa: E712
        n_absent=int(agrees.isna().sum()),
        plotlyjs=Markup(get_plotlyjs()),
    )
    return write_text(path, html)


def summary(sections: Sequence[Section]) -> Table:
    """What became of each analysis, folder by folder, for the terminal."""
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


def _view(section: Section) -> dict[str, Any]:
    figures = [
        (name, caption_of(figure), Markup(figure.to_html(include_plotlyjs=False, full_html=False, config=CONFIG)))
        for name, figure in section.figures.items()
    ]
    comparison = [] if section.comparison is None else section.comparison.astype(object).to_dict("records")
    for row in comparison:
        row["agrees"] = None if pd.isna(row["agrees"]) else bool(row["agrees"])
    previews = [] if figures else [(name, _preview(table)) for name, table in section.tables.items()]
    return {
        "name": section.name,
        "title": section.title,
        "text": section.text,
        "findings": section.findings,
        "needs": "; ".join(load_analysis(section.name).NEEDS),
        "figures": figures,
        "comparison": comparison,
        "all_absent": all(row["agrees"] is None for row in comparison),
        "tables": [(name, len(table)) for name, table in section.tables.items()],
        "previews": previews,
        "error": section.error,
        "missing": section.missing,
    }


def _preview(table: pd.DataFrame, rows: int = 20) -> Markup:
    return Markup(table.head(rows).to_html(index=False, border=0, na_rep="", float_format=_number))


def _number(value: Any) -> str:
    """Four significant digits, an empty cell for nothing."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
