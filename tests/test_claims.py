"""Claims on made-up measures of pairs: what decides, what stands beside it, and when nothing is decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses.findings import DOES_NOT_HOLD, HOLDS, UNDECIDED
from analyses.general_vs_narrow import claims
from em_interp.figures.layout import axes_of

SPREAD = np.array([-0.05, 0.02, 0.03, 0.0])


def rows(measure: str, values: Sequence[float], **named: str) -> pd.DataFrame:
    """Measures of a pair a value; NaN ones have no gain."""
    found = pd.DataFrame({"measure": measure, "seed": range(len(values)), "value": np.array(values, dtype=float)})
    of = {"task": "persona", "domain": "medicine", "adapter": "rank-1"} | named
    return found.assign(**of, reason=np.where(found["value"].isna(), "no gain", ""))


def table(*measured: pd.DataFrame) -> pd.DataFrame:
    notes: list[Any] = []
    found = SimpleNamespace(matched_pairs=lambda: pd.concat(measured), compared=lambda task: "medicine")
    root = SimpleNamespace(root=Path("data"))
    suite: Any = SimpleNamespace(name="made", finetunes=found, note=notes.append, source="pocket", input=root)
    return claims.compute(suite)["claims"]


@pytest.mark.parametrize(
    ("measure", "held", "opposed", "between"),
    [
        ("norm_ratio_75", 1.6, 0.6, 1.0),
        ("stability_gap", 9.0, -9.0, 0.0),
        ("cosine_rise", 0.3, -0.3, 0.0),
        ("rate_open_returned", 0.4, -0.4, 0.0),
        ("influence_ratio_1", 2.0, 0.5, 1.0),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(measure: str, held: float, opposed: float, between: float) -> None:
    for middle, verdict in ((held, HOLDS), (opposed, DOES_NOT_HOLD), (between, UNDECIDED)):
        row = table(rows(measure, middle + SPREAD)).iloc[0]
        assert (row["verdict"], row["n_seeds"], row["role"]) == (verdict, 4, "claim")
        assert row["sentence"].startswith(f"Claim: {row['claim']}") and row["sentence"].endswith(f"{verdict}.")
        one = table(rows(measure, [middle])).iloc[0]
        assert one["verdict"] == UNDECIDED and math.isnan(one["low"]) and "one seed" in one["sentence"]


def test_the_interval_is_student_s_over_seeds_of_the_logarithm_for_ratios() -> None:
    ratios, rises = np.array([1.2, 1.5, 1.9]), np.array([0.1, 0.3, 0.35])
    found = table(rows("norm_ratio_75", ratios.tolist()), rows("rate_open_returned", rises.tolist()))
    for row, values, back in zip(found.to_dict("records"), (np.log(ratios), 100 * rises), (np.exp, float), strict=True):
        ends = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        assert (row["low"], row["estimate"], row["high"]) == pytest.approx(
            (back(ends[0]), back(values.mean()), back(ends[1]))
        )


def test_a_seed_without_a_value_leaves_the_claim_open_and_says_why() -> None:
    row = table(rows("norm_ratio_75", [1.5, 1.6, np.nan, 1.55])).iloc[0]
    assert (row["verdict"], row["n_seeds"], row["missing"]) == (UNDECIDED, 3, "1 of 4 seeds: no gain")
    assert row["estimate"] == pytest.approx(math.exp(np.log([1.5, 1.6, 1.55]).mean())) and row["low"] > 1
    nothing = table(rows("norm_ratio_75", [np.nan, np.nan]))
    assert (nothing["verdict"].item(), nothing["sentence"].item()) == (UNDECIDED, "")
    assert claims.findings({"claims": nothing}) == []
    assert claims.plot({"claims": nothing})


def test_further_statistics_and_domains_stand_beside_and_are_not_pooled() -> None:
    measured = (
        rows("norm_ratio_75", [0.5, 0.55, 0.6], domain="finance"),
        rows("norm_ratio_75", [1.5, 1.6, 1.7]),
        rows("norm_ratio_50", [0.5, 0.55, 0.6]),
        rows("norm_ratio_50", [9.0, 9.1], domain="finance"),
        rows("loss_chat", [1.0, 2.0]),
    )
    found = table(*measured).set_index(["statistic", "domain"])
    assert found["role"].to_dict() == {
        ("norm_ratio_75", "finance"): "another domain",
        ("norm_ratio_75", "medicine"): "claim",
        ("norm_ratio_50", "medicine"): "another statistic",
    }
    assert found["verdict"].tolist() == [DOES_NOT_HOLD, HOLDS, DOES_NOT_HOLD]
    (finding,) = claims.findings({"claims": found.reset_index()})
    assert (finding.verdict, finding.n, finding.unit) == (HOLDS, 3, "times")
    assert finding.estimate == pytest.approx(math.exp(np.log([1.5, 1.6, 1.7]).mean()))


def test_published_values_stand_beside_the_same_statistic_alone() -> None:
    vector, task = {"adapter": "steering-vector"}, {"task": "register"}
    measured = [rows("cosine_rise", [0.2, 0.3], **named) for named in (vector, {}, vector | task)]
    found = table(*measured)
    assert found["published"].fillna(-1).tolist() == [0.313, -1, -1]
    first = claims.findings({"claims": found})[0]
    assert (first.published, first.first) == (0.313, True) and "P1, Fig. 5" in first.source


def test_the_forest_has_a_panel_a_claim_and_a_row_an_adapter() -> None:
    measured = [
        rows(statistics[0].of, values, adapter=adapter, task=task)
        for statistics in (claim.statistics for claim in claims.CLAIMS.values())
        for adapter in ("steering-vector", "rank-1", "nine", "all-modules")
        for task in ("persona", "register")
        for values in ((1.2, 1.3, 1.4),)
        if (adapter, task, statistics[0].of) != ("nine", "register", "cosine_rise")
    ]
    figure = claims.plot({"claims": table(*measured)})["claims_forest"]
    axes = axes_of(figure)
    assert len(axes) == 5 and all(len(up.ticktext) == 4 for _, up in axes)
    assert [across.type for across, _ in axes] == ["log", None, None, None, "log"]
    places = sorted(shape.x0 for shape in figure.layout.shapes if shape.type == "line")
    assert places == [0, 0, 0, 1, 1]
