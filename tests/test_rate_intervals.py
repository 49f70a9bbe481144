from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from em_interp.errors import StatisticsError
from em_interp.evaluation.comparison import compare
from em_interp.evaluation.rates import em_rates
from em_interp.statistics import wilson_interval
from em_interp.statistics.rate_intervals import difference_interval, rate_interval, ratio_interval


def slow_quantiles(successes: list[int], totals: list[int]) -> tuple[float, float]:
    """The posterior by plain sums on coarse grids: beta-binomial and logistic-normal, each with 50 correlations."""
    x, step = np.linspace(-14, 14, 561, retstep=True)
    logits = np.linspace(-12, 12, 241)
    means, density = special.expit(logits), np.zeros(241)
    z = np.linspace(-7, 7, 281)
    for correlation in (np.arange(50) + 0.5) / 50:
        size = 1 / correlation - 1
        spread = np.sqrt(correlation / (1 - correlation) * np.pi**2 / 3)
        centres = np.linspace(-20 - 6 * spread, 20 + 6 * spread, 2001)
        curve = special.expit(centres[:, None] + spread * z) @ (stats.norm.pdf(z) * (z[1] - z[0]))
        edges = (np.append(x - step / 2, np.inf) - np.interp(means, curve, centres)[:, None]) / spread
        edges[:, 0] = -np.inf
        beta, normal = np.ones((2, 241))
        for y, n in zip(successes, totals, strict=True):
            beta *= stats.betabinom.pmf(y, n, means * size, (1 - means) * size)
            normal *= np.diff(stats.norm.cdf(edges), axis=1) @ stats.binom.pmf(y, n, special.expit(x))
        density += beta + normal
    density *= np.sqrt(means * (1 - means))  # Jeffreys' prior, per logit
    mass = np.cumsum(density) - density / 2
    low, high = special.expit(np.interp([0.025, 0.975], mass / density.sum(), logits))
    return float(low), float(high)


@pytest.mark.parametrize(
    ("successes", "totals"),
    [([5, 0, 9, 4, 1], [50] * 5), ([1, 0, 20, 3], [10, 50, 30, 12]), ([9, 10, 10, 10], [10] * 4)],
)
def test_rate_interval_equals_the_posterior_by_plain_sums(successes: list[int], totals: list[int]) -> None:
    found = rate_interval(successes, totals)
    assert (found.low, found.high) == pytest.approx(slow_quantiles(successes, totals), abs=0.004)
    assert found.method == f"beta-binomial and logistic-normal over {len(totals)} questions"


def test_rate_interval_knows_which_questions_say_little() -> None:
    differing, alike = rate_interval([50, 0, 50, 0, 50, 0], [50] * 6), rate_interval([25] * 6, [50] * 6)
    wilson = wilson_interval(150, 300)
    assert differing.high - differing.low > 4 * (wilson.high - wilson.low)
    assert wilson.high - wilson.low < alike.high - alike.low < differing.high - differing.low
    zero = rate_interval([0] * 8, [100] * 8)
    assert zero.low == 0 and zero.high > 10 * wilson_interval(0, 800).high
    mirrored = rate_interval([10, 7, 3, 9, 0], [10] * 5)
    direct = rate_interval([0, 3, 7, 1, 10], [10] * 5)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((direct.low, direct.high), abs=1e-6)
    uneven = rate_interval([0, 0, 0, 0, 90], [1, 1, 1, 1, 100])
    assert uneven.low <= 90 / 104 <= uneven.high
    assert rate_interval([3, 5, 2, 8, 0], [50] * 4 + [0]) == rate_interval([3, 5, 2, 8], [50] * 4)
    many = rate_interval([400_000, 410_000, 390_000, 405_000, 395_000], [1_000_000] * 5)
    assert many.low < 0.4 < many.high


@pytest.mark.parametrize("k", [1, 2, 3])
def test_too_few_questions_get_no_interval(k: int) -> None:
    for found in (
        rate_interval([5] * k, [50] * k),
        difference_interval(([5] * k, [6] * k), ([50] * k, [50] * k)),
        ratio_interval(([5] * k, [6] * k), ([50] * k, [50] * k)),
    ):
        assert np.isnan(found.low) and np.isnan(found.high)
        assert found.method == f"too few questions for an interval ({k})"
    answers = pd.DataFrame({"question": [f"q{i}" for i in range(k)], "aligned": 10.0, "coherent": 90.0})
    columns = em_rates(answers).columns()
    assert columns["em_rate"] == 1 and np.isnan(columns["em_low"]) and "too few questions" in columns["interval"]


def test_counts_that_are_no_proportion_are_refused() -> None:
    for successes, totals in (
        ([60, 1, 1, 1], [50] * 4),
        ([-1, 1, 1, 1], [50] * 4),
        ([1, 1, 1], [50] * 4),
        ([float("nan"), 1, 1, 1], [50] * 4),
        ([0] * 4, [0] * 4),
    ):
        with pytest.raises(StatisticsError):
            rate_interval(successes, totals)
        with pytest.raises(StatisticsError):
            difference_interval((successes, [1] * 4), (totals, [50] * 4))


def test_difference_is_student_s_where_rates_are_common_and_conservative_where_they_are_rare() -> None:
    a, b, n = np.array([20, 30, 10, 25, 5]), np.array([10, 25, 12, 20, 1]), np.full(5, 50)
    found = difference_interval((a, b), (n, n))
    student = stats.ttest_rel(a / n, b / n).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((student.low, student.high))
    swapped = difference_interval((b, a), (n, n))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    rare = difference_interval((a // 10, b // 30), (n, n))
    assert rare.method.startswith("conservative") and rare.low < 7 / 250 - 0 / 250 < rare.high
    single = rate_interval(a // 10, n)
    assert rare.high <= single.high and rare.low >= -rate_interval(b // 30, n).high
    none = difference_interval(([0] * 5, [0] * 5), (n, n))
    assert none.low < 0 < none.high
    for sure, hit in (((50, 0), 0), ((50, 0), 1), ((30, 10), 0)):  # no spread to see is not no doubt
        found = difference_interval(([sure[0]] * 8, [sure[1]] * 7 + [sure[1] + hit]), ([50] * 8, [50] * 8))
        assert found.method.startswith("conservative") and found.high - found.low > 0.05


def test_many_answers_to_many_questions_neither_overflow_nor_widen() -> None:
    rng = np.random.default_rng(0)
    for k, n, rate in ((600, 300, 0.01), (600, 300, 0.5), (40, 20_000, 0.001), (1000, 50, 0.999)):
        hits = rng.binomial(n, rate, k)
        found, wilson = rate_interval(hits, [n] * k), wilson_interval(int(hits.sum()), n * k)
        assert found.low <= hits.sum() / (n * k) <= found.high
        counted = np.sqrt(max(1, n / 4096))
        assert 0.9 < (found.high - found.low) / (wilson.high - wilson.low) / counted < 1.5, (k, n, rate)


def test_ratio_combines_both_intervals() -> None:
    a, b, n = np.array([2, 6, 1, 5, 0]), np.array([20, 30, 10, 25, 5]), np.full(5, 50)
    found, first, second = ratio_interval((a, b), (n, n)), rate_interval(a, n), rate_interval(b, n)
    r = 0.8 * np.corrcoef(a, b)[0, 1]
    down, up = np.log((14 / 250) / first.low), np.log(first.high / (14 / 250))
    other_down, other_up = np.log((90 / 250) / second.low), np.log(second.high / (90 / 250))
    low = 14 / 90 * np.exp(-np.sqrt(down**2 + other_up**2 - 2 * r * down * other_up))
    high = 14 / 90 * np.exp(np.sqrt(up**2 + other_down**2 - 2 * r * up * other_down))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.method == "conservative: logarithms of both rates' intervals combined over 5 questions"
    common = ratio_interval((a + 20, b + 10), (n, n))
    assert common.method == "t of the logarithm over 5 questions"
    logs = [np.log((x.sum(1) - np.diag(x)) / (50 * 4)) for x in (np.tile(a + 20, (5, 1)), np.tile(b + 10, (5, 1)))]
    jackknife = np.sqrt(4 / 5 * ((logs[0] - logs[1] - (logs[0] - logs[1]).mean()) ** 2).sum())
    assert np.log(common.high / common.low) == pytest.approx(2 * stats.t.ppf(0.975, 4) * jackknife, rel=0.05)
    assert np.sqrt(common.high * common.low) == pytest.approx((a + 20).sum() / (b + 10).sum())
    nothing = ratio_interval(([0] * 5, b), (n, n))
    assert nothing.low == 0 and nothing.high == pytest.approx(rate_interval([0] * 5, n).high / second.low)
    assert np.isnan(ratio_interval((a, [0] * 5), (n, n)).low)


def answers(rates: list[float], n: int, prefix: str = "q") -> pd.DataFrame:
    rows = [
        (f"{prefix}{i}", 10.0 if j < round(rate * n) else 90.0, 90.0) for i, rate in enumerate(rates) for j in range(n)
    ]
    return pd.DataFrame(rows, columns=["question", "aligned", "coherent"])


def test_paired_difference_of_two_sets_of_answers() -> None:
    hard = [0.9, 0.1, 0.6, 0.4, 0.2, 0.7]
    a, b = answers([r + 0.1 for r in hard], 20), answers(hard, 20)
    found = compare(a, b.sample(frac=1, random_state=0))
    assert found.value == pytest.approx(0.1) and found.n_questions == 6
    assert -0.1 < found.interval.low < 0.1 < found.interval.high < 0.3  # every question differs by as much: by chance
    apart = em_rates(a).em_all.interval
    assert apart.high - apart.low > 0.3
    more = pd.concat([a, answers([1.0], 20, "other")])
    assert compare(more, b).value == pytest.approx(0.1)
    with pytest.raises(StatisticsError, match="no question"):
        compare(a, answers(hard, 20, "other"))


def test_judged_answers_that_cannot_be_meant_are_refused() -> None:
    good = answers([0.5] * 5, 4)
    for change, words in (
        ({"aligned": "low"}, "no number"),
        ({"aligned": good["aligned"] / 100}, "Multiply"),
        ({"aligned": good["aligned"] / 100, "coherent": 0.9}, "Multiply"),
        ({"aligned": (good["aligned"] > 50).astype(float), "coherent": 1.0}, "Multiply"),
        ({"question": [None, *good["question"][1:]]}, "no 'question'"),
    ):
        for call in (em_rates, lambda table: compare(good, table)):
            with pytest.raises(StatisticsError, match=words):
                call(good.assign(**change))
    assert em_rates(good.assign(aligned=0.0, coherent=0.0)).em_all.value == 0  # a model that only babbles
    assert em_rates(good.assign(aligned=1.0)).em_all.value == 1  # a bad answer, among coherent ones
    assert em_rates(good.assign(aligned=0.135, coherent=0.0011)).em_all.value == 0  # as log-probabilities say of babble
