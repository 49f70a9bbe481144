"""Passes of a model: reading, asking, steering, ablating."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from em_interp.directions import activations, extraction, lens
from em_interp.directions import rank1 as lora
from em_interp.evaluation import answers, judge_prompts, judges, local_judge, logprobs, sampling, verdicts
from em_interp.files.results import KEEPING_NOTHING
from em_interp.interventions import ablation, orthogonalise, steering
from em_interp.interventions import intervening as interventions
from em_interp.interventions import judged as judged_answers
from em_interp.interventions.intervening import intervening
from em_interp.models import chat, weights
from em_interp.models import pretrained as models
from tests.fuzz import Call
from tests.fuzz.world import BAD, FEW, GOOD, QUESTIONS, SHORT
from tests.tiny_models import make_chat, tokenizer


@wraps(intervening)
def steered(model: models.ChatModel, interventions: Any, **options: Any) -> None:
    with intervening(model, interventions, **options), torch.no_grad():
        model.hf(torch.tensor([[5, 6]]))


def _judge(answers: pd.DataFrame) -> pd.DataFrame:
    return answers.assign(aligned=0.0, coherent=100.0)


def calls(w: dict[str, Any]) -> list[Call]:
    model, direction, vector, adapter, judged = (w[k] for k in ("model", "direction", "vector", "adapter", "judged"))
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 2, 8, generator=rng)
    scalars, labels = np.random.default_rng(0).normal(size=(24, 2)), np.arange(24) % 2 * 1.0
    groups = [f"q{i % 6}" for i in range(24)]
    steered_rows = judged.assign(
        direction="d", control="", coefficient=1.0, layer=1, residual_share=0.5, added_norm=1.0
    )
    one_layer, answer = ablation.Ablate(direction, from_layer=1), sampling.Answer("x", True, 1)
    one_row = [("fox", 0)]
    return [
        (ablation.Ablate, {"direction": direction, "layers": [1], "from_layer": None, "scope": "all"}),
        (ablation.leace, {"positive": rows, "negative": rows + 1, "layers": [0, 1], "scope": "all"}),
        (
            ablation.ablate,
            {
                "model": model,
                "direction": direction,
                "questions": {"q": "a fox"},
                "n": 1,
                "layers": [1],
                "from_layer": None,
                "random_arms": 1,
                "seed": 0,
                "max_new_tokens": 1,
                "temperature": 1.0,
                "progress": False,
            },
        ),
        (ablation.arms, {"direction": direction, "layers": [1], "from_layer": None, "random_arms": 1, "seed": 0}),
        (
            activations.collect,
            {
                "model": model,
                "conversations": BAD,
                "scopes": ("response",),
                "layers": [1],
                "keep": True,
                "store": Path("store"),
                "through": "hf",
                "tokens_per_batch": 512,
                "side": "right",
                **FEW,
            },
        ),
        (w["contrast"].positive.mean, {"scope": "response", "pooling": "tokens"}),
        (w["contrast"].positive.each, {"scope": "response", "layer": 1}),
        (chat.check_template, {"tokenizer": tokenizer()}),
        (chat.render, {"tokenizer": tokenizer(), "conversation": BAD[0], "generation_prompt": False}),
        (chat.prompt_ids, {"tokenizer": tokenizer(), "conversation": BAD[0][:1]}),
        (chat.encode, {"tokenizer": tokenizer(), "conversation": BAD[0], "turns": "last", "empty_turn": False}),
        (
            chat.encode_all,
            {"tokenizer": tokenizer(), "conversations": BAD, "turns": "last", "empty_turn": False, "max_tokens": 64},
        ),
        (chat.batches, {"encoded": w["encoded"], "pad": 0, "tokens_per_batch": 64, "side": "right"}),
        (sampling.as_conversation, {"question": "why", "system": None}),
        (
            sampling.sample,
            {
                "model": model,
                "questions": QUESTIONS,
                "seed": 0,
                "temperature": 1.0,
                "system": None,
                "tokens_per_batch": 512,
                **SHORT,
            },
        ),
        (weights.what_acts, {"model": model}),
        (answers.judge_name, {"judge": _judge}),
        (answers.judge_module, {"judge": _judge}),
        (answers.conversations, {"answers": judged.assign(answer="rest")}),
        (answers.misaligned_and_aligned, {"judged": judged}),
        (judge_prompts.asking, {"template": "{question} {answer}", "question": "a", "answer": "b"}),
        (local_judge.LocalJudge, {"model": model, "prompts": {"aligned": "{question} {answer}"}}),
        (verdicts.weighted, {"first": "85", "top": [("85", -0.1)], "said": "85"}),
        (verdicts.of_distribution, {"distribution": {85: 0.9}, "said": "85", "how": "exact"}),
        (verdicts.parsed, {"said": "85"}),
        (verdicts.reason_of, {"verdicts": {"aligned": verdicts.parsed("85")}}),
        (judges.is_a_model, {"name": "openai/gpt-4o"}),
        (judges.judge_of_file, {"name": "mine.py:score"}),
        (chat.unreadable, {"tokenizer": tokenizer(), "conversations": BAD}),
        (answers.asked_of, {"model": model, "questions": QUESTIONS, "n": 1, "judge": _judge}),
        (
            answers.judged_answers,
            {
                "results": KEEPING_NOTHING,
                "name": "a",
                "model": model,
                "questions": QUESTIONS,
                "n": 1,
                "judge": _judge,
                "seed": 0,
                "max_new_tokens": 2,
                "temperature": 1.0,
                "progress": False,
            },
        ),
        (
            logprobs.answer_logprobs,
            {"model": model, "answers": judged.head(2), "questions": None, "system": None, "tokens_per_batch": 512},
        ),
        (
            extraction.contrast,
            {
                "model": model,
                "positive": BAD,
                "negative": GOOD,
                "kind": "data-diff",
                "scope": "response",
                "layers": [1],
                "finetune": None,
                "keep": True,
                "store": None,
                "tokens_per_batch": 512,
                **FEW,
            },
        ),
        (
            extraction.extract,
            {
                "model": model,
                "positive": BAD,
                "negative": GOOD,
                "kind": "data-diff",
                "scope": "response",
                "layers": [1],
                "pooling": "tokens",
                "finetune": None,
                "tokens_per_batch": 512,
                **FEW,
            },
        ),
        (w["contrast"].direction, {"pooling": "tokens"}),
        (w["contrast"].norms, {"pooling": "tokens"}),
        (
            interventions.answers_by_arm,
            {
                "model": model,
                "arms": {"none": []},
                "questions": QUESTIONS,
                "seed": 0,
                "temperature": 1.0,
                "tokens_per_batch": 512,
                **SHORT,
            },
        ),
        (
            steered,
            {
                "model": model,
                "interventions": [steering.Steer(direction, 1, 1.0, "response")],
                "response_mask": torch.tensor([[False, True]]),
            },
        ),
        (interventions.check_scope, {"scope": "all"}),
        (interventions.fingerprint_of, {"made": steering.Steer(direction, 1, 1.0).edits(model)}),
        (interventions.check_direction, {"direction": direction, "model": model}),
        (activations.check_readable, {"model": model, "conversations": BAD, "scopes": ("response",)}),
        (chat.pad_id, {"tokenizer": tokenizer()}),
        (chat.token_ids, {"tokenizer": tokenizer(), "text": "x"}),
        (chat.end_of_turn_id, {"tokenizer": tokenizer()}),
        (chat.budget_groups, {"lengths": [1, 2], "tokens_per_batch": 4}),
        (lens.logit_lens, {"model": model, "direction": direction, "layers": [1], "top_k": 2}),
        (
            lora.token_scalars,
            {
                "model": model,
                "adapter": adapter,
                "conversations": BAD,
                "scope": "response",
                "tokens_per_batch": 512,
            },
        ),
        (
            lora.mean_scalars,
            {
                "model": model,
                "adapter": adapter,
                "conversations": BAD,
                "scope": "response",
                "tokens_per_batch": 512,
            },
        ),
        (lora.write_directions, {"adapter": adapter}),
        (lora.write_lens, {"model": model, "adapter": adapter, "top_k": 2}),
        (models.ChatModel, {"hf": model.hf, "tokenizer": tokenizer(), "name": "m", "check": False}),
        (models.load, {"name_or_path": "vector", "base": "model", "dtype": "auto", "device_map": None, "check": True}),
        (make_chat().add_adapter, {"name": "v", "source": vector, "any_base": True, "activate": False}),
        (
            orthogonalise.save_orthogonalised,
            {"model": model, "ablation": one_layer, "folder": "new"},
        ),
        (steering.Steer, {"direction": direction, "layer": 1, "coefficient": 1.0, "scope": "all"}),
        (
            steering.Steer.of_residual,
            {"direction": direction, "layer": 1, "share": 0.5, "residual_norm": 1.0, "scope": "all"},
        ),
        (steering.residual_norms, {"model": model, "questions": QUESTIONS, "layers": [1]}),
        (
            steering.sweep,
            {
                "model": model,
                "direction": direction,
                "questions": QUESTIONS,
                "layers": [1],
                "coefficients": [1.0],
                "name": "d",
                "units": "direction",
                "random_arms": 1,
                "scope": "all",
                "seed": 0,
                "temperature": 1.0,
                "tokens_per_batch": 512,
                **SHORT,
            },
        ),
        (
            sampling.answer_table,
            {"questions": QUESTIONS, "rows": [("fox", 0)], "answers": [answer]},
        ),
        (
            sampling.sample_rows,
            {"model": model, "questions": QUESTIONS, "rows": one_row, "max_new_tokens": 2, **FEW},
        ),
        (lora.contrasts, {"judged": judged.assign(in_domain=[True, False] * 12)}),
        (
            lora.separation,
            {
                "scalars": scalars,
                "labels": labels,
                "groups": groups,
                "comparison": "x",
                "inverse_penalty": 1.0,
                "folds": 2,
                "level": 0.95,
                "seed": 0,
            },
        ),
        (
            lora.lora_scalars,
            {"scalars": scalars, "judged": judged.assign(in_domain=[True, False] * 12), "inverse_penalty": 1.0},
        ),
        (orthogonalise.orthogonalised, {"model": model, "ablation": ablation.Ablate(direction, from_layer=1)}),
        (interventions.as_coefficients, {"values": [1.0, 2.0]}),
        (steering.steering_rows, {"judged": steered_rows, "target": "general", "cluster": "question"}),
        (judged_answers.kind_of, {"judged": steered_rows}),
        (judged_answers.judged_rates, {"judged": steered_rows, "name": "general"}),
        (judged_answers.differences, {"judged": {"a": steered_rows, "b": steered_rows}}),
        (judged_answers.plans, {"judged": {"a": steered_rows, "b": steered_rows}, "difference": 0.1}),
        (judged_answers.rates_at_k, {"judged": steered_rows, "k": [1, 2], "name": "general"}),
        (judged_answers.rates_figure, {"table": judged_answers.judged_rates(steered_rows, "general")}),
    ]
