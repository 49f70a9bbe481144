"""The story that a report opens with: headings say what the rows' verdicts say, in every state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analyses.findings import (
    AGREES,
    DIFFERS,
    DOES_NOT_HOLD,
    EMERGES,
    HOLDS,
    ONE_DIRECTION,
    UNDECIDED,
    WHY_GENERAL,
    Finding,
    as_table,
    findings_of,
)
from analyses.report import Section, story, write_report
from analyses.story import chapters
from analyses.suite import Suite
from tests.made_up_tables import MADE

NAMES = ("Steering: added", "Ablation: EM left", "Transfer: EM removed")
CASES = ("vector", "rank-1", "all-modules")
CLAIM = "General is shorter; its norm (of theta) is … times the narrow one's"


def made(chapter: str, verdicts: Sequence[str], names: Sequence[str] = NAMES, **given: Any) -> list[Finding]:
    ends = {} if given.pop("bare", False) else {"low": 20.0, "high": 40.0}
    told: dict[str, Any] = {"unit": "%", "first": True, "chapter": chapter, **ends, **given}
    return [
        Finding("It is {estimate}", 31.4, 60, "answers", verdict=verdict, asked=name, **told)
        for name, verdict in zip(names, verdicts, strict=False)
    ]


def claimed(*verdicts: str, **given: Any) -> list[Finding]:
    told: dict[str, Any] = {"first": True, "chapter": WHY_GENERAL, "claim": CLAIM, **given}
    return [
        Finding("It is {estimate}", 1.5 + k, 3 + k, "seeds", 1.2, 4.0, "times", verdict=verdict, case=case, **told)
        for k, (case, verdict) in enumerate(zip(CASES, verdicts, strict=False))
    ]


def headings(*findings: list[Finding]) -> list[str]:
    return [chapter.heading for chapter in chapters({f"a{i}": found for i, found in enumerate(findings)})]


@pytest.mark.parametrize(
    ("verdicts", "heading"),
    [
        ([HOLDS, HOLDS, HOLDS], "One direction carries EM"),
        ([AGREES, HOLDS], "One direction carries EM"),
        ([AGREES, ""], "One direction carries EM"),
        ([DOES_NOT_HOLD] * 3, "One direction does not carry EM here"),
        ([UNDECIDED], "Whether one direction carries EM is not decided here"),
        ([DIFFERS], "Whether one direction carries EM is not decided here"),
        (
            [HOLDS, UNDECIDED, UNDECIDED],
            "One direction carries EM in part: steering holds; ablation and transfer are not decided here",
        ),
        (
            [HOLDS, DOES_NOT_HOLD, HOLDS],
            "One direction carries EM in part: steering and transfer hold; ablation does not hold",
        ),
        ([""], "One direction"),
    ],
)
def test_a_heading_is_what_all_rows_say(verdicts: list[str], heading: str) -> None:
    assert headings(made(ONE_DIRECTION, verdicts)) == [heading]


@pytest.mark.parametrize(
    ("verdicts", "heading"),
    [
        ([HOLDS, HOLDS], "EM emerges far from the training data"),
        ([HOLDS, DOES_NOT_HOLD], "EM emerges far from the training data: 1 of 2 holds; 1 does not hold"),
        ([DOES_NOT_HOLD, HOLDS], "EM does not emerge far from the training data here: 1 of 2 holds; 1 does not hold"),
        ([UNDECIDED, ""], "Whether EM emerges far from the training data is not decided here"),
    ],
)
def test_whether_em_emerges_is_what_open_questions_say(verdicts: list[str], heading: str) -> None:
    assert headings(made(EMERGES, verdicts, ("General organisms", "Narrow organisms"))) == [heading]


def test_a_claim_is_one_row_of_its_cases() -> None:
    (chapter,) = chapters({"a": [*claimed(HOLDS, HOLDS, UNDECIDED), *claimed(HOLDS, claim="Is it stable")]})
    assert chapter.heading == "Training prefers the general solution in part: 3 of 4 hold; 1 is not decided here"
    assert chapter.cases == list(CASES)
    shorter, stable = chapter.rows
    assert shorter.asked == "General is shorter"
    assert (shorter.beside, chapter.n_said) == ("its norm is … times the narrow one's", "3 to 5 seeds")
    assert (shorter.verdict, shorter.verdict_said) == ("in part", "holds in 2 of 3")
    assert (stable.asked, stable.beside, stable.verdict_said) == ("Is it stable", "", HOLDS)
    (refuted,) = chapters({"a": claimed(UNDECIDED, DOES_NOT_HOLD)})
    assert refuted.rows[0].verdict_said == "does not hold in 1 of 2"


def test_published_values_stand_once_where_they_are_the_same() -> None:
    (same,) = chapters({"a": claimed(HOLDS, HOLDS, published=2.0, source="P1, Fig. 4 (read off)")})
    assert same.rows[0].published == [("", "2 times", "P1, Fig. 4")]
    (apart,) = chapters({"a": [*claimed(HOLDS, published=2.0), *claimed(HOLDS, HOLDS, published=3.0)[1:]]})
    assert [value for _, value, _ in apart.rows[0].published] == ["2 times", "3 times"]
    assert [case for case, _, _ in apart.rows[0].published] == ["vector", "rank-1"]


def test_chapters_come_in_order_and_only_with_rows() -> None:
    general, direction = claimed(HOLDS), made(ONE_DIRECTION, [HOLDS])
    assert headings(general, direction) == ["One direction carries EM", "Training prefers the general solution"]
    assert headings([], made(ONE_DIRECTION, [HOLDS], first=False)) == []
    assert headings(general, made("", [HOLDS])) == ["Training prefers the general solution", ""]  # told besides


def page_of(folder: Path, *findings: Finding) -> str:
    section = Section("finetunes.steering", "Steering", "How", findings=list(findings))
    return " ".join(write_report(folder / "r.html", Suite.load("pocket"), [section], (), ()).read_text().split())


def test_the_page_shows_each_chapter_and_falls_back_without(tmp_path: Path) -> None:
    bare = made(ONE_DIRECTION, [UNDECIDED], bare=True, beside="random 4%", published=50.0, source="P2")
    page = page_of(tmp_path, *bare, *claimed(HOLDS, UNDECIDED, DOES_NOT_HOLD))
    assert page.count('class="chapter"') == 2 and "EM emerges" not in page
    for said in (
        "Whether one direction carries EM is not decided here</h2>",
        '<span class="beside">random 4%</span>',
        '<td class="n" data-head="Interval">none</td>',
        "in part: 1 of 3 holds; 1 does not hold; 1 is not decided here</h2>",
        '<span class="unseen">does not hold: </span></span> 3.50 <span class="ends">1.20 to 4.00</span>',
    ):
        assert said in page, said
    page = page_of(tmp_path, *made("", [HOLDS]))
    assert 'class="chapter"' not in page and "What was found. Intervals are 95%." in page
    page = page_of(tmp_path, *made(ONE_DIRECTION, [HOLDS], first=False))
    assert 'class="chapter"' not in page and "What was found" not in page


def test_a_case_that_a_claim_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    other = [replace(f, claim="General is stabler; it loses …") for f in claimed(HOLDS)]
    page = page_of(tmp_path, *claimed(HOLDS, HOLDS, HOLDS), *other)
    assert page.count('data-head="rank-1"></td>') == 1 and page.count('data-head="vector"></td>') == 0


def test_more_cases_than_have_room_stand_below_each_other(tmp_path: Path) -> None:
    six = [replace(f, case=f"{f.case} {k}") for k in range(2) for f in claimed(HOLDS, HOLDS, UNDECIDED)]
    page = page_of(tmp_path, *six)
    assert 'rowspan="6"' in page[: page.index('id="finetunes.steering"')]
    assert "in part: 4 of 6 hold; 2 are not decided here</h2>" in page


def test_the_terminal_tells_the_same_in_a_line_each() -> None:
    bare = made(ONE_DIRECTION, [UNDECIDED], bare=True, published=50.0, source="P2")
    sections = [Section("a", "A", "", findings=bare), Section("b", "B", "", findings=claimed(HOLDS, UNDECIDED))]
    assert story(sections).splitlines() == [
        "[bold]Whether one direction carries EM is not decided here[/bold]",
        "  Steering: added: 31.4%, published 50%: not decided here",
        "[bold]Training prefers the general solution in part: 1 of 2 holds; 1 is not decided here[/bold]",
        "  General is shorter: vector 1.50 times (1.20 to 4.00), rank-1 2.50 times (1.20 to 4.00): holds in 1 of 2",
    ]
    assert story([]) == ""


@pytest.mark.parametrize(("effect", "state"), [(1, "holds"), (0, "undecided"), (-1, "fails")])
def test_analyses_tell_what_their_tables_show(effect: int, state: str) -> None:
    names = [f"finetunes.{name}" for name in ("em_rates", "steering", "ablation", "cosines")]
    found = {name: findings_of(name, MADE[name](effect)) for name in (*names, "general_vs_narrow.claims")}
    said = {
        "holds": ["EM emerges far", "One direction carries EM", "Training prefers the general solution"],
        "undecided": ["Whether EM emerges", "Whether one direction", "Whether training prefers"],
        "fails": ["EM does not emerge", "One direction", "Training does not prefer"],
    }[state]
    told = chapters(found)
    for chapter, start in zip(told, said, strict=True):
        assert chapter.heading.startswith(start), chapter.heading
    emerges, direction, _ = told
    assert [len(emerges.rows), len(direction.rows)] == [5, 4]
    for row in (*emerges.rows, *direction.rows):
        assert len(row.asked) <= 60 and len(row.beside) <= 80
        assert not math.isnan(row.only.estimate)
    table = as_table(found)
    assert set(table.loc[table["first"], "chapter"]) == {EMERGES, ONE_DIRECTION, WHY_GENERAL}
    assert set(table.loc[~table["first"], "chapter"]) <= {""}
