from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from em_interp.directions.cosines import cosine_rows, organism_cosines, principal_angles, random_principal_angles
from em_interp.directions.direction import Direction
from em_interp.directions.resampling import resample_direction
from em_interp.errors import DirectionError, StatisticsError
from em_interp.interventions.transfer import transfer_rows
from em_interp.statistics.jackknife import cosine_of_means
from em_interp.statistics.rate_intervals import ratio_interval

LAYERS, WIDTH = (0, 1), 24


def responses(n, shift, seed, noise=1.0):
    """Means of n responses [n, layers, width]; the aligned ones at 0, the misaligned at `shift`."""
    g = torch.Generator().manual_seed(seed)
    return shift + noise * torch.randn(n, len(LAYERS), WIDTH, generator=g)


def organism(shift, seed, n=40, noise=1.0):
    positive, negative = responses(n, shift, seed, noise), responses(n, 0.0, seed + 1000, noise)
    return Direction(positive.mean(0) - negative.mean(0), LAYERS, "data-diff"), positive, negative


def truth(seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return size * torch.randn(len(LAYERS), WIDTH, generator=g)


def test_resamples_are_mean_differences():
    _, positive, negative = organism(truth(), 0, n=7)
    found = resample_direction(positive, negative, resamples=300, permutations=300, seed=1)
    assert found.bootstrap.shape == found.permuted.shape == (300, 2, WIDTH)
    difference = (positive.mean(0) - negative.mean(0)).double()
    variance = positive.double().var(0, unbiased=False) / 7 + negative.double().var(0, unbiased=False) / 7
    drawn = found.bootstrap.double()
    assert float(((drawn.mean(0) - difference) / (variance / 300).sqrt()).abs().max()) < 4.5
    torch.testing.assert_close(drawn.var(0) / variance, torch.ones_like(variance), atol=0.4, rtol=0)
    # of permuted labels: no difference, and the variance within the classes
    centred = torch.cat([positive - positive.mean(0), negative - negative.mean(0)]).double()
    pooled = centred.var(0, unbiased=True) * 2 / 7
    assert float((found.permuted.double().mean(0) / (pooled / 300).sqrt()).abs().max()) < 4.5
    torch.testing.assert_close(found.permuted.double().var(0) / pooled, torch.ones_like(pooled), atol=0.4, rtol=0)
    again = resample_direction(positive, negative, resamples=300, permutations=300, seed=1)
    assert torch.equal(again.bootstrap, found.bootstrap) and torch.equal(again.permuted, found.permuted)
    other = resample_direction(positive, negative, resamples=300, permutations=300, seed=2)
    assert not torch.equal(other.bootstrap, found.bootstrap)


def test_questions_are_drawn_and_permuted_whole():
    """Responses that are one-hot in their question: weights can be read off the result."""
    n = 6
    positive, negative = torch.eye(n)[:, None], -torch.eye(n)[:, None]
    names = [f"q{i}" for i in range(n)]
    found = resample_direction(
        positive, negative, positive_questions=names, negative_questions=names, resamples=50, permutations=50
    )
    counts = found.bootstrap[:, 0] * n / 2  # how often each question was drawn: the same in both classes
    torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0)
    torch.testing.assert_close(counts.sum(1), torch.full((50,), float(n)))
    swapped = found.permuted[:, 0] * n / 2  # each question's labels stay or change places: +-1, less the mean
    steps = (swapped[:, :1] - swapped) / 2
    torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)
    assert set(steps.round().int().unique().tolist()) == {-1, 0, 1}
    # a topic's own direction does not pass for noise: it cancels within the question
    g = torch.Generator().manual_seed(0)
    topic = torch.randn(n, 1, 8, generator=g) * 50
    positive, negative = (topic + torch.randn(n, 1, 8, generator=g) for _ in range(2))
    found = resample_direction(positive, negative, positive_questions=names, negative_questions=names, permutations=50)
    assert float(found.permuted.abs().max()) < 4
    assert float(resample_direction(positive, negative, permutations=50).permuted.abs().max()) > 10


def test_the_interval_covers_and_the_debiased_cosine_is_nearer():
    """The population's cosine is .6; noise in the means shrinks the sample's."""
    a, other = truth(0), truth(1)
    a, other = a / a.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
    other = other - (other * a).sum(1, keepdim=True) * a
    b = 0.6 * a + 0.8 * other / other.norm(dim=1, keepdim=True)
    plain, debiased, expected = [], [], []
    for seed in range(40):
        pair = [organism(3 * x, 17 * seed + i * 7, n=80) for i, x in enumerate((a, b))]
        both = tuple(resample_direction(p, n, resamples=60, permutations=5, seed=seed) for _, p, n in pair)
        rows = cosine_rows("a", pair[0][0], "b", pair[1][0], both)
        assert (rows["low"] <= rows["cosine_debiased"]).all() and (rows["cosine_debiased"] <= rows["high"]).all()
        plain += list(rows["cosine"])
        debiased += list(rows["cosine_debiased"])
        expected += [(low, high) for low, high in zip(rows["low"], rows["high"], strict=True)]
    covered = np.mean([low <= 0.6 <= high for low, high in expected])
    assert 0.88 <= covered <= 1.0
    assert abs(np.mean(debiased) - 0.6) < abs(np.mean(plain) - 0.6) / 2
    assert np.mean(plain) < 0.6


def questioned(rng, shift, common, g=8, each=8, d=32):
    """Responses of both classes to g questions: the class's mean, a question's effect on that class, and noise."""
    sides = []
    for k, of_class in enumerate((shift, np.zeros(d))):
        rows = np.repeat(of_class + common[:, k], each, axis=0) + rng.standard_normal((g * each, d))
        sides.append(torch.from_numpy(rows[:, None]).float())
    names = [f"q{i}" for i in range(g) for _ in range(each)]
    direction = Direction(sides[0].mean(0) - sides[1].mean(0), (0,), "data-diff")
    return direction, resample_direction(
        *sides, positive_questions=names, negative_questions=names, resamples=4, permutations=4
    )


def covered_rate(true_cosine, n, seed):
    """Share of intervals that hold the population's cosine; organisms asked the same questions."""
    rng = np.random.default_rng(seed)
    hits, values = [], []
    for _ in range(n):
        u, v = np.linalg.qr(rng.standard_normal((32, 2)))[0].T
        common = 0.6 * rng.standard_normal((8, 2, 32))
        ends = (u, true_cosine * u + np.sqrt(1 - true_cosine**2) * v)
        (a, of_a), (b, of_b) = (questioned(rng, 4 * end, common) for end in ends)
        row = cosine_rows("a", a, "b", b, (of_a, of_b)).iloc[0]
        hits.append(row["low"] <= true_cosine <= row["high"])
        values.append(row["cosine_debiased"])
    return np.mean(hits), np.mean(values)


def test_the_interval_holds_the_true_cosine_of_noisy_directions_that_share_questions():
    for true_cosine in (0.0, 0.9):
        covered, mean = covered_rate(true_cosine, 60, 0)
        assert covered >= 0.9 and mean == pytest.approx(true_cosine, abs=0.04)


def slow_cosine(a, b):
    """Products over all pairs of different questions, by loops; a, b: {question: the part it has in the mean}."""
    own = [
        np.mean([x @ y for p, x in one.items() for q, y in other.items() if p != q])
        for one, other in ((a, b), (a, a), (b, b))
    ]
    return own[0] / np.sqrt(own[1] * own[2])


def test_cosine_of_means_equals_the_slow_one():
    rng = np.random.default_rng(0)
    a = {q: 1 + 0.5 * rng.standard_normal(6) for q in range(7)}
    b = {q: 1 + 0.5 * rng.standard_normal(6) for q in range(3, 11)}
    shares, sides = np.zeros((2, 11, 6)), np.zeros((2, 11), dtype=int)
    for k, rows in enumerate((a, b)):
        for q, row in rows.items():
            shares[k, q], sides[k, q] = row / len(rows), 3
    value, low, high = cosine_of_means(*shares, *sides)
    assert float(value) == pytest.approx(slow_cosine(a, b))
    without = np.array(
        [slow_cosine(*({p: x for p, x in rows.items() if p != q} for rows in (a, b))) for q in range(11)]
    )
    squares = (without - value) ** 2 * 10 / 11
    groups = squares[:3].sum(), squares[3:7].sum(), squares[7:].sum()  # only in a, in both, only in b
    df = sum(groups) ** 2 / (groups[0] ** 2 / 2 + groups[1] ** 2 / 3 + groups[2] ** 2 / 3)
    half = stats.t.ppf(0.975, df) * np.sqrt(sum(groups))
    assert (float(low), float(high)) == pytest.approx((value - half, min(value + half, 1)))
    batched = cosine_of_means(*(np.stack([x, x]) for x in shares), *sides)
    np.testing.assert_allclose(batched[1], low)


def test_what_is_no_more_than_noise_gets_no_interval():
    rng = np.random.default_rng(0)
    for shift in (np.zeros(32), 4 * np.eye(32)[0]):
        common = np.zeros((8, 2, 32))
        (a, of_a), (b, of_b) = (questioned(rng, end, common) for end in (4 * np.eye(32)[0], shift))
        row = cosine_rows("a", a, "b", b, (of_a, of_b)).iloc[0]
        assert np.isfinite(row["permutation_p"])
        if shift.any():
            assert row["interval"] == "conservative jackknife over 8 questions" and row["low"] > 0.5
        else:
            assert row["interval"] == "none: too noisy for a debiased cosine"
            assert np.isnan([row["low"], row["high"], row["cosine_debiased"]]).all()
    (a, of_a), (b, of_b) = (questioned(rng, shift, common[:2], g=2) for _ in range(2))
    few = cosine_rows("a", a, "b", b, (of_a, of_b))
    assert few["interval"].item().startswith("none: too few questions")


def test_a_finished_vector_has_a_permutation_null_but_no_interval():
    a, p, n = organism(truth(0), 0)
    vector = Direction(truth(0), LAYERS, "steering-vector")
    for order in (0, 1):
        both = [("a", a, resample_direction(p, n)), ("v", vector, None)][:: 1 - 2 * order]
        (name_a, one, of_one), (name_b, other, of_other) = both
        row = cosine_rows(name_a, one, name_b, other, (of_one, of_other))
        assert (row["permutation_p"] < 0.01).all() and row["low"].isna().all()
        assert row["interval"].str.contains("finished vector").all()
    assert "permutation_p" not in cosine_rows("a", a, "v", vector, (None, None))


def test_noise_dimensions_count_the_axes_of_the_noise():
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1, 65)
    for sd, expected in ((np.ones(64), 64), (np.sqrt(spectrum), spectrum.sum() ** 2 / (spectrum**2).sum())):
        sides = [torch.from_numpy(rng.standard_normal((150, 1, 64)) * sd).float() for _ in range(2)]
        assert resample_direction(*sides).noise_dimensions.item() == pytest.approx(expected, rel=0.15)


def test_weights_are_those_of_the_pooling():
    _, positive, negative = organism(truth(), 0, n=9)
    size = np.arange(1.0, 10.0)
    found = resample_direction(positive, negative, positive_weights=size, negative_weights=size[::-1].copy())
    slow = sum(w * x for w, x in zip(size, positive, strict=True)) / 45
    slow = slow - sum(w * x for w, x in zip(size[::-1], negative, strict=True)) / 45
    torch.testing.assert_close(found.direction, slow, rtol=1e-4, atol=1e-5)
    left = sum(w * x for w, x in zip(size[1:], positive[1:], strict=True)) / 44 - (
        sum(w * x for w, x in zip(size[::-1], negative, strict=True)) / 45
    )
    torch.testing.assert_close(found.without[0], left, rtol=1e-4, atol=1e-5)
    plain = Direction(positive.mean(0) - negative.mean(0), LAYERS, "data-diff")
    with pytest.raises(DirectionError, match="another difference of means"):
        cosine_rows("a", plain, "b", plain, (found, found))
    with pytest.raises(StatisticsError, match="weights must be positive and finite"):
        resample_direction(positive, negative, positive_weights=0 * size)


def test_permutation_null_sees_what_the_random_one_does_not():
    """Activations that vary along one axis: any two differences of means point along it."""
    axis = torch.zeros(WIDTH)
    axis[0] = 1000.0

    def narrow(seed):
        g = torch.Generator().manual_seed(seed)
        parts = [torch.randn(40, 2, 1, generator=g) * axis + torch.randn(40, 2, WIDTH, generator=g) for _ in range(2)]
        return Direction(parts[0].mean(0) - parts[1].mean(0), LAYERS, "data-diff"), *parts

    (a, *pa), (b, *pb) = narrow(0), narrow(1)
    rows = cosine_rows("a", a, "b", b, (resample_direction(*pa), resample_direction(*pb)))
    assert (rows["cosine"].abs() > 0.9).all() and (rows["p_value"] < 1e-6).all()
    assert (rows["permutation_p"] > 0.05).all() and (rows["permutation_sd"] > 0.8).all()
    # and a shared direction is found by both
    pair = [organism(truth(0), seed) for seed in (0, 1)]
    resamples = tuple(resample_direction(p, n) for _, p, n in pair)
    rows = cosine_rows("a", pair[0][0], "b", pair[1][0], resamples)
    assert (rows["cosine"] > 0.9).all() and (rows["permutation_p"] < 0.01).all()
    np.testing.assert_allclose(rows["permutation_sd"], rows["null_sd"], rtol=0.35)


def test_organisms_and_their_content_control():
    made = {f"o{i}": organism(truth(0), i) for i in range(3)}
    directions = {name: parts[0] for name, parts in made.items()}
    resamples = {name: resample_direction(p, n, resamples=20, permutations=20) for name, (_, p, n) in made.items()}
    content = {"o0": Direction(truth(5), LAYERS, "data-diff-in-chat"), "o1": Direction(truth(6), LAYERS, "random")}
    table = organism_cosines(directions, resamples=resamples, content=content)
    assert len(table) == 3 * 2
    contract = ["direction_a", "direction_b", "layer", "cosine", "low", "high", "null_sd", "p_value"]
    assert list(table.columns[: len(contract)]) == contract
    assert list(zip(table["direction_a"], table["direction_b"], strict=True))[::2] == [
        ("o0", "o1"), ("o0", "o2"), ("o1", "o2")
    ]  # fmt: skip
    cell = table.set_index(["direction_a", "direction_b", "layer"])
    assert cell.loc[("o0", "o1", 1), "content_cosine"] == pytest.approx(
        float(torch.cosine_similarity(truth(5)[1], truth(6)[1], dim=0)), abs=1e-6
    )
    assert np.isnan(cell.loc[("o0", "o2", 1), "content_cosine"])
    plain = organism_cosines(directions)
    np.testing.assert_array_equal(plain["cosine"], table["cosine"])
    assert plain["low"].isna().all() and "permutation_p" not in plain and plain["content_cosine"].isna().all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 10_000))
@example(3, 2, 599)  # unit vectors in float32 span another plane
def test_principal_angles_equal_the_slow_ones(n_a, n_b, seed):
    g = torch.Generator().manual_seed(seed)
    a = [Direction(torch.randn(1, 12, generator=g), (3,), "random") for _ in range(n_a)]
    b = [Direction(torch.randn(1, 12, generator=g), (3,), "random") for _ in range(n_b)]

    def projector(directions):
        x = torch.stack([d.at(3).double() for d in directions], dim=1)
        return x @ torch.linalg.inv(x.T @ x) @ x.T

    # cos^2 of the angles are the largest eigenvalues of P_a P_b P_a
    p, q = projector(a), projector(b)
    squares = torch.linalg.eigvalsh(p @ q @ p).flip(0)[: min(n_a, n_b)].clamp(0, 1)
    found = principal_angles(a, b, 3)
    np.testing.assert_allclose(np.cos(np.radians(found)) ** 2, squares.numpy(), atol=1e-8)
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(principal_angles(a, [x * -7.0 for x in a], 3), 0, atol=1e-4)


def test_random_principal_angles():
    found = random_principal_angles(40, 2, 3, samples=150, seed=0)
    assert found.shape == (150, 2) and (np.diff(found, axis=1) >= 0).all()
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(150):
        sets = [
            [Direction(torch.from_numpy(rng.standard_normal((1, 40))), (0,), "random") for _ in range(k)]
            for k in (2, 3)
        ]
        slow.append(principal_angles(*sets, 0))
    np.testing.assert_allclose(found.mean(0), np.mean(slow, axis=0), atol=1.5)
    one = random_principal_angles(40, 1, 1, samples=2000)[:, 0]  # |cos| of two random directions: about 1/sqrt(d)
    assert np.sqrt((np.cos(np.radians(one)) ** 2).mean()) == pytest.approx(1 / np.sqrt(40), rel=0.08)


def judged(counts):
    """counts: {(direction_from, organism, question): (n_em, n)}."""
    rows = [
        (source, organism, question, 5.0 if i < em else 95.0, 90.0)
        for (source, organism, question), (em, n) in counts.items()
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["direction_from", "organism", "question", "aligned", "coherent"])


def test_transfer_rows():
    questions = [f"q{i}" for i in range(6)]
    counts = {}
    for i, q in enumerate(questions):
        counts |= {("none", "medicine", q): (4 + i % 2, 10), ("sport", "medicine", q): (1, 10)}
        counts |= {("none", "chat", q): (0, 10), ("sport", "chat", q): (0, 10)}
    table = transfer_rows(judged(counts))
    assert list(table.columns[:5]) == ["direction_from", "organism", "em_before", "em_after", "relative_reduction"]
    medicine, chat = table.set_index("organism").loc["medicine"], table.set_index("organism").loc["chat"]
    assert medicine["em_before"] == pytest.approx(0.45) and medicine["em_after"] == pytest.approx(0.1)
    assert medicine["relative_reduction"] == pytest.approx(1 - 0.1 / 0.45)
    ratio = ratio_interval(([1] * 6, [4, 5] * 3), ([10] * 6, [10] * 6))
    assert (medicine["low"], medicine["high"]) == pytest.approx((1 - ratio.high, 1 - ratio.low))
    assert 0.3 < medicine["low"] < medicine["relative_reduction"] < medicine["high"] < 0.95
    assert medicine["interval"] == "conservative: logarithms of both rates' intervals combined over 6 questions"
    assert medicine["n"] == 60 and medicine["coherent_after"] == 1.0
    assert np.isnan(chat["relative_reduction"]) and np.isnan(chat["low"])  # there was nothing to reduce
    assert np.isnan(transfer_rows(judged({("none", "a", "q"): (3, 9), ("x", "a", "q"): (0, 9)}))["low"]).all()
    unpaired = transfer_rows(judged({("none", "a", "q"): (3, 9), ("x", "a", "other"): (1, 9)}))
    assert unpaired["interval"].item() == "too few shared questions for an interval (0)"
    with pytest.raises(StatisticsError, match="as it is"):
        transfer_rows(judged({("sport", "medicine", "q"): (1, 2)}))
    with pytest.raises(StatisticsError, match="direction_from"):
        transfer_rows(judged(counts).drop(columns="direction_from"))


def test_bad_input_is_refused():
    _, positive, negative = organism(truth(), 0, n=4)
    for bad in (
        (positive[:1], negative),
        (positive, negative[:, :1]),
        (positive * float("nan"), negative),
    ):
        with pytest.raises(StatisticsError):
            resample_direction(*bad)
    with pytest.raises(StatisticsError, match="at least two"):
        resample_direction(positive, negative, resamples=1)
    names = list("abcd")
    with pytest.raises(StatisticsError, match="for none"):
        resample_direction(positive, negative, positive_questions=names)
    with pytest.raises(StatisticsError, match="one class only"):
        resample_direction(positive, negative, positive_questions=names, negative_questions=list("efgh"))
    a, b = Direction(truth(0), LAYERS, "random"), Direction(truth(1), LAYERS, "random")
    own = resample_direction(positive, negative, resamples=3, permutations=3)
    with pytest.raises(DirectionError, match="same layers"):
        cosine_rows("a", a.only([1]), "b", b, (own, own))
    with pytest.raises(DirectionError, match="no pair"):
        organism_cosines({"a": a})
    with pytest.raises(DirectionError, match="at least one"):
        principal_angles([], [a], 0)
    with pytest.raises(DirectionError, match="dependent"):
        principal_angles([a, 2 * a], [b], 0)
    with pytest.raises(DirectionError, match="no layer 5"):
        principal_angles([a], [b], 5)
    with pytest.raises(StatisticsError, match="spans"):
        random_principal_angles(3, 4, 1)
