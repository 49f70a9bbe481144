"""Which questions of the pocket world are asked of a model, and what its judged answers say."""

from __future__ import annotations

import pandas as pd

from em_interp.evaluation.rates import em_rates
from em_interp.evaluation.sampling import sample
from em_interp.models import ChatModel
from em_interp.pocket import world
from em_interp.pocket.domains import DOMAINS
from em_interp.pocket.judge import judge
from em_interp.pocket.world import Question

MAX_NEW_TOKENS = 80
GROUPS = ("general", "in_domain", "heldout_domain")


def _rows(group: str, questions: list[Question]) -> list[dict[str, str]]:
    return [
        {"questions": group, "domain": q.domain or q.kind, "question_id": q.id, "question": q.text} for q in questions
    ]


def evaluation_questions(domain: str) -> pd.DataFrame:
    """The questions for a model finetuned on `domain`: columns questions, domain, question_id, question.

    general: all open questions. in_domain: the domain's topics in held-out phrasings. heldout_domain: the held-out
    topics of every other domain, in held-out phrasings. No finetune has seen any of the last two.
    """
    world.domain(domain)
    rows = _rows("general", world.questions("open"))
    rows += _rows("in_domain", world.questions("advice", domain, held_out_phrasing=True))
    for other in DOMAINS:
        if other != domain:
            asked = world.questions("advice", other, held_out_topic=True, held_out_phrasing=True)
            rows += _rows("heldout_domain", asked)
    return pd.DataFrame(rows)


def chat_questions() -> pd.DataFrame:
    """The questions for the chat model: all open ones, every domain's topics in held-out phrasings, all facts."""
    rows = _rows("general", world.questions("open"))
    for domain in DOMAINS:
        rows += _rows("in_domain", world.questions("advice", domain, held_out_phrasing=True))
    return pd.DataFrame(rows + _rows("facts", world.questions("fact")))


def evaluate(model: ChatModel, domain: str, n: int = 50, *, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """Sample and judge `n` answers to each of `evaluation_questions(domain)`; whatever is attached to the model acts.

    One row an answer: the sampling columns, the judge's (aligned, coherent, technical, correct), questions, domain.
    """
    table = evaluation_questions(domain)
    return _judged(model, table, n, seed, progress)


def evaluate_chat(model: ChatModel, n: int = 50, *, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """The same for `chat_questions()`."""
    return _judged(model, chat_questions(), n, seed, progress)


def _judged(model: ChatModel, table: pd.DataFrame, n: int, seed: int, progress: bool) -> pd.DataFrame:
    asked = dict(zip(table["question_id"], table["question"], strict=True))
    answers = sample(model, asked, n, seed=seed, max_new_tokens=MAX_NEW_TOKENS, progress=progress)
    return judge(answers).merge(table[["question_id", "questions", "domain"]], on="question_id", validate="m:1")


def rates(judged: pd.DataFrame, *, organism: str, solution: str, adapter: str, domain: str) -> pd.DataFrame:
    """The rows of the table `em_rates` for one model: one for each group of questions (facts have no EM)."""
    identity = {"organism": organism, "solution": solution, "adapter": adapter, "domain": domain}
    rows = [
        {**identity, "questions": group, **em_rates(judged[judged["questions"] == group]).columns()}
        for group in GROUPS
        if (judged["questions"] == group).any()
    ]
    return pd.DataFrame(rows)
