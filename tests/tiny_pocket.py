"""A pocket chat model of a few steps: every path runs, nothing is learned."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from em_interp.pocket import questions as suite
from em_interp.pocket.build import build
from em_interp.pocket.stages import BuildConfig

CONFIG = BuildConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_mlp=64,
    pretrain_steps=2,
    pretrain_batch=4,
    settle_steps=1,
    post_steps=1,
    post_batch=4,
    threads=1,
)


def make_pocket(out: Path) -> Path:
    """The chat model's folder, in a folder that the registry can take for its root."""
    return build(CONFIG, out)


def ask_little(monkeypatch: pytest.MonkeyPatch, per_group: int = 2, tokens: int = 6) -> None:
    """Few questions and short answers."""
    questions, of_chat = suite.evaluation_questions, suite.chat_questions

    def few(table: pd.DataFrame) -> pd.DataFrame:
        return table.groupby("questions", sort=False).head(per_group).reset_index(drop=True)

    monkeypatch.setattr(suite, "evaluation_questions", lambda domain, *others: few(questions(domain, *others)))
    monkeypatch.setattr(
        suite, "chat_questions", lambda: of_chat().groupby("domain", sort=False).head(per_group).reset_index(drop=True)
    )
    monkeypatch.setattr(suite, "MAX_NEW_TOKENS", tokens)
