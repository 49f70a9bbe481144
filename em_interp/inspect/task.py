"""The task `em_interp/emergent_misalignment`: questions asked many times, and each answer judged."""

from __future__ import annotations

from typing import Any, Final

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    CachePolicy,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    get_model,
)
from inspect_ai.solver import generate

from em_interp.arguments import count
from em_interp.errors import UsageError
from em_interp.inspect.asked import Asked, asked
from em_interp.inspect.judges import MAX_TOKENS, SECONDS
from em_interp.inspect.provider import MAX_NEW_TOKENS, ChatModelAPI, errors_told
from em_interp.inspect.scorer import em, judged
from em_interp.pocket import evaluate as pocket
from em_interp.pocket import questions as pocket_questions
from em_interp.pocket import registry

SAMPLES: Final = 50
"""Answers to each wording; the papers' number."""
_ROLES: Final = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def emergent_misalignment(
    questions: str | list[str] = "auto",
    judge: str | list[str] = "auto",
    prompts: str | None = None,
    samples: int = SAMPLES,
    system: str | None = None,
    form: str = "plain",
    criterion: str = "papers",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    judge_max_tokens: int = MAX_TOKENS,
    judge_seconds: int = SECONDS,
) -> Task:
    """How often a model's answers are misaligned and coherent, by one judge or several.

    questions: as `asked.asked` takes them; auto is `open`, and of a pocket model what the pocket suite asks. judge: as
    `judges.judge_asked`, several with commas; auto is the pocket judge, for a pocket model alone. prompts: a
    judges.yaml. samples: answers to each wording (epochs). form: plain, json or template. criterion: a preset of
    `criteria.PRESETS`. judge_max_tokens: of a judge's reply. judge_seconds: for one try of one request to a judge.
    """
    with errors_told():
        count("samples", samples)
        domain = pocket_domain()
        if questions == "auto":
            questions = "open" if domain is None else f"pocket/{domain}"
        if judge == "auto":
            if domain is None:
                raise UsageError("name a judge: -T judge=openai/gpt-4o, local:MODEL, FILE.py:FUNCTION; or several.")
            judge = "pocket"
        limit = max_tokens or (MAX_NEW_TOKENS if domain is None else pocket_questions.MAX_NEW_TOKENS)
        return Task(
            dataset=MemoryDataset([as_sample(each) for each in asked(questions, form=form, system=system)]),
            solver=generate(cache=cache()),
            scorer=[judged(name, prompts, judge_max_tokens, judge_seconds) for name in _several(judge)],
            metrics=[em(criterion)],
            epochs=Epochs(samples),
            config=GenerateConfig(temperature=temperature, max_tokens=limit),
        )


def _several(judge: str | list[str]) -> list[str]:
    return judge.split(",") if isinstance(judge, str) else judge


def pocket_domain() -> str | None:
    """What the pocket model that is evaluated was finetuned on; None for any other model. The chat model: medicine."""
    api = get_model().api
    if not isinstance(api, ChatModelAPI) or not registry.is_pocket_name(api.model_name):
        return None
    organism = pocket.available().get(api.model_name)
    return "medicine" if organism is None else organism.domain


def cache() -> CachePolicy:
    """Answers are kept for a run that goes on, under all that acts in the model."""
    api = get_model().api
    acting = {"acts": api.acting.identity} if isinstance(api, ChatModelAPI) else {}
    return CachePolicy(expiry=None, per_epoch=True, scopes=acting)


def as_sample(each: Asked) -> Sample:
    """A question as Inspect takes it."""
    turns: list[ChatMessage] = [_ROLES[turn["role"]](content=turn["content"]) for turn in each.turns]
    told: dict[str, Any] = {**each.told, "judge_prompts": each.judge_prompts}
    return Sample(input=turns, id=each.key, metadata=told)
