from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from em_interp.errors import SolutionError, UsageError
from em_interp.landscape.efficiency import (
    EfficiencyCurve,
    efficiency_curves,
    efficiency_table,
    lead_at_equal_norm,
    optimum,
)
from em_interp.landscape.landscape import Landscape, Losses
from tests.test_stability import ENCODED, learned, slow_loss
from tests.theta import KINDS
from tests.tiny_models import make_chat

COLUMNS = ["solution", "adapter", "norm", "scale", "loss", "loss_reduction_per_norm2", "loss_over_norm2"]


@pytest.fixture(scope="module")
def exact():
    model = make_chat(dtype=torch.float64)
    return model, Landscape(model, ENCODED), {kind: learned(model, kind) for kind in KINDS}


def test_table_equals_slow_losses_and_ratios(exact):
    model, landscape, solutions = exact
    curves = efficiency_curves(landscape, solutions, (0.0, 1.0, 1.5))
    table = efficiency_table(curves)
    assert set(COLUMNS) <= set(table.columns) and len(table) == 9
    chat = slow_loss(model, solutions["vector"].scaled(0))
    for (name, solution), rows in zip(solutions.items(), np.split(np.arange(9), 3), strict=True):
        for row in table.iloc[rows].itertuples():
            theta = solution.scaled(row.scale)
            loss = slow_loss(model, theta)
            assert row.loss == pytest.approx(loss, rel=1e-9)
            assert row.norm == pytest.approx(theta.norm, rel=1e-9)
            assert row.raw_norm == pytest.approx(theta.paper_norms()["raw_norm"])
            assert row.loss_low <= row.loss <= row.loss_high and row.low <= row.loss_reduction <= row.high
            if row.scale == 0:
                assert row.loss == pytest.approx(chat, rel=1e-12) and row.loss_reduction == pytest.approx(0, abs=1e-12)
                assert math.isnan(row.loss_over_norm2) and math.isnan(row.loss_reduction_per_norm2)
            else:
                assert row.loss_over_norm2 == pytest.approx(loss / theta.norm**2, rel=1e-9)
                assert row.loss_reduction_per_norm2 == pytest.approx((chat - loss) / theta.norm**2, rel=1e-6)
        assert set(table.iloc[rows]["solution"]) == {name}
        unscaled = landscape.losses([solution]).mean[0]
        assert table.iloc[rows]["loss"].iloc[1] == pytest.approx(unscaled, rel=1e-12)


def made_up(scales, loss_of_norm, norm_of=2.0):
    """A curve whose loss is known exactly, with the same shape for every question."""
    model = make_chat()
    solution = learned(model, "vector", steps=1)
    solution = solution.scaled(norm_of / solution.norm)
    scales = np.array(scales)
    per_token = np.array([loss_of_norm(norm_of * s) for s in scales])
    tokens, questions = np.array([3, 5, 2, 4, 4, 6]), np.arange(6)
    losses = Losses(per_token[:, None] * tokens, tokens, questions)
    return EfficiencyCurve("general", solution, scales, losses, losses)


def test_optimum_is_the_parabola_s_and_says_when_it_is_at_the_edge():
    curve = made_up((0.0, 0.5, 1.0, 1.7, 2.0), lambda n: (n - 2.3) ** 2 + 0.5)
    found = optimum(curve)
    assert (found.norm, found.loss) == pytest.approx((2.3, 0.5), rel=1e-6) and not found.at_edge
    assert (found.norm_low, found.norm_high, found.loss_low) == pytest.approx((2.3, 2.3, 0.5), rel=1e-6)
    few = replace(curve, losses=Losses(curve.losses.nll[:, :4], curve.losses.tokens[:4], curve.losses.questions[:4]))
    assert optimum(few).norm == found.norm and np.isnan(optimum(few).norm_low)
    falling = optimum(made_up((0.0, 0.5, 1.0), lambda n: 5 - n))
    assert falling.at_edge and (falling.norm, falling.loss) == pytest.approx((2.0, 3.0), rel=1e-6)
    with pytest.raises(UsageError, match="three rising"):
        optimum(made_up((0.0, 1.0), lambda n: n))
    with pytest.raises(UsageError, match="three rising"):
        optimum(made_up((1.0, 0.5, 0.0), lambda n: n))


def test_lead_at_equal_norm(exact):
    model, landscape, solutions = exact
    general = solutions["vector"]
    narrow = learned(model, "vector", steps=3, seed=2)
    table = lead_at_equal_norm(landscape, general, narrow, (0.5, 1.0))
    for row in table.itertuples():
        assert row.norm == pytest.approx(row.relative_norm * (general.norm + narrow.norm) / 2)
        losses = [slow_loss(model, c.scaled(row.norm / c.norm)) for c in (general, narrow)]
        assert (row.loss_general, row.loss_narrow) == pytest.approx(losses, rel=1e-9)
        assert row.lead == pytest.approx(losses[1] - losses[0]) and row.low <= row.lead <= row.high
    flipped = lead_at_equal_norm(landscape, narrow, general, (0.5, 1.0))
    np.testing.assert_allclose(flipped["lead"], -table["lead"])
    np.testing.assert_allclose(flipped["low"], -table["high"])
    assert lead_at_equal_norm(landscape, general, general, (1.0,))[["lead", "low", "high"]].eq(0).all(axis=None)
    with pytest.raises(UsageError, match="one kind of solution"):
        lead_at_equal_norm(landscape, general, solutions["rank-1"])
    with pytest.raises(UsageError, match="norms > 0"):
        lead_at_equal_norm(landscape, general, narrow, (0.0, 1.0))
    with pytest.raises(UsageError, match="at least one"):
        efficiency_curves(landscape, {})
    with pytest.raises(SolutionError, match="'narrow' is zero"):
        lead_at_equal_norm(landscape, general, narrow.scaled(0.0))
    with pytest.raises(SolutionError, match="'general' is zero"):
        efficiency_curves(landscape, {"general": general.scaled(0.0)})
