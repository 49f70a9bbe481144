from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from em_interp.errors import StatisticsError
from em_interp.evaluation.rates import PAPER, REFERENCE_CODE, Criterion, em_rates, rates_by_question, threshold_sweep
from em_interp.statistics import (
    clustered_bootstrap_interval,
    cosine_null_sd,
    cosine_p_value,
    permutation_p_value,
    rate_interval,
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


def test_clustered_bootstrap_equals_a_plain_loop() -> None:
    top, bottom = np.array([3.0, 0, 9, 4, 1]), np.array([10.0, 10, 12, 8, 10])
    interval = clustered_bootstrap_interval(top, bottom, resamples=40_000, seed=1)
    rng = np.random.default_rng(2)
    rates = []
    for _ in range(20_000):
        pick = rng.integers(0, 5, 5)
        rates.append(top[pick].sum() / bottom[pick].sum())
    low, high = np.quantile(rates, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)


def test_clusters_widen_the_interval_where_questions_differ() -> None:
    clustered = rate_interval([50, 0, 50, 0, 50, 0], [50] * 6)
    wilson = wilson_interval(150, 300)
    assert clustered.high - clustered.low > 2 * (wilson.high - wilson.low)


def test_intervals_that_resampling_cannot_give_fall_back_to_wilson() -> None:
    zero = rate_interval([0] * 8, [100] * 8)
    assert zero.low == 0.0
    assert zero.high == pytest.approx(wilson_interval(0, 800).high)
    two = rate_interval([22, 23], [50, 50])
    wilson = wilson_interval(45, 100)
    assert two.low <= wilson.low
    assert two.high >= wilson.high
    assert rate_interval([4], [10]).method == "Wilson"


def test_bad_counts_are_refused() -> None:
    for call in (
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(3, 2),
        lambda: clustered_bootstrap_interval(np.ones(1), np.ones(1)),
        lambda: clustered_bootstrap_interval(np.array([np.nan, 1.0]), np.ones(2)),
        lambda: clustered_bootstrap_interval(np.ones(2), np.zeros(2)),
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
