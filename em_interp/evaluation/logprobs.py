"""Log-probabilities of given answers: what needs neither sampling nor a judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from em_interp.errors import UsageError
from em_interp.evaluation.sampling import Questions, as_conversation
from em_interp.models.chat import batches, encode, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import scored_logits
from em_interp.models.losses import nll_each, token_budget
from em_interp.models.precision import exact
from em_interp.models.templates import Conversation


@torch.no_grad()
def answer_logprobs(
    model: ChatModel,
    answers: pd.DataFrame,
    *,
    questions: Questions | None = None,
    system: str | None = None,
    tokens_per_batch: int | None = None,
) -> pd.DataFrame:
    """`answers` with columns logprob (log p of the whole answer, end of turn included, in nats) and n_tokens.

    answers: columns question (text) and answer, or question_id and answer with `questions`. Needs no judge:
    compare the probability mass on malicious and on caring answers to the same question.
    """
    needed = {"answer", "question" if questions is None else "question_id"}
    if missing := needed - set(answers.columns):
        raise UsageError(f"answers lack the columns {sorted(missing)}; there are {list(answers.columns)}.")
    asked: Sequence[str | Conversation] = (
        list(answers["question"]) if questions is None else [questions[key] for key in answers["question_id"]]
    )
    encoded = [
        encode(
            model.tokenizer,
            [*as_conversation(question, system), {"role": "assistant", "content": str(answer)}],
        )
        for question, answer in zip(asked, answers["answer"], strict=True)
    ]
    logprob = np.full(len(encoded), np.nan)
    check_lengths(model.hf, [len(row) for row in encoded], what="answer")
    refuse_dropout(model.hf)
    budget = tokens_per_batch or token_budget(model.hf)
    for cpu_batch in batches(encoded, pad=pad_id(model.tokenizer), tokens_per_batch=budget):
        batch = cpu_batch.to(model.device)
        where = batch.predicting()
        losses = exact(nll_each(scored_logits(model.hf, batch.inputs(), where), batch.targets()))
        row_of = where.nonzero()[:, 0].to(losses.device)
        sums = losses.new_zeros(len(batch.index)).index_add_(0, row_of, losses)
        logprob[list(batch.index)] = -sums.cpu().numpy()
    return answers.assign(logprob=logprob, n_tokens=[row.n_response for row in encoded])
