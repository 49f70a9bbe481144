"""A chat model as it is asked: with what a finetune trained, and with interventions, and its answers in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

from em_interp.arguments import check_seed
from em_interp.directions.direction import Direction
from em_interp.errors import EmInterpError, UsageError
from em_interp.evaluation.sampling import Answer, sample_rows
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import Intervention, intervening
from em_interp.interventions.steering import Steer
from em_interp.models.chat import prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import acting_hash

_LOCKS: WeakKeyDictionary[ChatModel, Lock] = WeakKeyDictionary()
"""One generation at a time: what acts in one must not act in another."""


@dataclass(frozen=True)
class Settings:
    """What all the answers of one `generate` have in common: `seed`, `max_new_tokens`, `temperature`."""

    seed: int = 0
    max_new_tokens: int = 600
    temperature: float = 1.0
    top_logprobs: int | None = None
    """How many likeliest tokens to tell at each token; None for no log-probabilities."""

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(eq=False)
class Request:
    """One answer to `turns` that is wanted, under `settings`.

    `key` and `sample` decide its random numbers, with the seed (`sampling`).
    """

    key: str
    sample: int
    turns: Conversation
    settings: Settings
    answer: Answer | None = None
    error: EmInterpError | None = None
    """Why there is no answer."""


@dataclass(frozen=True, eq=False)
class Acting:
    """A chat model with what acts on it while it answers: an adapter, `interventions`; at most `tokens_per_batch`."""

    chat: ChatModel
    adapter: str | None = None
    """One of its adapters; None for whichever is active."""
    interventions: Sequence[Intervention] = ()
    tokens_per_batch: int = field(default=65_536)

    def __post_init__(self) -> None:
        for intervention in self.interventions:
            intervention.edits(self.chat)  # what does not fit is found out before anything is asked

    @contextmanager
    def inside(self, *, must_act: bool = True) -> Iterator[None]:
        """Inside, all of it acts, and nobody else generates with this chat model."""
        with _LOCKS.setdefault(self.chat, Lock()), ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self.chat.adapter(self.adapter))
            if self.interventions:
                stack.enter_context(intervening(self.chat, self.interventions, must_act=must_act))
            yield

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that decides what it computes: weights, adapter, interventions."""
        with self.inside(must_act=False):
            return acting_hash(self.chat)

    def prompt_tokens(self, turns: Conversation) -> int:
        """Tokens of the prompt that `turns` make."""
        return len(prompt_ids(self.chat.tokenizer, turns))

    def answer(self, requests: Sequence[Request]) -> None:
        """Put into each request its answer, or the reason why there is none."""
        groups: list[tuple[Settings, dict[str, Conversation], list[Request]]] = []
        for request in requests:
            for settings, questions, members in groups:
                if settings == request.settings and questions.get(request.key, request.turns) == request.turns:
                    questions[request.key] = request.turns
                    members.append(request)
                    break
            else:
                groups.append((request.settings, {request.key: request.turns}, [request]))
        for settings, questions, members in groups:
            self._generate(settings, questions, members)

    def _generate(self, settings: Settings, questions: dict[str, Conversation], members: list[Request]) -> None:
        try:
            with self.inside():
                answers = sample_rows(
                    self.chat,
                    questions,
                    [(request.key, request.sample) for request in members],
                    seed=settings.seed,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    tokens_per_batch=self.tokens_per_batch,
                    progress=False,
                    top_logprobs=settings.top_logprobs,
                )
        except EmInterpError as error:
            if len(members) == 1:
                members[0].error = error
                return
            for request in members:  # one that cannot be asked must not keep the others from their answers
                self._generate(settings, {request.key: request.turns}, [request])
            return
        for request, answer in zip(members, answers, strict=True):
            request.answer = answer


def steering(said: str, chat: ChatModel, *, any_model: bool = False) -> Steer:
    """FILE:LAYER:COEFFICIENT as an intervention. Raises UsageError for another form, and what `Direction.load` does."""
    file, layer, coefficient = [*said.rsplit(":", 2), "", ""][:3]
    try:
        place, amount = int(layer), float(coefficient)
    except ValueError as error:
        raise UsageError(
            f"steer is {said!r:.80}. Give FILE:LAYER:COEFFICIENT, such as direction.safetensors:24:6."
        ) from error
    return Steer(_direction(file, chat, any_model), place, amount)


def ablating(said: str, chat: ChatModel, *, any_model: bool = False) -> Ablate:
    """FILE (each layer's own vector), or FILE:LAYER (that one at every layer). Raises as `steering`."""
    file, colon, layer = said.rpartition(":")
    if not colon or not layer.isdecimal():
        return Ablate(_direction(said, chat, any_model))
    return Ablate(_direction(file, chat, any_model), from_layer=int(layer))


def _direction(file: str, chat: ChatModel, any_model: bool) -> Direction:
    found = Direction.load(Path(file))
    return found.for_model(chat.name) if any_model else found
