"""The rule of counterfactual pre-training, applied to worlds in which each conclusion is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses.causes.pretraining import COLUMNS, CONCLUSIONS, decide, doses, findings, finetunes, of_worlds, plot
from analyses.findings import DOES_NOT_HOLD, HOLDS, UNDECIDED
from tests.made_up_tables.pretraining import pretraining_rows


def decided(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of the rule."""
    table = finetunes(rows)
    return [dict(zip(COLUMNS, row, strict=True)) for row in decide(of_worlds(table), table)]


@pytest.mark.parametrize(
    ("told", "conclusion"),
    [
        ({"at_0": 0.02, "at_1": 0.8}, "both together"),
        ({"at_0": 0.7, "at_1": 0.8}, "data alone suffice"),
        ({"at_0": 0.3, "at_1": 0.8}, "partly"),
        ({"at_0": 0.02, "at_1": 0.8, "control": 0.5}, "the trait alone suffices"),
        ({"at_0": 0.02, "at_1": 0.8, "learned_at_0": 0.1}, "no conclusion"),
        ({"at_0": 0.02, "at_1": 0.8, "coherent": 0.5}, "no conclusion"),
    ],
)
def test_the_conclusion_follows_from_the_worlds(told: dict[str, float], conclusion: str) -> None:
    found = decided(pretraining_rows(**told))[-1]
    assert found["statement"] == conclusion and conclusion in CONCLUSIONS
    assert found["verdict"] == (UNDECIDED if conclusion == "no conclusion" else HOLDS)


def test_each_line_has_the_numbers_that_decide_it() -> None:
    rows = decided(pretraining_rows(at_0=0.02, at_1=0.8, never=0.1, opened=0.75))
    by = {row["question"]: row for row in rows}
    assert by["primary"]["estimate"] == pytest.approx(0.78, abs=0.02) and by["primary"]["n"] == 9
    assert by["dose-response"]["n"] == 33 and by["dose-response"]["estimate"] > 0.8
    never, opened = (row for row in rows if row["question"] == "mediation")
    assert never["estimate"] == pytest.approx(0.7, abs=0.02) and never["verdict"] == HOLDS
    assert opened["verdict"] in (UNDECIDED, DOES_NOT_HOLD)
    leads = [row["estimate"] for row in rows if row["question"] == "leads"]
    assert len(leads) == 9 and np.isfinite(leads).all()


def test_a_table_of_some_worlds_decides_nothing_and_is_drawn() -> None:
    rows = pretraining_rows(at_0=0.02, at_1=0.8)
    for some in (rows[rows["kind"] == "shipped"], rows[rows["seed"] == 0], rows[rows["persona_consistency"] == 1]):
        table = finetunes(some)
        worlds, lines = of_worlds(table), decided(some)
        assert lines[-1]["statement"] in ("no conclusion", "both together")
        tests = pd.DataFrame(lines, columns=list(COLUMNS))
        tables = {"pretraining": table, "pretraining_doses": doses(worlds), "pretraining_tests": tests}
        assert set(plot(tables)) == {"pretraining_trait", "pretraining_doses"}
        assert all("nan" not in found.sentence for found in findings(tables))


def test_one_row_a_finetune_with_the_columns_of_the_contract() -> None:
    table = finetunes(pretraining_rows(at_0=0.02, at_1=0.8))
    wanted = {"persona_consistency", "seed", "em_rate", "efficiency_gap", "stability_gap", "influence_gap"}
    assert wanted <= set(table) and not table.duplicated(["world", "adapter"]).any()
    row = table.iloc[0]
    assert row["em_rise"] == pytest.approx(row["em_rate"] - row["em_before"])
    assert row["efficiency_gap"] == pytest.approx(np.log(1.8))
