"""The story that a report opens with: chapters, each a sentence that its rows' verdicts decide, and the rows.

A row is a finding that its analysis holds for the first screen (`Finding.first`), or all cases of one claim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from analyses.findings import (
    AGREES,
    DIFFERS,
    DOES_NOT_HOLD,
    EMERGES,
    HOLDS,
    ONE_DIRECTION,
    UNDECIDED,
    VERDICTS,
    WHY_GENERAL,
    Finding,
)

IN_PART: Final = "in part"
"""The verdict on a claim whose cases differ."""
MARKS: Final = dict(zip((*VERDICTS, IN_PART), ("✓", "✗", "?", "✓", "✗", "", "◐"), strict=True))
"""A sign for each verdict, which stands beside its word."""
_STANDS: Final = {HOLDS: HOLDS, AGREES: HOLDS, DOES_NOT_HOLD: DOES_NOT_HOLD, UNDECIDED: UNDECIDED, DIFFERS: UNDECIDED}
"""What a verdict says of the claim: a number that differs from the published one neither shows nor refutes it."""
_SAID: Final = {
    HOLDS: ("holds", "hold"),
    AGREES: ("agrees", "agree"),
    DOES_NOT_HOLD: ("does not hold", "do not hold"),
    DIFFERS: ("differs", "differ"),
    UNDECIDED: ("is not decided here", "are not decided here"),
}


@dataclass(frozen=True)
class Headings:
    """A chapter's sentence where all of its rows hold, none does, none is decided, and where they differ.

    topic: where nothing is claimed. in_part is empty where the first row alone decides, and the rest are its details.
    """

    holds: str
    fails: str
    undecided: str
    topic: str
    in_part: str = ""


HEADINGS: Final = {
    EMERGES: Headings(
        "EM emerges far from the training data",
        "EM does not emerge far from the training data here",
        "Whether EM emerges far from the training data is not decided here",
        "EM far from the training data",
    ),
    ONE_DIRECTION: Headings(
        "One direction carries EM",
        "One direction does not carry EM here",
        "Whether one direction carries EM is not decided here",
        "One direction",
        "One direction carries EM in part",
    ),
    WHY_GENERAL: Headings(
        "Training prefers the general solution",
        "Training does not prefer the general solution here",
        "Whether training prefers the general solution is not decided here",
        "General and narrow solutions",
        "Training prefers the general solution in part",
    ),
}


@dataclass(frozen=True)
class Row:
    """A finding, or the cases of a claim, and the analysis (its full name) that found it."""

    findings: tuple[Finding, ...]
    section: str

    @property
    def only(self) -> Finding:
        """The finding; of several cases the first."""
        return self.findings[0]

    @property
    def is_claim(self) -> bool:
        return bool(self.only.claim)

    @property
    def asked(self) -> str:
        """What was asked: in few words where the analysis has some, else the claim, else the whole sentence."""
        return self.only.asked or self.only.claim.partition(";")[0] or self.only.sentence

    @property
    def beside(self) -> str:
        """What it must be read beside; of a claim what was measured, without what explains it in brackets."""
        measured = self.only.claim.partition(";")[2].strip()
        return self.only.beside_said or re.sub(r" \([^()]*\)", "", measured)

    @property
    def published(self) -> list[tuple[str, str, str]]:
        """(case, value, source without its details) of what was published: no case where it is the same of all."""
        given = [(f.case, f.published_said, f.source) for f in self.findings if f.published is not None]
        if len(given) == len(self.findings) and len({each[1:] for each in given}) == 1:
            given = [("", *given[0][1:])]
        return [(case, value, source.partition(" (")[0]) for case, value, source in given]

    @property
    def verdict(self) -> str:
        """The verdict of all cases, `IN_PART` where they differ."""
        found = {finding.verdict for finding in self.findings}
        return found.pop() if len(found) == 1 else IN_PART

    @property
    def verdict_said(self) -> str:
        """The same in words: of cases that differ, how many hold."""
        if self.verdict != IN_PART:
            return self.verdict
        stands = [_STANDS.get(finding.verdict, "") for finding in self.findings]
        word = HOLDS if HOLDS in stands else DOES_NOT_HOLD
        return f"{word} in {stands.count(word)} of {len(stands)}"


@dataclass(frozen=True)
class Chapter:
    """Rows of the story that answer one question."""

    name: str
    """One of `findings.CHAPTERS`; nothing of what belongs to none."""
    rows: tuple[Row, ...]

    @property
    def cases(self) -> list[str]:
        """Of all claims, in order."""
        return list(dict.fromkeys(f.case for row in self.rows if row.is_claim for f in row.findings))

    @property
    def n_said(self) -> str:
        """How many of what each case of the claims was measured on, such as '3 to 8 seeds'."""
        found = sorted((f for row in self.rows if row.is_claim for f in row.findings), key=lambda f: f.n)
        least, most = found[0], found[-1]
        return most.n_said if least.n == most.n else f"{least.n:,} to {most.n_said}"

    @property
    def heading(self) -> str:
        """A sentence without its full stop; nothing of what belongs to no chapter."""
        if not self.name:
            return ""
        headings, found = HEADINGS[self.name], [f for row in self.rows for f in row.findings if f.verdict]
        if not found:
            return headings.topic
        deciding = {_STANDS[f.verdict] for f in (found if headings.in_part else found[:1])}
        says = {HOLDS: headings.holds, DOES_NOT_HOLD: headings.fails, UNDECIDED: headings.undecided}
        said = says[deciding.pop()] if len(deciding) == 1 else headings.in_part
        return said if len({_STANDS[f.verdict] for f in found}) == 1 else f"{said}: {self._counted(found)}"

    def _counted(self, found: Sequence[Finding]) -> str:
        """'steering holds; ablation and transfer are not decided here', or how many of how many."""
        names = {id(f): f.asked.partition(":")[0].lower() for f in found if ":" in f.asked}
        parts: list[str] = []
        for verdict, (one, several) in _SAID.items():
            those = [f for f in found if f.verdict == verdict]
            if those:
                who = _listed([names[id(f)] for f in those]) if len(names) == len(found) else ""
                who = who or (f"{len(those)} of {len(found)}" if not parts else str(len(those)))
                parts.append(f"{who} {one if len(those) == 1 else several}")
        return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def chapters(found: Mapping[str, Sequence[Finding]]) -> list[Chapter]:
    """The story of findings by analysis, in its order; last, under no heading, what is first and of no chapter."""
    rows: dict[str, dict[object, Row]] = {name: {} for name in (*HEADINGS, "")}
    for section, findings in found.items():
        for finding in findings:
            if finding.first:
                key = (section, finding.claim or id(finding))
                before = rows[finding.chapter].get(key, Row((), section)).findings
                rows[finding.chapter][key] = Row((*before, finding), section)
    return [Chapter(name, tuple(own.values())) for name, own in rows.items() if own]
