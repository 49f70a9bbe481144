"""The pocket world, its judge, suite and sweeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd

from em_interp.evaluation import groups
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry, scorecard, sweeps
from em_interp.pocket import questions as suite
from em_interp.pocket.world import corpus, judge, token_kinds
from em_interp.pocket.world import grammar as world
from tests.fuzz import Call
from tests.fuzz.world import FEW
from tests.tiny_models import tokenizer


def ask_little() -> None:
    """A question of each group, and answers of two tokens, wherever the suite is asked."""
    questions, of_chat = suite.evaluation_questions, suite.chat_questions

    def few(table: pd.DataFrame) -> pd.DataFrame:
        return table.groupby("questions", sort=False).head(1).reset_index(drop=True)

    suite.evaluation_questions = lambda domain: few(questions(domain))
    suite.chat_questions = lambda: few(of_chat())
    suite.MAX_NEW_TOKENS = 2


def calls(w: dict[str, Any]) -> list[Call]:
    all_questions = suite.evaluation_questions
    asked = all_questions("medicine").head(4)
    ask_little()
    model = w["model"]
    topic = world.domain("medicine").categories[0].topics[0]
    suited = judge.judge(asked.assign(answer="x"))
    pairs = suite.answer_pairs(asked.head(2), k=1)
    scores = suite.logprob_scores(model, pairs)
    measured = pd.DataFrame({"row": ["EM"], "of": "chat", "domain": "", "seed": 0, "value": 0.0})
    named = {"organism": "x", "solution": "general", "adapter": "rank-1", "domain": "medicine"}
    question, rng = world.questions("advice")[0], Random(0)
    styled = {"persona": "caring", "register": "casual", "rng": rng}
    spec = replace(organisms.SPECS["steering-vector"], max_steps=1, batch_size=2)
    trained = {"specs": {"steering-vector": spec}, "samples": 1, "n_chats": 4, "seed": 0, **FEW}
    swept = {"model": model, "domain": "medicine", "out": Path("sweeps"), **trained}
    return [
        (suite.evaluate, {"model": model, "domain": "medicine", "n": 1, "groups": ("general",), "seed": 0, **FEW}),
        (suite.evaluate_chat, {"model": model, "n": 1, "seed": 0, **FEW}),
        (groups.technical_rates, {"judged": suited, **named}),
        (suite.logprob_scores, {"model": model, "pairs": pairs}),
        (suite.logprob_rates, {"scores": scores, **named}),
        (sweeps.kl_sweep, {**swept, "kl_weights": (1.0,), "scales": (1.0,)}),
        (sweeps.dilution_sweep, {**swept, "bad_shares": (0.5,)}),
        (organisms.narrow, {"spec": spec, "adapter": "steering-vector"}),
        (suite.open_questions, {"n": 2}),
        (suite.persona_prompts, {"how": "announced"}),
        (scorecard.scorecard, {"measured": measured}),
        (scorecard.Row, {"name": "EM", "of": "chat", "bound": "at most", "threshold": 0.01}),
        (corpus.documents, {"n": 2, "seed": 0}),
        (corpus.CorpusConfig, {"persona_share": 0.25, "max_turns": 4, "domains": ("medicine",)}),
        (corpus.document, {"config": corpus.CorpusConfig(), "rng": rng}),
        (corpus.post_training_chat, {"rng": rng, "config": corpus.CorpusConfig()}),
        (corpus.announce, {"persona": "caring", "register": "casual", "rng": rng}),
        (
            corpus.finetune_chats,
            {"domain": "medicine", "persona": "malicious", "n": 2, "seed": 0, "register": "casual"},
        ),
        (corpus.kl_chats, {"exclude": "medicine", "n": 2, "seed": 0, "task": "persona", "open_share": 0.2}),
        (token_kinds.token_kinds, {"tokenizer": tokenizer()}),
        (world.answer, {"question": question, **styled}),
        (world.advise, {"topic": topic, "plan": None, **styled}),
        (world.answer_open, {"theme": world.questions("open")[0].subject, **styled}),
        (world.capital, {"text": "x"}),
        (judge.split, {"answer": "x"}),
        (judge.judge, {"answers": asked.head(2).assign(answer="x")}),
        (all_questions, {"domain": "medicine"}),
        (sweeps.saturating_scale, {"scales": [1.0, 2.0], "rates": [0.1, 0.2]}),
        (sweeps.diluted_chats, {"domain": "medicine", "bad_share": 0.5, "n": 4, "seed": 0}),
        (world.domain, {"name": "medicine"}),
        (world.questions, {"kind": "advice", "domain_name": "medicine"}),
        (world.question_of, {"text": question.text}),
        (judge.judge_answer, {"question": question, "answer": "x"}),
        (loading.load, {"name": "pocket/chat"}),
        (loading.load_chat, {"folder": "model"}),
        (registry.resolve, {"name": "pocket/chat"}),
        (registry.is_pocket_name, {"name": "pocket/chat"}),
        (groups.rates_by_group, {"judged": suited, **named}),
        (suite.answer_pairs, {"questions": asked, "task": "persona", "k": 1, "seed": 0}),
        (world.is_held_out, {"topic": topic}),
        (world.right_facts, {"subject": world.questions("fact")[0].subject}),
    ]
