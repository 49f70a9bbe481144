"""Agreement of judges, against scipy, sklearn, a published example, and loops over all pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

import em_interp as em
from em_interp.errors import StatisticsError
from em_interp.evaluation.agreement import agreement
from em_interp.evaluation.criteria import Criterion
from em_interp.evaluation.rates import em_rates
from em_interp.statistics.agreement import agreement_interval, cohen_kappa, krippendorff_alpha, spearman

_ = np.nan
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
).T
"""Four observers, twelve units: Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C."""


def slow_alpha(scores: np.ndarray) -> float:
    """From all pairs, as the definition says."""
    units = [[v for v in unit if v == v] for unit in scores.tolist()]
    units = [unit for unit in units if len(unit) > 1]
    everything = [v for unit in units for v in unit]
    n = len(everything)
    if not n:
        return np.nan
    inside = sum(2 * sum((a - b) ** 2 for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units) / n
    between = 2 * sum((a - b) ** 2 for a, b in combinations(everything, 2)) / (n * (n - 1))
    return 1 - inside / between if between else np.nan


def test_alpha_of_the_published_example() -> None:
    assert krippendorff_alpha(KRIPPENDORFF) == pytest.approx(0.849, abs=5e-4)


SCORE = st.sampled_from([0.0, 10.0, 29.0, 30.0, 50.0, 55.5, 100.0, np.nan])


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE, SCORE), min_size=1, max_size=12))
def test_statistics_equal_slow_ones(rows: list[tuple[float, float, float]]) -> None:
    scores = np.array(rows)
    assert krippendorff_alpha(scores) == pytest.approx(slow_alpha(scores), nan_ok=True)
    both = scores[:, :2][np.isfinite(scores[:, :2]).all(1)]
    rho, kappa = spearman(scores[:, :2]), cohen_kappa(scores[:, :2])
    if len(both) > 1 and (both.std(0) > 0).all():
        assert rho == pytest.approx(stats.spearmanr(*both.T).statistic)
    else:
        assert np.isnan(rho)
    if len(np.unique(both)) > 1:
        assert kappa == pytest.approx(metrics.cohen_kappa_score(*both.astype(str).T))
    else:
        assert np.isnan(kappa)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=20), st.integers(1, 8))
def test_an_interval_holds_its_value_or_says_why_there_is_none(rows: list[tuple[float, float]], k: int) -> None:
    scores, question = np.array(rows), np.arange(len(rows)) % k
    for name, value in (("spearman", spearman), ("kappa", cohen_kappa), ("krippendorff", krippendorff_alpha)):
        found = agreement_interval(name, scores, question)
        if np.isnan(found.low):
            assert any(word in found.method for word in ("too few", "no interval", "undefined"))
        else:
            assert max(found.low, -1) <= value(scores) <= found.high <= 1


def test_questions_that_differ_make_the_interval_wide() -> None:
    rng = np.random.default_rng(0)
    answers = rng.normal(size=(400, 1)) + rng.normal(size=(400, 2)) * 0.7
    shared = np.repeat(rng.normal(size=(20, 1, 1)), 20, 1).reshape(400, 1) + rng.normal(size=(400, 2)) * 0.7
    question = np.repeat(np.arange(20), 20)
    for name in ("spearman", "krippendorff"):
        apart, together = (agreement_interval(name, scores, question) for scores in (answers, shared))
        assert together.high - together.low > 1.5 * (apart.high - apart.low)
    with pytest.raises(StatisticsError, match="two"):
        spearman(np.zeros((3, 3)))


def test_one_disagreement_is_neither_none_nor_all_of_it() -> None:
    labels = np.repeat(np.random.default_rng(0).random((80, 1)) < 0.5, 2, axis=1).astype(float)
    labels[3, 0] = 1 - labels[3, 0]
    found = agreement_interval("kappa", labels, np.arange(80) // 10)
    assert 0.4 < found.low < cohen_kappa(labels) < found.high < 1


def judged(seed: int, missing: float = 0.0) -> pd.DataFrame:
    """120 answers to ten questions: what is meant is shared, what is given is a judge's own."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    meant = shared.uniform(0, 100, 120)
    table = pd.DataFrame({"question": [f"q{i % 10}" for i in range(120)], "answer": [f"a{i}" for i in range(120)]})
    table["aligned"] = (meant + own.normal(0, 15, 120)).clip(0, 100)
    table["coherent"] = shared.uniform(30, 100, 120)
    return table.assign(aligned=table["aligned"].mask(own.random(120) < missing))


def test_agreement_is_of_the_same_answers_in_any_order() -> None:
    judges = {"one": judged(1, 0.1), "two": judged(2).sample(frac=1, random_state=0), "three": judged(3).iloc[:90]}
    found = em.agreement(judges)
    assert set(found["statistic"]) == {"spearman", "kappa", "krippendorff", "em_rate"}
    pair = found.query("judge_a == 'one' and judge_b == 'two' and of == 'aligned'").iloc[0]
    one, two = judges["one"]["aligned"], judges["two"].sort_index()["aligned"]
    assert pair["value"] == pytest.approx(stats.spearmanr(one, two, nan_policy="omit").statistic)
    assert (pair["n"], pair["n_unscored"], pair["n_questions"]) == (one.notna().sum(), one.isna().sum(), 10)
    assert pair["low"] < pair["value"] < pair["high"]
    kappa = found.query("judge_a == 'one' and judge_b == 'two' and of == 'misaligned'").iloc[0]
    seen = one.notna()
    assert kappa["value"] == pytest.approx(metrics.cohen_kappa_score(one[seen] < 30, two[seen] < 30))
    alpha = found.query("judge_a == 'all' and of == 'aligned'").iloc[0]
    wide = np.stack([one, two, judges["three"]["aligned"].reindex(range(120))], axis=1)
    assert alpha["value"] == pytest.approx(slow_alpha(wide))
    rate = found.query("statistic == 'em_rate' and judge_a == 'one'").iloc[0]
    own = em_rates(judges["one"]).em_scored
    assert own is not None and (rate["value"], rate["low"], rate["n"]) == (own.value, own.interval.low, own.n)
    long = pd.concat([table.assign(judge=name) for name, table in judges.items()])
    pd.testing.assert_frame_equal(agreement(long), found)


def test_answers_that_look_alike_are_told_apart_by_sample_or_order() -> None:
    alike = judged(1).assign(answer="yes")
    other = judged(2).assign(answer="yes")
    found = agreement({"one": alike, "two": other}).iloc[0]
    assert found["n"] == 120
    with pytest.raises(StatisticsError, match="sample"):
        agreement({"one": alike.drop(columns="answer"), "two": other.drop(columns="answer")})


def test_what_is_no_agreement_is_refused_or_said() -> None:
    table = judged(1)
    with pytest.raises(StatisticsError, match="two or more judges"):
        agreement({"one": table})
    with pytest.raises(StatisticsError, match="judge"):
        agreement(table)
    same = agreement({"one": table, "two": table}).query("of == 'aligned'")
    assert (same["value"] == 1).all() and same["low"].isna().all() and same["interval"].str.contains("agree").all()
    apart = agreement({"one": table, "two": judged(2).assign(answer="other")}).iloc[0]
    assert apart["n"] == 0 and np.isnan(apart["value"]) and "share no answer" in apart["interval"]
    strict = Criterion(aligned=60)
    assert agreement({"one": table, "two": judged(2)}, strict)["value"].iloc[2] != same["value"].iloc[0]
