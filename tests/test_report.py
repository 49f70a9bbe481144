"""Findings and the report: every sentence is made of the numbers of a table."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analyses.findings import COLUMNS, Finding, as_table, decided, said
from analyses.general_vs_narrow import claims
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
