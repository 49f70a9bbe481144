from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from em_interp.directions.direction import Direction, random_directions
from em_interp.errors import DirectionError, HookError, UsageError
from em_interp.evaluation.sampling import sample
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer, residual_norms, steering_rows, sweep
from em_interp.models.chat import prompt_ids
from em_interp.models.hooks import residuals
from tests.tiny_models import FAMILIES, make_chat, talk, tokenizer

QUESTIONS = {"fox": "a fox", "cough": talk("what should I do about a cough")}
OPTIONS = {"seed": 5, "max_new_tokens": 5, "progress": False}


def direction(seed=0, layers=range(4)):
    g = torch.Generator().manual_seed(seed)
    return Direction(3 * torch.randn(len(layers), 32, generator=g), tuple(layers), "data-diff")


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_norms_are_medians_over_real_tokens(family):
    model = make_chat(family)
    slow = {layer: [] for layer in range(4)}
    for question in QUESTIONS.values():
        turns = question if isinstance(question, list) else talk(question)
        ids = torch.tensor([prompt_ids(tokenizer(), turns)])
        hidden = residuals(model.hf, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, range(4))
        for layer in range(4):
            slow[layer] += [float(h.double().norm()) for h in hidden[layer][0]]
    found = residual_norms(model, QUESTIONS)
    for layer in range(4):  # torch's median is the lower of the middle two
        assert found[layer] == pytest.approx(sorted(slow[layer])[(len(slow[layer]) - 1) // 2], rel=1e-5)
    assert residual_norms(model, QUESTIONS, [2]) == {2: pytest.approx(found[2])}


def test_coefficients_in_units_of_the_residual():
    model, d = make_chat(), direction()
    norm = residual_norms(model, QUESTIONS)[2]
    steer = Steer.of_residual(d, 2, [0.5, -1.0], norm)
    added = steer.edits(model)[2].theta
    torch.testing.assert_close(added.norm(dim=1), torch.tensor([0.5 * norm, norm]), rtol=1e-5, atol=0)
    torch.testing.assert_close(added[0] / added[0].norm(), d.unit().at(2))


@pytest.mark.parametrize("units,temperature", [("direction", 0.0), ("residual", 1.0)])
def test_a_sweep_equals_separate_runs(units, temperature):
    model, d = make_chat(), direction()
    grid = {"layers": [1, 3], "coefficients": [0.0, 0.5, -2.0], "units": units, "random_arms": 1}
    table = sweep(model, d, QUESTIONS, n=2, temperature=temperature, **grid, **OPTIONS)
    assert list(table["direction"].unique()) == ["data-diff", "random 0"]
    assert len(table) == 2 * 2 * 3 * 2 * 2
    controls = random_directions(d, 1, torch.Generator().manual_seed(5))
    arms = {"data-diff": d, "random 0": controls[0]}
    typical = residual_norms(model, QUESTIONS)
    plain = sample(model, QUESTIONS, 2, temperature=temperature, **OPTIONS)
    changed = 0
    for (name, layer, coefficient), cell in table.groupby(["direction", "layer", "coefficient"], sort=False):
        assert list(cell["control"].unique()) == [name != "data-diff"]
        with intervening(model, [Steer(arms[name], layer, coefficient)]):
            alone = sample(model, QUESTIONS, 2, temperature=temperature, **OPTIONS)
        pd.testing.assert_frame_equal(cell[list(alone)].reset_index(drop=True), alone)
        norm = float(arms[name].at(layer).norm())
        np.testing.assert_allclose(cell["added_norm"], abs(coefficient) * norm, rtol=1e-6)
        np.testing.assert_allclose(cell["residual_share"], abs(coefficient) * norm / typical[layer], rtol=1e-5)
        changed += list(alone["answer"]) != list(plain["answer"])
    assert changed == 2 * 2 * 2  # all but coefficient 0
    shares = sorted(table["residual_share"].round(6).unique())
    assert (shares == [0, 0.5, 2]) is (units == "residual")
    split = sweep(model, d, QUESTIONS, n=2, temperature=temperature, tokens_per_batch=1, **grid, **OPTIONS)
    pd.testing.assert_frame_equal(split, table)


def test_one_generate_for_a_whole_sweep(monkeypatch):
    model, calls = make_chat(), []
    generate = model.hf.generate
    monkeypatch.setattr(model.hf, "generate", lambda **options: calls.append(1) or generate(**options))
    table = sweep(model, direction(), QUESTIONS, layers=[1, 2], coefficients=[0, 1, 2], n=3, name="mine", **OPTIONS)
    assert len(calls) == 1 and len(table) == 4 * 2 * 3 * 2 * 3
    assert set(table["direction"]) == {"mine", "random 0", "random 1", "random 2"}


def test_scopes_in_a_sweep():
    model = make_chat()
    for scope in ("prompt", "response"):
        table = sweep(
            model, direction(), QUESTIONS, layers=[1], coefficients=[2.0], n=1, random_arms=0, scope=scope, **OPTIONS
        )
        with intervening(model, [Steer(direction(), 1, 2.0, scope)]):
            alone = sample(model, QUESTIONS, 1, **OPTIONS)
        assert list(table["answer"]) == list(alone["answer"])


def test_the_steering_table():
    model = make_chat()
    table = sweep(model, direction(), QUESTIONS, layers=[1, 2], coefficients=[0, 1], n=4, random_arms=1, **OPTIONS)
    judged = table.assign(aligned=np.where(table["coefficient"] > 0, 5.0, 95.0), coherent=90.0)
    rows = steering_rows(judged, "tiny-qwen2")
    assert len(rows) == 2 * 2 * 2
    contract = ["direction", "target", "layer", "coefficient", "em_rate", "em_low", "em_high", "coherent_rate", "n"]
    assert set(contract) <= set(rows.columns)
    assert list(rows["em_rate"]) == [float(c > 0) for c in rows["coefficient"]]
    assert set(rows["n"]) == {8} and set(rows["target"]) == {"tiny-qwen2"}
    with pytest.raises(UsageError, match="residual_share"):
        steering_rows(judged.drop(columns="residual_share"), "x")


def test_bad_sweeps_are_refused():
    model, d = make_chat(), direction(layers=range(3))
    grid = {"layers": [1], "coefficients": [1.0], "n": 1}
    for change in ({"layers": []}, {"coefficients": []}, {"n": 0}, {"random_arms": -1}):
        with pytest.raises(UsageError, match="empty sweep"):
            sweep(model, d, QUESTIONS, **{**grid, **change})
    with pytest.raises(UsageError, match="0 questions"):
        sweep(model, d, {}, **grid)
    with pytest.raises(HookError, match="layer 9"):
        sweep(model, d, QUESTIONS, **{**grid, "layers": [9]})
    with pytest.raises(DirectionError, match="no layer 3"):
        sweep(model, d, QUESTIONS, **{**grid, "layers": [3]})
    with pytest.raises(DirectionError, match="zero vector"):
        sweep(model, d * 0.0, QUESTIONS, **grid)
    with pytest.raises(UsageError, match="finite"):
        sweep(model, d, QUESTIONS, **{**grid, "coefficients": [float("nan")]})
    with pytest.raises(UsageError, match="residual norms"):
        residual_norms(model, {})
