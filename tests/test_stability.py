from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from em_interp.errors import LossSetError, SolutionError, StatisticsError, UsageError
from em_interp.landscape.curvature import curvature
from em_interp.landscape.landscape import Landscape
from em_interp.landscape.seeds import over_training_seeds
from em_interp.landscape.stability import (
    behavioural_stability,
    dispersion,
    stability_curve,
    stability_gap,
    stability_table,
    turned,
)
from em_interp.models.chat import encode_all
from em_interp.models.losses import response_loss
from em_interp.statistics import crossed_interval
from tests.test_landscape import MORE
from tests.theta import KINDS, make_theta
from tests.tiny_models import make_chat, talk, tokenizer

COLUMNS = ["solution", "adapter", "epsilon", "seed", "loss", "relative_increase_percent"]
ENCODED = encode_all(tokenizer(), [*MORE, talk("a cough", "the fox should rest")])


def learned(model, kind, steps=8, seed=0):
    """A theta that lowers the loss on MORE: a few gradient steps."""
    theta = make_theta(model, kind, seed, size=0.05)
    landscape = Landscape(model, ENCODED)
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    for _ in range(steps):
        if kind == "vector":
            leaves = [theta.vector.clone().requires_grad_()]
            live = replace(theta, vector=leaves[0])
        else:
            leaves = [x.clone().requires_grad_() for x in theta.b.values()]
            live = replace(theta, b=dict(zip(theta.b, leaves, strict=True)))
        loss = sum(landscape.differentiable(live)) / landscape.tokens.sum()
        grads = torch.autograd.grad(loss, leaves)
        size = torch.cat([g.flatten() for g in grads]).norm()
        moved = [(x - 1.0 * g / size).detach() for x, g in zip(leaves, grads, strict=True)]
        theta = (
            replace(theta, vector=moved[0])
            if kind == "vector"
            else replace(theta, b=dict(zip(theta.b, moved, strict=True)))
        )
    return theta


@pytest.fixture(scope="module")
def exact():
    """A float64 model, its landscape, and a solution of each kind."""
    model = make_chat(dtype=torch.float64)
    return model, Landscape(model, ENCODED), {kind: learned(model, kind) for kind in KINDS}


def slow_loss(model, theta):
    with theta.attached(model):
        return response_loss(model.hf, ENCODED, pad=0)


@pytest.mark.parametrize("kind", KINDS)
def test_table_equals_slow_losses_of_turned_thetas(exact, kind):
    model, landscape, solutions = exact
    curve = stability_curve(landscape, solutions[kind], epsilons=(0.0, 0.3, 1.0), n_seeds=2)
    table = stability_table([curve])
    assert set(COLUMNS) <= set(table.columns) and len(table) == 6
    theta = solutions[kind]
    trained, chat = slow_loss(model, theta), slow_loss(model, theta.scaled(0))
    for row in table.itertuples():
        again = theta.perturbed(row.epsilon, torch.Generator().manual_seed(row.seed))
        loss = slow_loss(model, again)
        assert row.loss == pytest.approx(loss, rel=1e-9)
        assert row.relative_increase_percent == pytest.approx(100 * (loss - trained) / (chat - trained), abs=1e-6)
        if row.epsilon == 0:
            assert row.loss == landscape.losses([theta, theta.scaled(0)]).mean[0]
            assert row.relative_increase_percent == 0.0
    assert sorted(set(table["seed"])) == [42, 43]


def test_perturbing_one_factor_of_a_lora(exact):
    _, landscape, solutions = exact
    theta = solutions["rank-1"]
    assert turned(theta, 0.5, 3, "A").b is not None
    for on, kept in (("A", "b"), ("B", "a")):
        away = turned(theta, 0.5, 3, on)
        assert all(torch.equal(x, getattr(theta, kept)[n]) for n, x in getattr(away, kept).items())
        assert away.norm == pytest.approx(theta.norm, rel=1e-9)
        curve = stability_curve(landscape, solutions["rank-1"], epsilons=(0.5,), n_seeds=2, on=on)
        assert stability_table([curve])["on"].eq(on).all() and curve.increase.shape == (1, 2)
    with pytest.raises(UsageError, match="factors A and B"):
        turned(solutions["vector"], 0.5, 0, "A")


def test_dispersion_and_gap(exact):
    model, landscape, solutions = exact
    other = learned(model, "vector", steps=6, seed=1)
    eps = (0.0, 0.2, 0.6)
    both = {"general": solutions["vector"], "narrow": other}
    general, narrow = (stability_curve(landscape, x, name, epsilons=eps, n_seeds=4) for name, x in both.items())
    table = stability_table([general, narrow])
    spread = dispersion(table)
    assert len(spread) == 6 and (spread["minimum"] <= spread["mean"]).all()
    row = spread[(spread["solution"] == "narrow") & (spread["epsilon"] == 0.6)].iloc[0]
    values = table[(table["solution"] == "narrow") & (table["epsilon"] == 0.6)]["relative_increase_percent"]
    assert row["sd"] == pytest.approx(values.std()) and row["low"] < row["mean"] < row["high"]

    gap = stability_gap(general, narrow)
    expected = narrow.relative_increase.mean(1) - general.relative_increase.mean(1)
    np.testing.assert_allclose(gap["gap"], expected)
    assert (gap["low"] <= gap["gap"]).all() and (gap["gap"] <= gap["high"]).all()
    assert gap[["gap", "low", "high"]].iloc[0].tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="own name"):
        stability_table([general, general])
    few = [replace(curve, questions=curve.questions.clip(max=3)) for curve in (general, narrow)]
    refused = stability_gap(*few)
    assert refused[["low", "high"]].isna().all(axis=None)
    assert (refused["interval"] == "too few questions for an interval (4)").all()
    with pytest.raises(UsageError, match="on one Landscape"):
        stability_gap(general, stability_curve(landscape, other, epsilons=(0.5,), n_seeds=4))


def test_gap_over_questions_and_seeds_equals_a_plain_loop(exact):
    _, landscape, solutions = exact
    curve = stability_curve(landscape, solutions["vector"], epsilons=(0.0, 0.4), n_seeds=3)
    rng = np.random.default_rng(0)
    n, questions = 14, np.array([0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 6])
    chat, tokens = rng.uniform(20, 40, n), rng.integers(5, 30, n)

    def made_up(scale):
        trained = chat - rng.uniform(5, 9, n)
        turned_nll = np.stack([np.tile(trained, (3, 1)), trained + scale * rng.lognormal(0, 0.6, (3, n))])
        return replace(curve, turned=turned_nll, trained=trained, chat=chat, tokens=tokens, questions=questions)

    general, narrow = made_up(1.0), made_up(3.0)
    gap = stability_gap(general, narrow)
    assert gap[["gap", "low", "high"]].iloc[0].tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="own name"):
        stability_table([general, general])
    values = np.zeros((7, 3))  # of each question, as the derivative of the gap with respect to the question's weight
    for q in range(7):
        for s in range(3):
            for sign, c in ((1, narrow), (-1, general)):
                own, step = questions == q, 1e-6

                def increase(weight, c=c, own=own, s=s):
                    w = np.where(own, weight, 1.0)
                    return 100 * (w * (c.turned[1, s] - c.trained)).sum() / (w * (c.chat - c.trained)).sum()

                slope = (increase(1 + step) - increase(1 - step)) / (2 * step)
                values[q, s] += sign * (increase(1) + 7 * slope)
    expected = crossed_interval(values)
    assert (gap["low"].iloc[1], gap["high"].iloc[1]) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert gap["gap"].iloc[1] == pytest.approx(values.mean()) and gap["low"].iloc[1] > 0
    assert gap["interval"].iloc[1] == "Student's with skewness over 7 questions and 3 seeds"


def test_behaviour_under_perturbation():
    model = make_chat()
    theta = make_theta(model, "vector")
    seen = []

    def evaluate(attached):
        with torch.no_grad():
            seen.append(float(attached.hf(torch.tensor([[5, 6, 7]])).logits.sum()))
        bad = len(seen) % 2
        rows = [{"question": f"q{i}", "aligned": 10.0 if bad else 90.0, "coherent": 90.0} for i in range(6)]
        return pd.DataFrame(rows)

    table = behavioural_stability(model, {"general": theta}, evaluate, epsilons=(0.0, 0.9), n_seeds=2)
    assert table["em_rate"].tolist() == [1.0, 0.0, 1.0, 0.0] and {"em_low", "n", "seed"} <= set(table.columns)
    assert seen[0] == seen[1] and len({*seen}) == 3  # eps = 0 twice the trained theta, then two turned ones


@pytest.mark.parametrize("kind", KINDS[:2])
def test_curvature_equals_the_exact_hessian(exact, kind):
    model, landscape, solutions = exact
    theta = solutions[kind]
    if kind == "vector":
        x = theta.vector

        def solution(flat):
            return replace(theta, vector=flat)

        pieces = [slice(0, 32)]
    else:
        (name,) = theta.modules
        x = torch.cat([theta.a[name].flatten(), theta.b[name].flatten()])
        n_a = theta.a[name].numel()
        pieces = [slice(0, n_a), slice(n_a, len(x))]

        def solution(flat):
            a, b = flat[:n_a].view_as(theta.a[name]), flat[n_a:].view_as(theta.b[name])
            return replace(theta, a={name: a}, b={name: b})

    def loss(flat):
        return sum(landscape.differentiable(solution(flat))) / landscape.tokens.sum()

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    rows = torch.eye(len(x), dtype=x.dtype)
    hessian = torch.stack([torch.autograd.grad(g, leaf, row, retain_graph=True)[0] for row in rows])

    found = curvature(landscape, theta, n_probes=150)
    assert found.loss == pytest.approx(slow_loss(model, theta), rel=1e-9)
    assert found.along == pytest.approx(float(g.detach() @ x), rel=1e-6)  # norms are float32 inside
    expected_across, expected_trace = 0.0, 0.0
    for piece in pieces:
        unit = x[piece] / x[piece].norm()
        block = hessian[piece, piece]
        trace = float(block.trace() - unit @ block @ unit)
        scale = theta.alpha if kind == "vector" else 1.0
        expected_trace += trace / scale**2
        expected_across += trace * float(x[piece].norm()) ** 2 / (len(unit) - 1)
    row = found.columns()
    assert row["across_low"] < expected_across < row["across_high"]
    assert row["trace_low"] < expected_trace < row["trace_high"]
    if kind == "vector":  # the interval says something
        assert row["across_high"] - row["across_low"] < abs(expected_across)
    for k in (0, 7):  # one probe, exactly
        away = turned(theta, 1.0, k)
        y = away.vector if kind == "vector" else torch.cat([away.a[name].flatten(), away.b[name].flatten()])
        assert found.across[k] == pytest.approx(float(y @ hessian @ y), rel=1e-5)
    # and it predicts the small-eps end of the sampled curve
    sampled = stability_curve(landscape, theta, epsilons=(0.0, 0.02), n_seeds=100)
    predicted = found.predicted((0.0, 0.02), sampled.gain)
    assert predicted["predicted_percent"][0] == 0
    values = sampled.relative_increase[1]
    error = values.std() / math.sqrt(len(values))
    assert values.mean() == pytest.approx(predicted["predicted_percent"][1], abs=3 * error + 0.01)


def test_curvature_of_one_factor_and_all_modules(exact):
    _, landscape, solutions = exact
    both = curvature(landscape, solutions["all-modules"], n_probes=2)
    assert np.isfinite(both.across).all() and both.columns()["n_probes"] == 2
    only = curvature(landscape, solutions["rank-1"], n_probes=2, on="B")
    assert only.loss == pytest.approx(curvature(landscape, solutions["rank-1"], n_probes=2).loss)
    with pytest.raises(StatisticsError, match="at least two"):
        curvature(landscape, solutions["vector"], n_probes=1).columns()
    with pytest.raises(SolutionError, match=r"in \[0, 1\]"):
        both.predicted((1.5,), 1.0)


def test_refusals(exact):
    model, landscape, solutions = exact
    vector = solutions["vector"]
    for eps in (-0.1, 1.2, math.nan):
        with pytest.raises(SolutionError, match=r"in \[0, 1\]"):
            stability_curve(landscape, vector, epsilons=(0.0, eps), n_seeds=2)
    with pytest.raises(UsageError, match="at least two"):
        stability_curve(landscape, vector, n_seeds=1)
    with pytest.raises(SolutionError, match="is zero"):
        stability_curve(landscape, vector.scaled(0), n_seeds=2)
    with pytest.raises(LossSetError, match="does not lower the loss"):
        worse = vector.scaled(-1)
        stability_curve(landscape, worse, epsilons=(0.5,), n_seeds=2)
    with pytest.raises(SolutionError, match="cannot be compared"):
        stability_curve(landscape, replace(vector, base="other/model"), n_seeds=2)
    assert model.active is None


def test_intervals_over_training_seeds():
    rows = [{"training_seed": s, "epsilon": e, "gap": 2.0 * e + s} for s in (0, 1, 2) for e in (0.2, 0.8)]
    found = over_training_seeds(pd.DataFrame(rows), ["epsilon"], "gap")
    half = 4.302652729911275 / math.sqrt(3)  # t quantile at 2 degrees of freedom, sd 1
    assert found["mean"].tolist() == pytest.approx([1.4, 2.6])
    assert (found["high"] - found["mean"]).tolist() == pytest.approx([half, half])
    with pytest.raises(UsageError, match="several rows a training seed"):
        over_training_seeds(pd.DataFrame(rows), ["training_seed"], "gap")
    with pytest.raises(StatisticsError, match="at least two"):
        over_training_seeds(pd.DataFrame(rows[:2]), ["epsilon"], "gap")
