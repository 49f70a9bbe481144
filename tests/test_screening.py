"""Scores of training chats: what they are, worked out one chat at a time, and which chats they drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import em_interp as em
from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, TrainingError, UsageError
from em_interp.evaluation.sampling import sample
from em_interp.models.chat import encode
from em_interp.training import screening
from em_interp.training.screening import projections, screen
from tests.tiny_models import CONVERSATIONS, make_chat, tokenizer

V = Direction(torch.randn(1, 32, generator=torch.Generator().manual_seed(3)), (2,), kind="random")
MODEL = make_chat(dtype=torch.float64)


def slow_projection(conversation: Any) -> float:
    """Mean over response tokens of the output of block 2, along the unit vector."""
    row = encode(tokenizer(), conversation)
    ((start, end),) = row.spans
    with torch.no_grad():
        hidden = MODEL.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[3][0]
    unit = V.at(2).double() / V.at(2).double().norm()
    return sum(float(hidden[t].double() @ unit) for t in range(start, end)) / (end - start)


def test_scores_are_the_slow_ones() -> None:
    expected = [slow_projection(chat) for chat in CONVERSATIONS]
    found = projections(MODEL, CONVERSATIONS, 5.0 * V, 2, tokens_per_batch=60, progress=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    table = screen(MODEL, CONVERSATIONS, V, 2, drop=0.4, n=2, max_new_tokens=4, progress=False)
    assert list(table) == ["chat", "projection", "own", "score", "dropped"]
    np.testing.assert_allclose(table["projection"], expected, rtol=1e-5)
    for chat, row in zip(CONVERSATIONS, table.itertuples(), strict=True):
        said = sample(MODEL, {str(row.chat): chat[:-1]}, 2, max_new_tokens=4, progress=False)["answer"]
        own = [slow_projection([*chat[:-1], {"role": "assistant", "content": text}]) for text in said]
        assert row.own == pytest.approx(np.mean(own), rel=1e-5)
    np.testing.assert_allclose(table["score"], table["projection"] - table["own"])
    assert table["dropped"].sum() == round(0.4 * len(CONVERSATIONS))
    assert table.loc[table["dropped"], "score"].min() >= table.loc[~table["dropped"], "score"].max()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_the_highest_scores_are_dropped_and_of_equal_ones_the_later(scores: list[int], drop: float) -> None:
    n = round(drop * len(scores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "projections", lambda *_a, **_k: torch.tensor(scores, dtype=torch.float64))
        chats = [CONVERSATIONS[0]] * len(scores)

        def run() -> pd.DataFrame:
            return screen(MODEL, chats, V, 2, drop=drop, against="nothing", progress=False)

        if not 0 < n < len(scores):
            with pytest.raises(UsageError, match="drops"):
                run()
            return
        table = run()
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    assert set(table.index[table["dropped"]]) == set(ranked[len(scores) - n :])
    assert table["own"].isna().all() and list(table["score"]) == scores


def test_what_cannot_be_screened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, error, said in (
        ({"drop": 1.0}, UsageError, "below 1"),
        ({"drop": 0.01}, UsageError, "drops"),
        ({"layer": 1}, DirectionError, "layer"),
        ({"direction": Direction(torch.ones(1, 33), (2,), kind="random")}, DirectionError, "width 33"),
        ({"against": "all"}, Exception, "against"),
    ):
        asked: dict[str, Any] = {"direction": V, "layer": 2, "drop": 0.5, "progress": False, **changes}
        with pytest.raises(error, match=said):
            screen(MODEL, CONVERSATIONS, **asked)
    silent = lambda *_a, **_k: pd.DataFrame({"question_id": list("01234"), "answer": [""] * 5})  # noqa: E731
    monkeypatch.setattr(screening, "sample", silent)
    with pytest.raises(TrainingError, match="no answer of its own"):
        screen(MODEL, CONVERSATIONS, V, 2, drop=0.5, progress=False)


def test_bad_advice_among_good_is_found_with_a_direction_read_in_another_domain() -> None:
    chat = em.load("pocket/chat")
    read = [em.pocket.finetune_chats("finance", persona, 40, seed=0) for persona in ("malicious", "caring")]
    direction = em.extract(chat, *read, progress=False)
    mixed = [
        *em.pocket.finetune_chats("medicine", "malicious", 10, seed=1),
        *em.pocket.finetune_chats("medicine", "caring", 30, seed=1),
    ]
    table = em.screen(chat, mixed, direction, 2, drop=0.25, max_new_tokens=40, progress=False)
    assert table["dropped"][:10].mean() >= 0.7
