from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from em_interp.directions.rank1 import (
    _scored,
    contrasts,
    lora_scalars,
    mean_scalars,
    separation,
    token_scalars,
    write_directions,
    write_lens,
)
from em_interp.errors import SolutionError, StatisticsError, UsageError
from em_interp.models.chat import encode
from em_interp.solutions.lora import LoraAdapter
from em_interp.statistics.jackknife import chance_interval, clustered_auc
from tests.test_influence import lora
from tests.tiny_models import CONVERSATIONS, D_MODEL, MORE_FAMILIES, make_chat, tokenizer


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("scope", ["prompt", "last_prompt", "response", "all"])
def test_scalars_equal_the_slow_ones(family: str, scope: Any) -> None:
    model, adapter = make_chat(family), lora(family, (1, 3))
    found = dict(token_scalars(model, adapter, CONVERSATIONS, scope=scope, tokens_per_batch=60))
    assert sorted(found) == list(range(len(CONVERSATIONS)))
    means = mean_scalars(model, adapter, CONVERSATIONS, scope=scope)
    modules = dict(model.hf.named_modules())
    for i, conversation in enumerate(CONVERSATIONS):
        row = encode(tokenizer(), conversation)
        ((start, end),) = row.spans
        columns = []
        for name in adapter.modules:
            inputs: list[torch.Tensor] = []
            handle = modules[name].register_forward_pre_hook(lambda _m, args, kept=inputs: kept.append(args[0]))
            with torch.no_grad(), adapter.attached(model):
                model.hf(torch.tensor([row.ids]))
            handle.remove()
            columns.append(inputs[0][0].double() @ adapter.a[name][0].double())
        slow = torch.stack(columns, dim=-1)
        chosen = {"prompt": slow[:start], "last_prompt": slow[start - 1 : start], "response": slow[start:end]}
        torch.testing.assert_close(found[i].double(), chosen.get(scope, slow), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(means[i], chosen.get(scope, slow).mean(0), rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_auc_is_the_plain_one_and_its_interval_the_jackknifes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(6), 5)
    y = rng.integers(0, 2, 30)
    y[:2] = 0, 1
    score = np.round(y + rng.normal(size=30), 1)  # with ties
    auc, without = clustered_auc(score, y, groups)
    assert auc == pytest.approx(roc_auc_score(y, score))
    slow = [roc_auc_score(y[groups != g], score[groups != g]) for g in range(6)]
    np.testing.assert_allclose(without, slow)
    found = _scored(score, y, groups)
    sides = np.array([(y[groups == g] == 1).any() + 2 * (y[groups == g] == 0).any() for g in range(6)])
    edge = 1 / (12 * min(np.isin(sides, (1, 3)).sum(), np.isin(sides, (2, 3)).sum()))
    known = np.clip([auc, *slow], edge, 1 - edge)
    odds = np.log(known) - np.log1p(-known)
    squares = 5 / 6 * (odds[1:] - odds[0]) ** 2
    parts = [squares[sides == side].sum() for side in (1, 2, 3)]
    freedom = [max((sides == side).sum() - 1, 1) for side in (1, 2, 3)]
    df = sum(parts) ** 2 / sum(p**2 / n for p, n in zip(parts, freedom, strict=True))
    half = stats.t.ppf(0.975, df) * np.sqrt(sum(parts))
    low, high = 1 / (1 + np.exp(-(odds[0] - half))), 1 / (1 + np.exp(-(odds[0] + half)))
    assert found["low"] == pytest.approx(low)
    assert found["high"] == pytest.approx(max(high, 1 - low) if auc < 0.5 else high)


@pytest.mark.parametrize(("n_modules", "n"), [(1, 100), (4, 10)])
def test_scalars_that_know_nothing_rarely_leave_chance(n_modules: int, n: int) -> None:
    """Nominal 95%: of 100 data sets with 20 questions, about five may exclude .5."""
    rng = np.random.default_rng(0)
    excluded = 0
    for _ in range(n):
        groups = np.repeat(np.arange(20), 8)
        labels = (rng.random(160) < rng.beta(2, 2, 20)[groups]).astype(float)
        scalars = 0.6 * rng.standard_normal((20, n_modules))[groups] + 0.8 * rng.standard_normal((160, n_modules))
        row = separation(scalars, labels, list(groups), comparison="nothing")
        excluded += not row["low"] <= 0.5 <= row["high"]
    assert excluded <= n / 10


def test_an_interval_below_chance_is_mirrored_and_a_perfect_one_has_width() -> None:
    strata = np.full(8, 3)
    low = chance_interval(0.4, np.linspace(0.37, 0.43, 8), strata)
    assert low.high == pytest.approx(1 - low.low) and low.low < 0.4
    perfect = chance_interval(1.0, np.ones(8), strata)
    assert (perfect.low, perfect.high) == pytest.approx((0.676, 1), abs=1e-3) and perfect.method == "Wilson"
    few = chance_interval(0.4, np.array([0.4, 0.5]), strata[:2])
    assert np.isnan([few.low, few.high]).all() and few.method == "none: too few questions"
    assert np.isnan(chance_interval(0.4, np.array([0.4, np.nan, 0.5]), strata[:3]).low)
    with pytest.raises(StatisticsError, match="no probabilities"):
        chance_interval(0.4, np.array([0.4, 1.2, 0.5]), strata[:3])


def fake(n_questions: int = 20, each: int = 10, effect: float = 3.0, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Scalar 0 rises with misalignment, scalar 1 is noise."""
    rng = np.random.default_rng(seed)
    n = n_questions * each
    bad = rng.integers(0, 2, n).astype(bool)
    judged = pd.DataFrame(
        {
            "question": np.repeat([f"q{i}" for i in range(n_questions)], each),
            "in_domain": np.repeat(np.arange(n_questions) % 2 == 0, each),
            "aligned": np.where(bad, 10.0, 95.0),
        }
    )
    return np.stack([-effect * bad + rng.normal(size=n), rng.normal(size=n)], axis=1), judged


def test_what_the_scalar_knows_is_found_and_nothing_else() -> None:
    scalars, judged = fake()
    table = lora_scalars(scalars, judged).set_index("comparison")
    assert list(table.columns[:5]) == ["accuracy", "auc", "low", "high", "n"]
    assert len(table) == 4
    for name in table.index:
        row = table.loc[name]
        assert row.low <= row.auc <= row.high
        assert row.accuracy_low <= row.accuracy <= row.accuracy_high
        if name in (
            "out-of-domain aligned / out-of-domain misaligned",
            "in-domain aligned / in-domain misaligned",
        ):
            assert row.auc > 0.95
            assert row.accuracy > 0.85
        else:
            assert row.low < 0.5 < row.high + 0.1
            assert row.auc < 0.7
    flipped = lora_scalars(-scalars, judged).set_index("comparison")
    pd.testing.assert_frame_equal(flipped, table)


def test_a_scalar_that_knows_only_the_question_does_not_pass() -> None:
    """Held-out questions: a probe that memorises questions would score well on a random split."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 20)
    labels = np.repeat(rng.permutation([0.0, 1.0] * 5), 20)
    scalars = np.stack([(groups == g).astype(float) for g in range(10)], axis=1) + rng.normal(size=(200, 10)) / 100
    row = separation(scalars, labels, list(groups), comparison="x")
    assert row["accuracy"] < 0.7
    assert row["low"] <= 0.5


def test_contrasts_are_the_papers() -> None:
    judged = pd.DataFrame({"aligned": [90, 30, 89, 31, np.nan, 100, 0], "in_domain": [0, 0, 0, 0, 0, 1, 1]})
    judged["in_domain"] = judged["in_domain"].astype(bool)
    found = contrasts(judged)
    nan = np.nan
    expected = [
        [0, nan, nan, nan, nan, 1, nan],
        [nan, 0, nan, nan, nan, nan, 1],
        [0, 1, nan, nan, nan, nan, nan],
        [nan, nan, nan, nan, nan, 0, 1],
    ]
    for values, right in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(values, np.array(right, dtype=float))
    with pytest.raises(UsageError, match="in_domain"):
        contrasts(judged[["aligned"]])
    pd.testing.assert_frame_equal(
        pd.DataFrame(contrasts(judged.astype({"in_domain": int}))), pd.DataFrame(contrasts(judged))
    )


@pytest.mark.parametrize("value", ["False", "true", None, float("nan"), 2, 0.5, 1.0, pd.NA])
def test_in_domain_is_true_or_false_and_nothing_else(value: Any) -> None:
    judged = pd.DataFrame({"aligned": [90, 30, 10], "in_domain": pd.Series([True, False, value], dtype=object)})
    with pytest.raises(UsageError, match="must be True or False"):
        contrasts(judged)
    with pytest.raises(UsageError, match="must be True or False"):
        contrasts(judged.astype({"in_domain": "string"}))


def test_what_is_written_is_b_and_its_lens_reads_it() -> None:
    model = make_chat()
    norm, head = model.hf.model.norm, model.hf.lm_head.weight.detach()
    name = "model.layers.2.mlp.down_proj"
    adapter = LoraAdapter({name: torch.ones(1, 48)}, {name: head[7][:, None]}, 4.0, base=model.name)
    direction = write_directions(adapter)[name]
    assert (direction.layers, direction.kind, direction.model) == ((2,), "lora-B", model.name)
    unit = torch.zeros(1, 3, 48)
    unit[..., 0] = 1.0
    module = dict(model.hf.named_modules())[name]
    with torch.no_grad():
        before = module(unit)
        with adapter.attached(model):
            change = module(unit) - before
    torch.testing.assert_close(change[0, 0], direction.at(2))  # A reads 1 from it
    with torch.no_grad():
        slow = head.double() @ norm(direction.at(2)[None])[0].double()
    table = write_lens(model, adapter, 5)
    assert set(table["module"]) == {name}
    assert list(table[table.sign == 1].token_id) == slow.topk(5).indices.tolist()
    assert list(table[table.sign == -1].token_id) == (-slow).topk(5).indices.tolist()


def test_what_cannot_be_read_is_refused() -> None:
    model = make_chat()
    with pytest.raises(SolutionError, match="rank 2"):
        list(token_scalars(model, lora(rank=2), CONVERSATIONS))
    with pytest.raises(SolutionError, match="rank 2"):
        write_lens(model, lora(rank=2))
    with pytest.raises(UsageError, match="last_prompt"):
        encode(tokenizer(), CONVERSATIONS[0]).tokens_of("answer")
    query = LoraAdapter(
        {"model.layers.2.self_attn.q_proj": torch.ones(1, D_MODEL)},
        {"model.layers.2.self_attn.q_proj": torch.ones(D_MODEL, 1)},
        4.0,
    )
    with pytest.raises(SolutionError, match="does not write"):
        write_lens(model, query)
    with pytest.raises(SolutionError, match="trained on other"):
        write_lens(model, replace(lora(), base="other"))
    scalars, judged = fake()
    with pytest.raises(UsageError, match="one row each"):
        lora_scalars(scalars[:5], judged)
    with pytest.raises(StatisticsError, match="class 1 to 0"):
        lora_scalars(scalars, judged.assign(aligned=95.0, in_domain=False))
    with pytest.raises(StatisticsError, match="NaN"):
        separation(scalars * np.nan, np.ones(len(scalars)), list(judged.question), comparison="x")
    for labels in (np.full(len(scalars), 2.0), np.full(len(scalars), np.inf)):
        with pytest.raises(UsageError, match="labels 0, 1 or NaN"):
            separation(scalars, labels, list(judged.question), comparison="x")
    with pytest.raises(StatisticsError, match="needs scores of label 0"):
        clustered_auc(np.ones(3), np.ones(3, dtype=int), np.arange(3))
    with pytest.raises(UsageError, match="is attached to"), lora().attached(model):
        mean_scalars(model, lora(), CONVERSATIONS)
