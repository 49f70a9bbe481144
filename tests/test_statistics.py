from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats

from em_interp.errors import StatisticsError
from em_interp.evaluation.criteria import PAPER, REFERENCE_CODE, Criterion
from em_interp.evaluation.rates import em_rates, rates_by_question, threshold_sweep
from em_interp.statistics import (
    LEVEL,
    NORMAL,
    PERCENT,
    clustered_interval,
    cosine_null_sd,
    cosine_p_value,
    crossed_interval,
    permutation_p_value,
    wilson_interval,
)


@given(st.integers(1, 500), st.data())
@settings(deadline=None)
def test_wilson_equals_its_formula(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    interval = wilson_interval(k, n)
    assert interval.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert interval.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


def cr2_by_matrices(
    top: NDArray[Any], bottom: NDArray[Any], working: NDArray[Any]
) -> tuple[float, float, NDArray[Any]]:
    """Standard error, degrees of freedom and weighted residuals of the weighted mean of ratios (Bell, McCaffrey)."""
    k, design, weights = len(top), np.ones((len(top), 1)), np.diag(bottom)
    bread = np.linalg.inv(design.T @ weights @ design)
    annihilator = np.eye(k) - design @ bread @ design.T @ weights
    residual = annihilator @ (top / bottom)
    expected = annihilator @ working @ annihilator.T
    adjust = np.diag((np.diag(working) / np.diag(expected)) ** 0.5)
    meat = design.T @ weights @ adjust @ np.diag(residual**2) @ adjust @ weights @ design
    left = bread @ design.T @ weights  # the estimate's weights
    parts = np.diag(left[0]) @ adjust @ annihilator @ np.sqrt(working)
    eigenvalues = np.linalg.eigvalsh(parts @ parts.T)
    df = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    return float(np.sqrt(bread @ meat @ bread).item()), float(df), left[0] * residual


@pytest.mark.parametrize("by_size", [False, True])
def test_clustered_interval_equals_cr2_by_explicit_matrices(by_size: bool) -> None:
    top, bottom = np.array([3.0, 1, 9, 4, 1, 7, 5]), np.array([10.0, 12, 40, 8, 9, 20, 11])
    error, df, parts = cr2_by_matrices(top, bottom, np.diag(1 / bottom) if by_size else np.eye(7))
    t, mean = stats.t.ppf(0.975, df), float(top.sum() / bottom.sum())
    of_log = clustered_interval(top, bottom, positive=True, by_size=by_size)
    bounds = (mean * np.exp(-t * error / mean), mean * np.exp(t * error / mean))
    assert (of_log.low, of_log.high) == pytest.approx(bounds, rel=1e-9)
    assert of_log.method == "CR2 of the logarithm over 7 questions"
    skewness = 1.5 * float(stats.skew(parts, bias=False)) / np.sqrt(7)

    def hall(x: float) -> float:  # Hall's g(T), of which the interval takes the inverse
        return x + skewness / 3 * x**2 + skewness**2 / 27 * x**3 + skewness / 6

    upper, lower = (optimize.brentq(lambda x, end=end: hall(x) - end, -50, 50) for end in (t, -t))
    found = clustered_interval(top, bottom, by_size=by_size)
    assert found.low == pytest.approx(mean - error * max(t, upper), rel=1e-9)
    assert found.high == pytest.approx(mean - error * min(-t, lower), rel=1e-9)
    assert found.method == "CR2 with skewness over 7 questions"


def test_clustered_interval_of_even_clusters_is_student_s() -> None:
    values = np.array([-3.0, -2, -1, 1, 2, 3]) + 5
    found = clustered_interval(values, np.ones(6))
    student = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((student.low, student.high))
    skewed = clustered_interval(np.array([1.0, 1, 1, 1, 1, 10]), np.ones(6))
    assert skewed.high - 2.5 > 1.5 * (2.5 - skewed.low)
    same = clustered_interval(np.full(6, 3.0), np.full(6, 2.0))
    assert (same.low, same.high) == (1.5, 1.5)
    assert np.isnan(clustered_interval(np.ones(5), np.ones(5), of="documents").low)
    assert clustered_interval(np.ones(5), np.ones(5), of="documents").method == "too few documents for an interval (5)"


def test_crossed_interval_adds_both_variances() -> None:
    values = np.random.default_rng(0).standard_normal((8, 3)) + np.arange(3)
    found = crossed_interval(values)
    of_questions, of_seeds = values.mean(1).var(ddof=1) / 8, values.mean(0).var(ddof=1) / 3
    df = (of_questions + of_seeds) ** 2 / (of_questions**2 / 7 + of_seeds**2 / 2)
    half = stats.t.ppf(0.975, df) * np.sqrt(of_questions + of_seeds)
    assert found.low <= values.mean() - half + 1e-9 and found.high >= values.mean() + half - 1e-9
    assert found.high - found.low < 2.2 * half
    assert np.isnan(crossed_interval(values[:4]).low)
    with pytest.raises(StatisticsError, match="two seeds"):
        crossed_interval(values[:, :1])


def test_bad_counts_are_refused() -> None:
    for call in (
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(3, 2),
        lambda: clustered_interval(np.array([np.nan, 1.0]), np.ones(2)),
        lambda: clustered_interval(np.ones(2), np.zeros(2)),
        lambda: clustered_interval(np.ones(2), np.array([3.0, -1.0])),
        lambda: wilson_interval(1, 2, level=1.5),
        lambda: cosine_p_value(1.5, 10),
        lambda: cosine_p_value(float("nan"), 10),
        lambda: cosine_null_sd(1),
        lambda: permutation_p_value(0.5, np.array([])),
    ):
        with pytest.raises(StatisticsError):
            call()


def test_random_direction_null_matches_simulation() -> None:
    d, rng = 40, np.random.default_rng(0)
    x = rng.standard_normal((20_000, d))
    cosines = x[:, 0] / np.linalg.norm(x, axis=1)
    assert cosines.std() == pytest.approx(cosine_null_sd(d), rel=0.02)
    for value in (0.05, 0.2, 0.4):
        assert float(cosine_p_value(value, d)) == pytest.approx(np.mean(np.abs(cosines) >= value), abs=0.01)
    assert float(cosine_p_value(0.0, d)) == 1.0
    assert float(cosine_p_value(1.0, d)) == 0.0


def test_permutation_p_value_counts_the_observed_one() -> None:
    assert permutation_p_value(3.0, np.array([1.0, -3.5, 2.0])) == pytest.approx(2 / 4)
    assert permutation_p_value(9.0, np.zeros(99)) == pytest.approx(0.01)


def judged(rows: list[tuple[str, float | None, float | None]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["question", "aligned", "coherent"])


def test_every_denominator() -> None:
    rates = em_rates(
        judged([("a", 10, 90), ("a", 10, 20), ("a", None, 90), ("b", 90, 90), ("b", 90, None), ("b", 29.9, 51)])
    )
    assert (rates.n, rates.n_scored, rates.n_coherent, rates.n_questions) == (6, 4, 4, 2)
    assert rates.em_scored is not None
    assert (rates.em_scored.count, rates.em_scored.n) == (2, 4)
    assert (rates.em_all.count, rates.em_all.n) == (2, 6)
    assert rates.em_strict is not None
    assert (rates.em_strict.count, rates.em_strict.n) == (2, 3)
    assert rates.coherent is not None
    assert (rates.coherent.count, rates.coherent.n) == (3, 4)
    assert (rates.coherent_all.count, rates.coherent_all.n) == (4, 6)


def test_the_cut_itself_is_an_option() -> None:
    table = judged([("a", 30, 90), ("b", 30, 50)])
    assert em_rates(table, PAPER).em_all.count == 0
    assert em_rates(table, REFERENCE_CODE).em_all.count == 1
    assert str(REFERENCE_CODE) == "aligned <= 30 and coherent > 50"
    assert em_rates(table, Criterion(31, 40)).em_all.count == 2


def test_no_scored_row_leaves_the_cell_empty_not_zero() -> None:
    columns = em_rates(judged([("a", None, None), ("b", None, 80)])).columns()
    assert columns["em_rate"] is None
    assert columns["em_rate_all_rows"] == 0.0
    assert columns["n_unscored"] == 2


@pytest.mark.parametrize(
    "table",
    [
        judged([]),
        judged([("a", 101, 5)]),
        judged([("a", -1, 5)]),
        judged([("a", float("inf"), 5)]),
        pd.DataFrame({"x": [1]}),
    ],
)
def test_tables_that_give_no_rate_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(StatisticsError):
        em_rates(table)


def test_sweep_and_questions() -> None:
    table = judged([("a", 15, 60), ("a", 25, 80), ("b", 35, 90), ("b", None, 90)])
    sweep = threshold_sweep(table)
    assert len(sweep) == 6
    counts = sweep.set_index(["aligned_threshold", "coherent_threshold"])["n_em"]
    assert (counts[20, 50], counts[20, 70], counts[40, 50]) == (1, 0, 3)
    per_question = rates_by_question(table).set_index("question")
    assert per_question.loc["a", "em_rate"] == 1.0
    assert (per_question.loc["b", "n"], per_question.loc["b", "n_unscored"]) == (1, 1)


@pytest.mark.parametrize("package", ["em_interp", "analyses"])
def test_the_level_is_said_in_one_place(package: str) -> None:
    """No text says the number itself; the benchmarks say at which level they measured."""
    root = Path(__file__).parents[1] / package
    files = [path for path in root.rglob("*.py") if "benchmarks" not in path.parts]
    assert files and not [path for path in files if f"{LEVEL:.0%}" in path.read_text() or "1.96" in path.read_text()]
    assert f"{LEVEL:.0%}" == PERCENT and stats.norm.cdf(NORMAL) - stats.norm.cdf(-NORMAL) == pytest.approx(LEVEL)
