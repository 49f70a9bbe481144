"""The page: findings first, then section by section what was found, its figures, how to read them, and the tables."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from analyses.report import figures
from analyses.report.section import Section
from analyses.report.tables import TableView, shown, view
from analyses.story import MARKS, Row, chapters
from analyses.suite import Suite, load_analysis
from em_interp import __version__
from em_interp.figures import caption_of
from em_interp.figures.export import NARROW_BELOW
from em_interp.figures.phone import narrow_layout
from em_interp.files.atomic import write_text
from em_interp.files.inputs import read_text
from em_interp.statistics import PERCENT

_HERE: Final = Path(__file__).parent
_STORIES: Final = 3
"""Figures that stand with the story."""
_CASES: Final = 5
"""Cases of a claim that have room side by side."""


@dataclass(frozen=True)
class Drawing:
    """A place of the page where the script draws a figure."""

    name: str
    says: str
    """What it shows, in words, for those who do not see it."""
    caption: str
    section: str
    height: int
    narrow_height: int


def write_report(
    path: Path, suite: Suite, sections: Sequence[Section], problems: Sequence[str], notes: Sequence[str]
) -> Path:
    """Write one HTML file that needs no network and no other file. Atomic.

    The tables that it hands out are the files in `tables` beside it, which must be there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": shown, "breakable": _breakable}
    made = [section for section in sections if section.error is None]
    html = environment.get_template("page.html.j2").render(
        suite=suite,
        version=__version__,
        measured=suite.input.described,
        command=suite.command,
        made_on=f"{datetime.now(UTC):%-d %B %Y}",
        percent=PERCENT,
        chapters=chapters({s.name: s.findings for s in made}),
        story=_story(made),
        most_cases=_CASES,
        sections=[_view(section) for section in made],
        unmade=[section for section in sections if section.error is not None],
        problems=problems,
        notes=notes,
        compared=[{**row, "section": section.name} for section in made for row in _compared(section)],
        marks=MARKS,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "script.js").read_text(encoding="utf-8")),
        plotlyjs=_plotlyjs(),
        payload=_packed(json.dumps(_payload(made, path.parent / "tables"), separators=(",", ":"), allow_nan=False)),
    )
    return write_text(path, html)


def _claims(section: Section) -> list[Row]:
    """The claims of a section, each with its cases."""
    together = groupby((finding for finding in section.findings if finding.claim), lambda finding: finding.claim)
    return [Row(tuple(cases), section.name) for _, cases in together]


def _breakable(name: str) -> Markup:
    """A column's name, which may be broken after an underscore."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")))


def _packed(text: str) -> str:
    """Gzip in base64, which the page's script undoes: a third of the size."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@cache
def _plotlyjs() -> str:
    return _packed(get_plotlyjs())


def _payload(sections: Sequence[Section], tables: Path) -> dict[str, Any]:
    """What the page's script reads: figures, and the whole tables."""
    return {
        "narrow_below": NARROW_BELOW,
        "figures": {name: figures.drawn(f) for s in sections for name, f in s.figures.items()},
        "tables": {name: read_text(tables / f"{name}.csv") for s in sections for name in s.tables},
    }


def _story(sections: Sequence[Section]) -> list[Drawing]:
    """The figures that tell the story, in its order: of those that claim one place, the first."""
    places: dict[int, Drawing] = {}
    for section in sections:
        place, name = getattr(load_analysis(section.name), "STORY", (0, ""))
        if name in section.figures:
            places.setdefault(place, _drawing(section, name))
    return [places[place] for place in sorted(places)][:_STORIES]


def _drawing(section: Section, name: str) -> Drawing:
    figure = section.figures[name]
    caption = caption_of(figure)
    says = next((finding.sentence for finding in section.findings if not finding.claim), "")
    return Drawing(
        name,
        f"{says} {caption}".strip() or section.title,
        caption,
        section.name,
        int(figure.layout.height),
        int(narrow_layout(figure)["height"]),
    )


def _compared(section: Section) -> list[dict[str, Any]]:
    """Published numbers beside ours; agrees is None where there is no counterpart."""
    rows: list[Any] = [] if section.comparison is None else section.comparison.astype(object).to_dict("records")
    return [{**row, "agrees": None if pd.isna(row["agrees"]) else bool(row["agrees"])} for row in rows]


def _view(section: Section) -> dict[str, Any]:
    comparison = _compared(section)
    tables: list[TableView] = [view(name, table) for name, table in section.tables.items()]
    return {
        "name": section.name,
        "title": section.title,
        "text": section.text,
        "findings": section.findings,
        "claims": _claims(section),
        "needs": "; ".join(load_analysis(section.name).NEEDS),
        "figures": [_drawing(section, name) for name in section.figures],
        "tables": [table for table in tables if table.n_rows],
        "empty_tables": [table.name for table in tables if not table.n_rows],
        "comparison": [row for row in comparison if row["agrees"] is not None],
        "n_absent": sum(row["agrees"] is None for row in comparison),
    }
