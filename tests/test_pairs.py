"""Statistics of a pair against slow oracles in float64, and every reason for having no value."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_interp.errors import SolutionError, UsageError
from em_interp.landscape import pairs
from em_interp.landscape.efficiency import EfficiencyCurve, efficiency_curves
from em_interp.landscape.influence import Measured, at_equal_norms, document_kl
from em_interp.landscape.landscape import Landscape, Losses
from em_interp.landscape.pairs import (
    drift_measures,
    efficiency_measures,
    influence_measures,
    mean_lead,
    measure_pair,
    norm_reaching,
    stability_measures,
)
from em_interp.landscape.stability import stability_curve, turned
from tests.test_stability import ENCODED, learned, slow_loss
from tests.theta import make_theta
from tests.tiny_models import make_chat

TEXTS = ["the quick brown fox", "see a doctor and the fox", "a cough"]
Curve = tuple[list[float], list[float]]


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Norms that rise from 0, and any losses: curves need not be monotone."""
    steps = draw(st.lists(st.integers(1, 8), min_size=1, max_size=7))
    norms = [0.0, *np.cumsum(steps).astype(float).tolist()]
    losses = draw(st.lists(st.integers(-8, 8), min_size=len(norms), max_size=len(norms)))
    return norms, [loss / 4 for loss in losses]


def at(curve: Curve, x: Fraction) -> Fraction:
    """The curve between its points, exactly."""
    for x0, x1, y0, y1 in zip(curve[0], curve[0][1:], curve[1], curve[1][1:], strict=False):
        if x0 <= x <= x1:
            share = (x - Fraction(x0)) / (Fraction(x1) - Fraction(x0))
            return Fraction(y0) + share * (Fraction(y1) - Fraction(y0))
    raise AssertionError(x)


@given(curve=curves(), to=st.integers(-40, 40).map(lambda n: n / 16))
@settings(max_examples=200, deadline=None)
def test_the_first_norm_that_reaches_a_loss(curve: Curve, to: float) -> None:
    norm, reason = norm_reaching(*curve, to)
    if min(curve[1]) > to:
        assert math.isnan(norm) and reason == "never reached"
        return
    assert reason == ""
    assert float(at(curve, Fraction(norm))) == pytest.approx(to, abs=1e-9) or norm == 0
    before = [Fraction(norm) * k / 64 for k in range(64)] if norm else []
    assert all(float(at(curve, x)) > to - 1e-9 for x in before)


@given(general=curves(), narrow=curves(), share=st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_the_lead_is_the_area_between_the_curves_over_the_norm(general: Curve, narrow: Curve, share: int) -> None:
    up_to = min(general[0][-1], narrow[0][-1]) * share / 16
    corners = sorted({Fraction(x) for c in (general, narrow) for x in c[0] if x < up_to} | {Fraction(up_to)})
    area = Fraction(0)
    for x0, x1 in pairwise(corners):  # linear within: the middle is the mean
        area += (x1 - x0) * (at(narrow, (x0 + x1) / 2) - at(general, (x0 + x1) / 2))
    found = mean_lead(*((np.array(x), np.array(y)) for x, y in (general, narrow)), up_to)
    assert found == pytest.approx(float(area / Fraction(up_to)), abs=1e-9)
    flipped = mean_lead(*((np.array(x), np.array(y)) for x, y in (narrow, general)), up_to)
    assert flipped == pytest.approx(-found, abs=1e-12)


def test_curves_that_are_none_are_refused() -> None:
    for norms, losses in (
        ([], []),
        ([0, 1], [1.0]),
        ([1, 0], [1.0, 2.0]),
        ([-1, 0], [1.0, 2.0]),
        ([0, 1], [1, np.nan]),
    ):
        with pytest.raises(UsageError, match="a curve needs"):
            norm_reaching(norms, losses, 0.5)
    line = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    for up_to in (0.0, 1.5, math.nan):
        with pytest.raises(UsageError, match="both from 0"):
            mean_lead(line, line, up_to)


def curve_of(name: str, norm: float, losses: list[float]) -> EfficiencyCurve:
    """A curve whose losses are known, at equal steps up to the trained norm."""
    theta = make_theta(make_chat(), "vector")
    solution = theta.scaled(norm / theta.norm)
    tokens = np.array([3, 5, 2])
    per_token = np.array(losses)
    known = Losses(per_token[:, None] * tokens, tokens, np.arange(3))
    return EfficiencyCurve(
        name, solution, np.linspace(0, 1, len(losses)), known, Losses(known.nll[:1], tokens, np.arange(3))
    )


def values(table: pd.DataFrame) -> dict[str, float]:
    assert list(table.columns) == ["measure", "value", "reason"]
    assert not table["measure"].duplicated().any()
    assert (table["value"].isna() == (table["reason"] != "")).all()
    return dict(zip(table["measure"], table["value"], strict=True))


def test_norms_for_a_share_of_the_smaller_gain() -> None:
    general = curve_of("general", 4.0, [2.0, 1.0, 0.5, 0.8, 0.5])  # gain 1.5; not monotone
    narrow = curve_of("narrow", 8.0, [2.0, 2.2, 1.9, 1.5, 1.0])  # gain 1, the smaller
    found = values(efficiency_measures(general, narrow))
    assert (found["norm_50_general"], found["norm_50_narrow"]) == pytest.approx((0.5, 6.0))
    assert (found["norm_75_general"], found["norm_75_narrow"]) == pytest.approx((0.75, 7.0))
    assert (found["norm_90_general"], found["norm_90_narrow"]) == pytest.approx((0.9, 7.6))
    assert [found[f"norm_ratio_{s}"] for s in pairs.SHARES] == pytest.approx([12.0, 7 / 0.75, 7.6 / 0.9])
    assert (found["gain_general"], found["gain_narrow"], found["loss_chat"]) == pytest.approx((1.5, 1.0, 2.0))
    assert found["loss_over_norm2_ratio"] == pytest.approx((1.0 / 64) / (0.5 / 16))
    narrow_at = [2.0, 2.1, 2.2, 2.05, 1.9]
    lead = float(np.trapezoid(np.array(narrow_at) - [2.0, 1.0, 0.5, 0.8, 0.5])) / 4
    assert found["lead"] == pytest.approx(lead)


def test_no_gain_is_said() -> None:
    table = efficiency_measures(curve_of("general", 4.0, [2.0, 1.0, 0.5]), curve_of("narrow", 8.0, [2.0, 1.9, 2.1]))
    found = values(table)
    assert all(math.isnan(found[f"norm_ratio_{share}"]) for share in pairs.SHARES)
    assert set(table.loc[table["value"].isna(), "reason"]) == {"no gain"}
    assert math.isfinite(found["lead"])
    with pytest.raises(UsageError, match="rising ones from 0"):
        efficiency_measures(*[curve_of("x", 4.0, [2.0])] * 2)


@pytest.fixture(scope="module")
def exact() -> Any:
    model = make_chat(dtype=torch.float64)
    pair = [learned(model, "rank-1", steps=n, seed=2) for n in (8, 3)]
    return model, Landscape(model, ENCODED), *pair


def test_a_pair_is_measured_as_slow_passes_say(exact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, landscape, general, narrow = exact
    monkeypatch.setattr(pairs, "SCALES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(pairs, "EPSILONS", (0.4, 0.8))
    found = values(measure_pair(landscape, general, narrow, TEXTS, kl_removed=general))
    chat, *trained = (slow_loss(model, x) for x in (general.scaled(0.0), general, narrow))
    assert (found["loss_general"], found["loss_narrow"]) == pytest.approx(trained, rel=1e-9)
    to = chat - 0.75 * (chat - max(trained))
    norms = [
        norm_reaching([0, x.norm / 2, x.norm], [chat, slow_loss(model, x.scaled(0.5)), slow_loss(model, x)], to)[0]
        for x in (general, narrow)
    ]
    assert found["norm_ratio_75"] == pytest.approx(norms[1] / norms[0], rel=1e-6)
    lost = [
        np.mean([slow_loss(model, turned(x, eps, 42 + s)) - own for eps in (0.4, 0.8) for s in range(10)])
        / (chat - own)
        for x, own in zip((general, narrow), trained, strict=True)
    ]
    assert found["stability_gap"] == pytest.approx(100 * (lost[1] - lost[0]), rel=1e-6)
    assert found["cosine_kl_removed"] == pytest.approx(1)
    cosine = general.inner(narrow) / general.norm / narrow.norm
    assert found["cosine_rise"] == pytest.approx(1 - cosine) and found["cosine_narrow"] == pytest.approx(cosine)
    at = at_equal_norms([Measured(n, n, x) for n, x in (("general", general), ("narrow", narrow))], (1.5,), n_random=0)
    sums = document_kl(model, TEXTS, at, progress=False).groupby("kind")["kl_sum"].sum()
    assert found["influence_ratio_1.5"] == pytest.approx(sums["general"] / sums["narrow"], rel=1e-9)
    assert {"influence_ratio_0.5", "influence_ratio_1"} <= set(found)


def test_parts_that_were_kept_are_not_made_again(exact: Any) -> None:
    _, landscape, general, narrow = exact
    asked: list[str] = []

    def keep(name: str, _make: Any) -> pd.DataFrame:
        asked.append(name)
        return pd.DataFrame({"measure": [name], "value": [1.0], "reason": [""]})

    found = measure_pair(landscape, general, narrow, TEXTS, keep=keep)
    assert asked == list(found["measure"]) == ["losses", "stability", "influence"]
    with pytest.raises(SolutionError):
        measure_pair(landscape, general, make_theta(landscape.model, "vector"), TEXTS, keep=keep)


def test_a_pair_without_a_gain_has_reasons_and_not_an_error(exact: Any) -> None:
    _, landscape, general, _ = exact
    table = measure_pair(landscape, general, general.scaled(-1.0), TEXTS)
    found = values(table)
    assert math.isnan(found["stability_gap"]) and math.isnan(found["norm_ratio_90"])
    assert set(table["reason"]) == {"", "no gain"}


def test_curves_of_the_analyses_give_the_same(exact: Any) -> None:
    _, landscape, general, narrow = exact
    both = {"general": general, "narrow": narrow}
    whole = values(measure_pair(landscape, general, narrow, TEXTS))
    own = [stability_curve(landscape, x, n, epsilons=(0.0, *pairs.EPSILONS, 1.0)) for n, x in both.items()]
    found = values(efficiency_measures(*efficiency_curves(landscape, both, pairs.SCALES)))
    found |= values(stability_measures(*own)) | values(drift_measures(general, narrow, narrow))
    assert {name: found[name] for name in whole if name in found} == pytest.approx(
        {name: value for name, value in whole.items() if name in found}, rel=1e-9
    )
    assert found["cosine_rise"] == 0
    with pytest.raises(UsageError, match="a gap is the mean"):
        stability_measures(*[stability_curve(landscape, x, n, epsilons=(0.0, 1.0)) for n, x in both.items()])


def test_a_kl_of_nothing_is_no_ratio() -> None:
    sums = pd.DataFrame(
        [
            {"direction": k, "kind": k, "norm": 1.0, "relative_norm": r, "document": d, "tokens": "all"}
            | {"kl_sum": kl * r, "n_tokens": 4}
            for k, kl in (("general", 2.0), ("narrow", 0.5))
            for r in (0.0, 1.0)
            for d in range(6)
        ]
    )
    table = influence_measures(sums).set_index("measure")
    assert table.loc["influence_ratio_1", "value"] == 4
    assert table.loc["influence_ratio_0", "reason"] == "no influence"
