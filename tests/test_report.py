"""Findings and the report: every sentence is made of the numbers of a table."""

from __future__ import annotations

import base64
import gzip
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.findings import COLUMNS, Finding, as_table, decided, findings_of, said
from analyses.general_vs_narrow import claims
from analyses.report import Section, write_report
from analyses.report.figures import drawn
from analyses.report.tables import shown, view
from analyses.suite import Suite
from em_interp import figures
from em_interp.errors import UsageError


@pytest.mark.parametrize(
    ("numbers", "unit", "shown"),
    [
        ((0.046315, 0.04196, 0.05067), "", "0.0463"),
        ((0.001837, -0.00822, 0.0119), "", "0.0018"),
        ((4.8068, 1.06, 21.78), "times", "4.8 times"),
        ((12.3456,), "%", "12.3%"),
        ((0.0, 0.0, 0.0), "", "0.00"),
        ((-0.0001, -0.5, 0.5), "", "0.000"),
        ((0.0000123,), "", "1.23e-05"),
        ((12345.6,), "nats", "12,346 nats"),
        ((99.6, math.nan), "%", "99.6%"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_allows(numbers: tuple[float, ...], unit: str, shown: str) -> None:
    assert said(numbers[0], unit, *numbers[1:]) == shown


def test_a_sentence_is_made_of_its_numbers() -> None:
    finding = Finding(
        "EM reaches {estimate}, {published} in the paper", 12.31, 1200, "answers", 9.5, 15.149, "%", 11.3, "P2"
    )
    assert finding.sentence == "EM reaches 12.3%, 11.3% in the paper."
    assert finding.evidence == "95%: 9.5 to 15.1; 1,200 answers"
    alone = Finding("So it is: {estimate}", 0.5, 1, "seeds")
    assert (alone.sentence, alone.evidence) == ("So it is: 0.500.", "no interval; one seed")
    table = as_table({"a.b": [finding], "c.d": [alone]})
    assert tuple(table.columns) == COLUMNS
    assert list(table["analysis"]) == ["a.b", "c.d"]
    assert list(table["estimate"]) == [12.31, 0.5]
    assert table["published"].isna().tolist() == [False, True]
    assert as_table({}).empty


def test_a_verdict_is_one_of_few_words() -> None:
    assert [decided(low, high, 1.0) for low, high in ((1.1, 2), (0.1, 0.9), (0.9, 1.1), (math.nan, math.nan))] == [
        "holds",
        "does not hold",
        "not decided here",
        "not decided here",
    ]
    with pytest.raises(UsageError, match="verdict"):
        Finding("It is", 1.0, 1, "seeds", verdict="true")


def test_findings_of_the_claims_are_their_rows() -> None:
    rows = [claims._row(task, "stability", "rank-1", np.array([3.0, 4.0, 5.5])) for task in ("persona", "register")]
    table = pd.DataFrame(rows)
    for finding, row in zip(claims.findings({"claims": table}), rows, strict=True):
        assert (finding.estimate, finding.low, finding.high) == (row["estimate"], row["low"], row["high"])
        assert (finding.n, finding.verdict) == (3, row["verdict"])
        assert finding.first == (row["task"] == "persona")
        assert finding.sentence.rstrip(".") in row["sentence"]
        assert finding.evidence in row["sentence"]


class Page(HTMLParser):
    """Tables as lists of rows of texts, scripts by their id, and ids and words of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.scripts: dict[str, str] = {}
        self.ids: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self._script = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open = [*self._open, tag]
        if dict(attributes).get("id"):
            self.ids.append(str(dict(attributes)["id"]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self._script = str(dict(attributes).get("id", "main"))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open = self._open[: len(self._open) - 1 - self._open[::-1].index(tag)]

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._open and self._open[-1] != "style":
            self.words += data
            if {"td", "th"} & set(self._open):
                self.tables[-1][-1][-1] += data

    def table(self, number: int) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[number]]

    def unpacked(self, name: str) -> str:
        return gzip.decompress(base64.b64decode(self.scripts[name])).decode()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report of the claims, made of values of three seeds."""
    values = {"efficiency": [0.04, 0.05, 0.044], "stability": [-3.0, 4.0, 5.5], "influence": [1.0, 1.1, 1.4]}
    rows = [
        claims._row(task, name, adapter, np.array(found))
        for task in ("persona", "register")
        for name, found in values.items()
        for adapter in ("rank-1", "all-modules")
    ]
    tables = {"claims": pd.DataFrame(rows)}
    (tmp_path / "tables").mkdir()
    for name, table in tables.items():
        table.to_csv(tmp_path / "tables" / f"{name}.csv", index=False)
    name = "general_vs_narrow.claims"
    made = Section(name, claims.TITLE, claims.TEXT, tables, claims.plot(tables), findings_of(name, tables))
    absent = Section("runs.pca", "PCA", "How", error="DIR: it holds no runs. Get them.", missing=True)
    broken = Section("finetunes.steering", "Steering", "How", error="Traceback\n  line\nKeyError: 1")
    said = ("a.csv: it is empty. Write it again.",)
    return write_report(tmp_path / "report.html", Suite.load("pocket"), [made, absent, broken], said, ["No Chrome."])


def test_the_report_opens_with_claims_that_are_the_tables(report: Path) -> None:
    page = Page(report)
    table = pd.read_csv(report.parent / "tables" / "claims.csv")
    first = table[table["task"] == "persona"]
    head, *lines = page.table(1)
    assert head == ["Finding", "Estimate", "Interval", "n", "Published", "Verdict"]
    for cells, row in zip(lines, table.to_dict("records"), strict=True):
        *claim, case, estimate, interval, n, published, verdict = cells
        assert not claim or row["claim"] in claim[0]
        assert case.endswith(row["adapter"]) and case.startswith("technical") == (row["task"] == "register")
        assert float(estimate) == pytest.approx(row["estimate"], rel=0.06)
        assert f" {estimate} " in row["sentence"] and f": {interval}; " in row["sentence"]
        low, _, high = interval.partition(" to ")
        assert (float(low), float(high)) == pytest.approx((row["low"], row["high"]), rel=0.06)
        assert (n, published) == (f"{row['n_seeds']} seeds", "")
        assert verdict.endswith(row["verdict"])
    assert [len(line) for line in lines] == [7, 6] * 6  # a claim is said once for both of its cases
    holding = list(first["verdict"]).count("holds")
    assert f"prefers the general solution in part: {holding} of {len(first)} hold" in page.words
    head, *lines = page.table(0)
    assert head == ["Claim, over 3 seeds", "rank-1", "all-modules", "Verdict"]  # side by side
    rows = iter(first.to_dict("records"))
    for claim, *cells, verdict in lines:
        cases = [next(rows), next(rows)]
        assert claim.startswith(cases[0]["claim"])
        assert verdict.partition(" ")[2].startswith(cases[0]["verdict"])
        for cell, row in zip(cells, cases, strict=True):
            assert cell.split(": ")[0].endswith(row["verdict"])
            estimate, low, _, high = cell.rpartition(": ")[2].split()
            assert f" {estimate} " in row["sentence"] and f": {low} to {high}; " in row["sentence"]


def test_a_finding_stands_in_its_section_and_among_the_claims(tmp_path: Path) -> None:
    table = pd.DataFrame({"em_rate": [0.1234], "em_low": [0.1], "em_high": [0.2], "n": [60]})
    (tmp_path / "tables").mkdir()
    table.to_csv(tmp_path / "tables" / "em_rates.csv", index=False)
    rate, low, high = (100 * float(table[column].iloc[0]) for column in ("em_rate", "em_low", "em_high"))
    finding = Finding("EM is {estimate}", rate, 60, "answers", low, high, "%", 11.3, "P2", first=True)
    section = Section("finetunes.em_rates", "EM", "How", {"em_rates": table}, findings=[finding])
    page = Page(write_report(tmp_path / "report.html", Suite.load("pocket"), [section], (), ()))
    assert page.table(0)[1] == ["EM is 12.3%.", "12.3%", "10.0 to 20.0", "60 answers", "11.3% P2", ""]
    assert "EM is 12.3%. (95%: 10.0 to 20.0; 60 answers; published: 11.3%, P2)" in " ".join(page.words.split())
    assert "missing" not in page.ids


def test_what_is_missing_comes_last_with_its_remedy(report: Path) -> None:
    page = Page(report)
    assert page.ids.index("findings") < page.ids.index("general_vs_narrow.claims") < page.ids.index("missing")
    assert page.ids.index("missing") < page.ids.index("runs.pca") < page.ids.index("finetunes.steering")
    last = page.words[page.words.index("What is missing", page.words.index("How to read it")) :]
    for reason in ("Get them.", "KeyError: 1", "Write it again.", "No Chrome."):
        assert reason in last and page.words.count(reason) == 1


def test_the_page_hands_out_the_files_themselves(report: Path) -> None:
    payload = json.loads(Page(report).unpacked("payload"))
    assert payload["tables"]["claims"] == (report.parent / "tables" / "claims.csv").read_text()
    assert set(payload["figures"]) == {"claims_forest"}
    assert "Plotly" in Page(report).unpacked("plotly")[:20000]
    assert report.stat().st_size < 8e6


def test_a_table_is_shown_in_part_with_units_and_without_what_is_the_same() -> None:
    table = pd.DataFrame(
        {
            "organism": [f"o{i}" for i in range(30)],
            "em_rate": np.linspace(0, 1, 30),
            "n": [60] * 30,
            "n_unscored": range(30),
            "low": [np.nan] * 30,
        }
    )
    found = view("em_rates", table)
    assert [(c.name, c.unit, c.is_number, c.place) for c in found.columns] == [
        ("organism", "", False, 0),
        ("em_rate", "fraction", True, 1),
        ("n_unscored", "answers", True, 3),
    ]
    assert found.same == [("n", "60 (answers)")] and found.empty == ["low"]
    assert len(found.rows) < found.n_rows == 30
    assert found.rows[1] == ["o1", "0.03448", "1"]
    assert view("pca_stored", table.head(0)).n_rows == 0
    assert [shown(v) for v in (None, math.nan, 0.123456, 123456.7, 3.0, True)] == [
        "",
        "",
        "0.1235",
        "123457",
        "3",
        "True",
    ]


def test_a_figure_leaves_width_and_paper_to_the_page() -> None:
    figure = figures.panels(["a", "b"])
    for panel in range(2):
        figures.line(figure, [0, 1], [0.123456789, 1], "x", 0, panel=panel)
    found = drawn(figures.captioned(figures.style(figure, "step", "loss"), "What it is"))
    assert not {"width", "template", "meta"} & set(found["layout"])
    assert found["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
    assert found["data"][0]["y"][0] == 0.123457
    assert found["narrow"]["height"] > found["layout"]["height"]  # one panel below the other


def test_a_browser_draws_every_figure_without_a_network(report: Path, tmp_path: Path) -> None:
    chrome = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chrome is None:
        pytest.skip("no Chromium is here to open the report")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    given = [*options.split(), f"--user-data-dir={tmp_path / 'chrome'}", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([chrome, *given, report.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert 'data-drawn="yes"' in done.stdout
    assert (
        done.stdout.count("plotly-graph-div js-plotly-plot") == done.stdout.count("data-figure=") == 2
    )  # one tells the story


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("pocket", ("web app", "released")),
        ("published", ("pocket", "pre-training put", "fresh")),
        ("qwen2.5-0.5b", ("pocket", "by parsing", "web app", "released", "temperature 1", "never saw", "fresh")),
    ],
)
def test_texts_speak_of_the_data_in_hand(name: str, others: tuple[str, ...]) -> None:
    suite = Suite.load(name)
    texts = {each: suite.text_of(each) for each in suite.analyses}
    assert all(texts.values())
    assert [(each, word) for each, text in texts.items() for word in others if word in text] == []
