"""What an analysis found, in one sentence that is made of its numbers: the report opens with these."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from em_interp.arguments import one_of, plain_numbers
from em_interp.statistics import PERCENT

HOLDS: Final = "holds"
DOES_NOT_HOLD: Final = "does not hold"
UNDECIDED: Final = "not decided here"
AGREES: Final = "agrees"
DIFFERS: Final = "differs"
VERDICTS: Final = (HOLDS, DOES_NOT_HOLD, UNDECIDED, AGREES, DIFFERS, "")
"""Of a claim; of a number beside the published one; nothing where nothing is claimed."""
UNKNOWN: Final = "unknown"
"""What stands for a number that a table does not have."""
EMERGES: Final = "EM emerges"
ONE_DIRECTION: Final = "one direction"
WHY_GENERAL: Final = "why general"
CHAPTERS: Final = (EMERGES, ONE_DIRECTION, WHY_GENERAL, "")
"""Of the story that a report opens with: an analysis names its own, as `CHAPTER`."""
COLUMNS: Final = (
    *("analysis", "sentence", "estimate", "low", "high", "unit", "n", "counts"),
    *("published", "source", "verdict", "first", "chapter"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was measured, computed from an analysis's tables.

    text: the sentence without its full stop, interval and n, which the report adds; `{estimate}`, `{published}` and
    `{n}` in it stand for the numbers below, and other numbers come from `said`. estimate, low, high, published: in
    `unit`, so a rate of .12 is 12 with the unit %. low, high: the interval (always of the level of `statistics`); NaN
    where none is given. counts: what n counts, in the plural. unit: %, a word or words, or "" for a pure number.
    first: whether the report's first screen holds it.
    """

    text: str
    estimate: float
    n: int
    counts: str
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    published: float | None = None
    source: str = ""
    """Where the published value stands, such as 'P2, Fig. 2'."""
    verdict: str = ""
    first: bool = False
    claim: str = ""
    """What findings that differ in one thing say in common: a table says it once, with a row for each case."""
    case: str = ""
    """That one thing, such as a kind of adapter."""
    asked: str = ""
    """What was asked, in the few words that the story has room for; before a colon its name."""
    beside: str = ""
    """What the number must be read beside, as short; the numbers below may stand in it as in `text`."""
    chapter: str = ""
    """Of the story; `findings_of` fills in the analysis's own where it is `first`."""

    def __post_init__(self) -> None:
        one_of("verdict", self.verdict, VERDICTS)
        one_of("chapter", self.chapter, CHAPTERS)
        plain_numbers(self)

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def sentence(self) -> str:
        """What was found; every number in the digits that the table of claims shows."""
        return self._filled(self.text) + "."

    @property
    def beside_said(self) -> str:
        """What the number must be read beside."""
        return self._filled(self.beside)

    @property
    def number_said(self) -> str:
        """The estimate to the digits that its interval allows, with a percent sign, without another unit."""
        return said(self.estimate, "%" if self.unit == "%" else "", *self._scale)

    @property
    def estimate_said(self) -> str:
        """The estimate with its unit, to the digits that its interval allows."""
        return said(self.estimate, self.unit, *self._scale)

    @property
    def interval_said(self) -> str:
        """'.2 to .4', in the estimate's unit; nothing where there is none."""
        if not self.has_interval:
            return ""
        return f"{said(self.low, '', *self._scale)} to {said(self.high, '', *self._scale)}"

    @property
    def published_said(self) -> str:
        """The published value with its unit, as printed; nothing where there is none."""
        return "" if self.published is None else f"{self.published:g}" + _suffix(self.unit)

    @property
    def n_said(self) -> str:
        return f"one {self.counts.removesuffix('s')}" if self.n == 1 else f"{self.n:,} {self.counts}"

    @property
    def evidence(self) -> str:
        """Interval and n, for the brackets after the sentence."""
        interval = f"{PERCENT}: {self.interval_said}" if self.has_interval else "no interval"
        return f"{interval}; {self.n_said}"

    def _filled(self, text: str) -> str:
        return text.format(estimate=self.estimate_said, published=self.published_said, n=f"{self.n:,}")

    @property
    def _scale(self) -> tuple[float, ...]:
        return (self.estimate, self.low, self.high) if self.has_interval else (self.estimate,)


def said(value: float, unit: str = "", *beside: float) -> str:
    """A number in house form: three significant digits of the largest among it and those `beside`, then the unit.

    So an estimate and the ends of its interval have the same decimals. `UNKNOWN` where there is none.
    """
    if math.isnan(value):
        return UNKNOWN
    largest = max((abs(v) for v in (value, *beside) if math.isfinite(v)), default=0.0)
    if 0 < largest < 1e-3:
        shown = f"{value:.3g}"
    else:
        decimals = 2 if largest == 0 else min(4, max(0, 2 - math.floor(math.log10(largest))))
        shown = f"{round(value, decimals) + 0.0:,.{decimals}f}"
    return shown + _suffix(unit)


def _suffix(unit: str) -> str:
    return unit if unit in ("", "%") else f" {unit}"


def decided(low: float, high: float, null: float = 0.0) -> str:
    """The verdict on a claim that the true value is above `null`, from the interval of its estimate."""
    return apart(low, high, null, null)


def apart(low: float, high: float, beside_low: float, beside_high: float) -> str:
    """The verdict on a claim that one value is above another, from the intervals of both: they must not overlap."""
    if any(math.isnan(end) for end in (low, high, beside_low, beside_high)):
        return UNDECIDED
    return HOLDS if low > beside_high else DOES_NOT_HOLD if high < beside_low else UNDECIDED


def together(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that holds where all of several hold; nothing to go by decides nothing."""
    found = set(verdicts)
    return next((verdict for verdict in (DOES_NOT_HOLD, UNDECIDED) if verdict in found), HOLDS if found else UNDECIDED)


def middle(rows: pd.DataFrame, column: str) -> dict[str, Any] | None:
    """The row of the (lower) median of a column; None where all of its cells are empty."""
    known = rows[rows[column].notna()].astype({column: float}).sort_values(column, kind="stable")
    return None if known.empty else dict(known.iloc[(len(known) - 1) // 2])


def greatest(rows: pd.DataFrame, column: str, *, least: bool = False, size: bool = False) -> dict[str, Any]:
    """The row of the greatest (or least) cell of a column that has some, by its size where asked."""
    values = rows[column].astype(float)
    values = values.abs() if size else values
    return dict(rows.iloc[int(np.nanargmin(values) if least else np.nanargmax(values))])


def value_of(row: Mapping[Any, Any], column: str, scale: float = 1.0) -> float:
    """A cell as a number, 100 times as large for percent; NaN where it is empty or there is no such column."""
    value = row.get(column)
    return math.nan if value is None or pd.isna(value) else scale * float(value)


def percent(row: Mapping[Any, Any], column: str) -> str:
    """A cell that is a fraction, as a text says it."""
    return said(value_of(row, column, 100), "%")


def clause(text: str, *numbers: str) -> str:
    """A part of a sentence with its numbers in it; nothing where one of them is unknown."""
    return "" if UNKNOWN in numbers else text.format(*numbers)


def count_of(row: Mapping[Any, Any], *columns: str) -> int:
    """The first of these cells that is there, as a whole number."""
    return int(next(found for column in columns if not math.isnan(found := value_of(row, column))))


def named(name: object) -> str:
    """A name as a finding's text takes it."""
    return str(name).removeprefix("pocket/").replace("{", "{{").replace("}", "}}")


def findings_of(name: str, tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """What the analysis of that full name found, by its module's `findings`; none where it has no such function."""
    module = importlib.import_module(f"analyses.{name}")
    find: Callable[[dict[str, pd.DataFrame]], list[Finding]] | None = getattr(module, "findings", None)
    found = [] if find is None else find(tables)
    chapter = getattr(module, "CHAPTER", "")
    return [replace(finding, chapter=finding.chapter or chapter) if finding.first else finding for finding in found]


def as_table(found: dict[str, Sequence[Finding]]) -> pd.DataFrame:
    """Findings by analysis as the table `findings`, with the columns `COLUMNS`."""
    rows = [
        {"analysis": name, "sentence": finding.sentence, **asdict(finding)}
        for name, findings in found.items()
        for finding in findings
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
