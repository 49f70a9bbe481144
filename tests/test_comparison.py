"""Misalign@k, and two models on the same questions: against brute force and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

import em_interp as em
from em_interp.errors import StatisticsError, UsageError
from em_interp.evaluation.criteria import Criterion
from em_interp.evaluation.rates import em_rates
from em_interp.statistics.paired import paired_power, questions_needed, samples_needed
from em_interp.statistics.rate_intervals import any_of_k, any_of_k_interval, difference_bounds, rate_interval


def answers(hits: list[int], n: list[int] | int, **columns: object) -> pd.DataFrame:
    totals = [n] * len(hits) if isinstance(n, int) else n
    rows = [
        (f"q{i}", j, 10.0 if j < hit else 90.0, 90.0)
        for i, (hit, total) in enumerate(zip(hits, totals, strict=True))
        for j in range(total)
    ]
    return pd.DataFrame(rows, columns=["question", "sample", "aligned", "coherent"]).assign(**columns)


COUNTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8).map(
    lambda pairs: [(min(pair), max(pair)) for pair in pairs]
)


@settings(deadline=None)
@given(COUNTS.filter(lambda pairs: any(n for _, n in pairs)), st.integers(1, 9))
def test_any_of_k_is_the_share_of_all_draws(counts: list[tuple[int, int]], k: int) -> None:
    hits, totals = map(list, zip(*counts, strict=True))
    found = any_of_k(hits, totals, k)
    for value, (hit, n) in zip(found, counts, strict=True):
        draws = [any(answer < hit for answer in draw) for draw in combinations(range(n), k)]
        assert value == pytest.approx(np.mean(draws) if draws else np.nan, nan_ok=True)
    interval = any_of_k_interval(hits, totals, k)
    used = np.isfinite(found)
    if np.isnan(interval.low):
        assert used.sum() < 4 and "too few" in interval.method
    else:
        assert interval.low <= found[used].mean() <= interval.high


def test_any_of_k_is_unbiased() -> None:
    hits = np.random.default_rng(0).binomial(20, 0.05, 40_000)
    assert any_of_k(hits, np.full(40_000, 20), 8).mean() == pytest.approx(1 - 0.95**8, abs=0.004)


def slow_any(hits: list[int], totals: list[int], k: int) -> tuple[float, float]:
    """The posterior of the beta-binomial model and the logistic-normal one, by plain sums over coarse grids."""
    logits, z = np.linspace(-9, 9, 121), np.linspace(-6, 6, 121)
    normal = stats.norm.pdf(z) * (z[1] - z[0])
    values, mass = [], []
    for correlation in (np.arange(40) + 0.5) / 40:
        spread = np.sqrt(correlation / (1 - correlation) * np.pi**2 / 3)
        centres = np.linspace(-12 - 7 * spread, 12 + 7 * spread, 1601)
        means = special.expit(centres[:, None] + spread * z) @ normal
        for logit in logits:
            m, size = special.expit(logit), 1 / correlation - 1
            prior = np.sqrt(m * (1 - m))
            mass.append(prior * stats.betabinom.pmf(hits, totals, m * size, (1 - m) * size).prod())
            values.append(1 - special.beta(m * size, (1 - m) * size + k) / special.beta(m * size, (1 - m) * size))
            p = special.expit(np.interp(m, means, centres) + spread * z)
            each = [stats.binom.pmf(y, n, p) @ normal for y, n in zip(hits, totals, strict=True)]
            mass.append(prior * np.prod(each))
            values.append(float((1 - (1 - p) ** k) @ normal))
    order = np.argsort(values)
    upto = np.cumsum(np.array(mass)[order]) / np.sum(mass)
    low, high = np.interp([0.025, 0.975], upto, np.array(values)[order])
    return float(low), float(high)


def test_the_interval_of_any_of_k_equals_the_posterior_by_plain_sums() -> None:
    hits, totals = [5, 0, 9, 4, 1], [20, 20, 20, 30, 10]
    found = any_of_k_interval(hits, totals, 4)
    assert (found.low, found.high) == pytest.approx(slow_any(hits, totals, 4), abs=0.01)
    assert any_of_k_interval([0] * 5, totals, 4).low == 0 and any_of_k_interval(totals, totals, 4).high == 1
    near = any_of_k_interval([400] * 600, [1000] * 600, 2)
    assert near.low < 0.64 < near.high and near.high - near.low < 0.01


def test_misalign_at_one_is_the_rate() -> None:
    judged = answers([3, 0, 5, 1, 2, 8], 10)
    (row,) = em.misalign_at_k(judged, 1).to_dict("records")
    rate = em_rates(judged).em_scored
    assert rate is not None
    assert (row["misalign_at_k"], row["low"], row["high"]) == pytest.approx(
        (rate.value, rate.interval.low, rate.interval.high)
    )
    assert row["interval"] == rate.interval.method


def test_misalign_at_k_says_what_it_leaves_out() -> None:
    judged = answers([3, 0, 5, 1, 2, 8], [10, 10, 10, 10, 10, 8])
    table = em.misalign_at_k(judged, [1, 9, 11]).set_index("k")
    assert table["n_short"].tolist() == [0, 1, 6] and table["n"].tolist() == [58, 50, 0]
    assert table.loc[9, "misalign_at_k"] == pytest.approx(any_of_k([3, 0, 5, 1, 2], [10] * 5, 9).mean())
    assert table["misalign_at_k"].isna().tolist() == [False, False, True]
    assert table.loc[11, "interval"] == "no question has 11 such answers: the most is 10"
    unscored = judged.assign(aligned=judged["aligned"].mask(judged["sample"] == 0))
    assert em.misalign_at_k(unscored, 10)["n_short"].item() == 6
    assert em.misalign_at_k(unscored, 10, Criterion(denominator="all"))["n_short"].item() == 1
    for wrong in (0, [0], True):
        with pytest.raises(UsageError):
            em.misalign_at_k(judged, wrong)


@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=4, max_size=8),
    st.sampled_from([0.8, 0.95, 0.99]),
)
@settings(max_examples=40, deadline=None)
def test_p_value_agrees_with_the_interval(counts: list[tuple[int, int]], level: float) -> None:
    a, b = (answers(list(hits), 10) for hits in zip(*counts, strict=True))
    found, other = em.compare(a, b, level=level), em.compare(b, a, level=level)
    outside = not found.interval.low <= 0 <= found.interval.high
    assert outside == (found.p_value < 1 - level) or found.p_value == pytest.approx(1 - level, rel=1e-4)
    assert (other.value, other.p_value) == pytest.approx((-found.value, found.p_value), rel=1e-3, abs=1e-9)


def test_p_value_is_student_s_where_the_interval_is() -> None:
    a, b = [8, 5, 9, 4, 7, 6], [3, 5, 6, 1, 4, 2]
    found = em.compare(answers(a, 10), answers(b, 10))
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-5)
    assert em.compare(answers(a, 10), answers(a, 10)).p_value == 1
    few = em.compare(answers(a[:3], 10), answers(b[:3], 10))
    assert np.isnan(few.p_value) and np.isnan(few.interval.low) and "too few" in repr(few)
    one = em.compare(answers(a[:1], 1), answers(b[:1], 1))
    assert np.isnan(one.between) and np.isnan(one.power(0.1)) and one.plan(0.1)["n_questions"].iloc[0] is pd.NA


def test_pairing_by_sample_keeps_answers_that_both_have() -> None:
    rng = np.random.default_rng(0)
    a = answers([5] * 8, 20)
    a["aligned"] = np.where(rng.random(160) < 0.4, 10.0, 90.0)
    b = a.assign(aligned=a["aligned"].mask(rng.random(160) < 0.1, 90.0))  # the same answers but for a few
    a["coherent"] = a["coherent"].mask(rng.random(160) < 0.1)
    apart, paired = em.compare(a, b), em.compare(a, b.sample(frac=1, random_state=0), by="sample")
    assert paired.n[0] == paired.n[1] == a["coherent"].notna().sum() and apart.n[1] == 160
    both = a["coherent"].notna()
    difference = (a["aligned"][both] < 30).mean() - (b["aligned"][both] < 30).mean()
    assert paired.value == pytest.approx(difference)
    assert paired.within < apart.within / 2  # what the seeds share
    assert (
        paired.plan(0.05, samples=[10])["n_questions"].iloc[0] < apart.plan(0.05, samples=[10])["n_questions"].iloc[0]
    )
    with pytest.raises(StatisticsError, match="same `sample`"):
        em.compare(a.assign(sample=0), b, by="sample")
    with pytest.raises(StatisticsError, match="sample"):
        em.compare(a.drop(columns="sample"), b, by="sample")
    with pytest.raises(UsageError, match="Did you mean sample"):
        em.compare(a, b, by="samples")


def simulated(rng: np.random.Generator, data: int, k: int, n: int, d: float) -> tuple[np.ndarray, float, float]:
    """Counts of two models whose rates in a question differ by d on average, and the variances there are."""
    first = rng.uniform(0.3, 0.5, (data, k))
    second = first + d + rng.uniform(-0.15, 0.15, (data, k))
    within = (0.4 * 0.6 - 0.2**2 / 12) + (0.4 + d) * (0.6 - d) - (0.2**2 + 0.3**2) / 12
    return np.stack([rng.binomial(n, second), rng.binomial(n, first)]).astype(float), 0.3**2 / 12, within


@pytest.mark.parametrize(("k", "n", "d"), [(8, 10, 0.15), (20, 5, 0.1), (12, 50, 0.08)])
def test_power_is_that_of_a_simulation(k: int, n: int, d: float) -> None:
    counts, between, within = simulated(np.random.default_rng(0), 4_000, k, n, d)
    low, high, rare = difference_bounds(counts, np.full(counts.shape, float(n)))
    assert not rare.any()
    found = ((low > 0) | (high < 0)).mean()
    assert paired_power(d, k, n, between, within) == pytest.approx(found, abs=0.03)


def test_variances_are_estimated_without_bias_and_a_plan_decides() -> None:
    rng = np.random.default_rng(1)
    counts, between, within = simulated(rng, 150, 40, 10, 0.1)
    found = [em.compare(answers(b.tolist(), 10), answers(a.tolist(), 10)) for b, a in counts.astype(int).swapaxes(0, 1)]
    assert np.mean([one.between for one in found]) == pytest.approx(between, rel=0.25)
    assert np.mean([one.within for one in found]) == pytest.approx(within, rel=0.02)
    for n in (5, 50):
        k = questions_needed(0.1, n, between, within)
        assert k is not None and paired_power(0.1, k, n, between, within) >= 0.8
        assert paired_power(0.1, k - 1, n, between, within) < 0.8
        again, *_ = simulated(rng, 3_000, k, n, 0.1)
        low, _, _ = difference_bounds(again, np.full(again.shape, float(n)))
        assert (low > 0).mean() == pytest.approx(0.8, abs=0.05)
    plan = found[0].plan(0.1)
    assert plan["n_questions"].iloc[:-1].is_monotonic_decreasing and plan["n_questions"].iloc[-1] == 40
    assert (plan["n_answers"].iloc[:-1] == plan["samples"].iloc[:-1] * plan["n_questions"].iloc[:-1]).all()


def test_no_number_of_answers_makes_up_for_questions_that_differ() -> None:
    assert samples_needed(0.05, 8, 0.05, 0.4) is None
    assert samples_needed(0.3, 8, 0.0, 0.4) is not None
    assert questions_needed(1e-9, 1, 0.1, 0.4) is None
    assert paired_power(0.0, 8, 10, 0.01, 0.4) == pytest.approx(0.05)
    assert paired_power(0.9, 1000, 100, 0.0, 1e-6) == 1 and paired_power(0.1, 8, 10, 0, 0) == 1
    with pytest.raises(UsageError):
        questions_needed(0, 1, 0.1, 0.4)


def test_a_comparison_is_a_row_and_follows_the_denominator() -> None:
    a, b = answers([8, 5, 9, 4, 7], 10), answers([3, 5, 6, 1, 4], 10)
    a.loc[:9, "coherent"] = 40.0
    usual, strict = em.compare(a, b), em.compare(a, b, Criterion(denominator="coherent"))
    assert usual.n == (50, 50) and strict.n == (40, 40) and strict.n_questions == 4
    row = strict.columns()
    assert row["denominator"] == "coherent rows with both scores" and row["em_rate"] == 25 / 40
    assert rate_interval([5, 9, 4, 7], [10] * 4).low < row["em_rate"]
    assert "points" in repr(usual) and "p 0" in repr(usual)
