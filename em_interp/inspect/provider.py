"""The model provider `em_interp/...`: any Inspect evaluation, of a chat model with what is attached to it.

`--model em_interp/NAME`, where NAME is a folder, a name on the hub, an adapter or `pocket/...`, with `-M` for
`adapter`, `base`, `any_base`, `dtype`, `device_map`, `revision`; `steer=FILE:LAYER:COEFFICIENT` and
`ablate=FILE[:LAYER]`, several with commas between them, and `any_model`; and `tokens_per_batch`. In Python, of a model
in memory, `as_model`.

Answers are seeded one by one, as `em_interp.sample` does it: sample id and epoch decide, with Inspect's `--seed`.
Requests that wait at the same time become one `generate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import anyio
from anyio.to_thread import run_sync
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    modelapi,
)
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo

from em_interp.arguments import check_seed, count, did_you_mean, number
from em_interp.errors import EmInterpError, UsageError
from em_interp.evaluation.sampling import Answer
from em_interp.face import names
from em_interp.files.manifest import fingerprint
from em_interp.inspect.acting import Acting, Request, Settings, ablating, steering
from em_interp.interventions.intervening import Intervention
from em_interp.models.chat_model import ChatModel

AT_ONCE: Final = 256
"""Requests that Inspect sends at the same time, and so the most answers in one batch."""
MAX_NEW_TOKENS: Final = 600
"""Where a task does not say; the papers' number."""
_SETTLED: Final = 0.05
"""Seconds to wait for more requests before a batch is made."""
_LOADING: Final = ("adapter", "base", "any_base", "dtype", "device_map", "revision")
_ACTING: Final = ("steer", "ablate", "any_model", "tokens_per_batch")
_UNKNOWN: Final = (
    *("top_p", "top_k", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices", "best_of"),
    *("response_schema", "prompt_logprobs"),
)
"""Settings of Inspect that change an answer, and that our sampler does not have."""


@contextmanager
def errors_told() -> Iterator[None]:
    """Our errors as Inspect shows them: without a traceback, and with options of its own."""
    try:
        yield
    except EmInterpError as error:
        told = f"{type(error).__name__}: {error}"
        for name in ("any_model", "any_base"):
            told = told.replace(f"--{name.replace('_', '-')}", f"-M {name}=true")
        raise PrerequisiteError(told) from error


class ChatModelAPI(ModelAPI):
    """Asks an `Acting` model. `acting` stands in for what the other arguments would load."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect's own signature)
        acting: Acting | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if acting is None:
            with errors_told():
                acting = _loaded(model_name, model_args)
        self.acting = acting
        if config.max_connections is None:  # or Inspect begins with 20 at once
            config.max_connections = AT_ONCE
        self._waiting: list[Request] = []
        self._turn = anyio.Lock()
        self._asked: Counter[tuple[str, str]] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer; requests that come at the same time share a batch. Raises what `sampling.sample_rows` raises."""
        turns = _turns(input)
        request = Request(*self._seeded_by(turns), turns, _settings(tools, config))
        self._waiting.append(request)
        async with self._turn:
            if request.answer is None and request.error is None:
                known = 0
                while known < len(self._waiting) < AT_ONCE:
                    known = len(self._waiting)
                    await anyio.sleep(_SETTLED)
                batch, self._waiting = self._waiting, []
                await run_sync(self.acting.answer, batch)
        if request.answer is None:
            raise request.error or RuntimeError("a batch of answers was stopped")
        return self._output(request, request.answer, config)

    def max_connections(self) -> int:
        """The most answers in one batch."""
        return AT_ONCE

    def max_tokens(self) -> int:
        """Where a task does not say."""
        return MAX_NEW_TOKENS

    def collapse_user_messages(self) -> bool:
        """Templates refuse two turns of one role in a row."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Likewise."""
        return True

    def _seeded_by(self, turns: Sequence[Mapping[str, str]]) -> tuple[str, int]:
        """What decides the random numbers: sample id and epoch.

        Whatever is asked in a sample besides its own question, or again, has numbers of its own.
        """
        state, said = sample_state(), fingerprint([dict(turn) for turn in turns])[:16]
        again = self._asked[state.uuid if state else "", said]
        self._asked[state.uuid if state else "", said] += 1
        if state is None:
            return said, again
        own = state.input if isinstance(state.input, str) else [(m.role, m.text) for m in state.input]
        asked = [(turn["role"], turn["content"]) for turn in turns if turn["role"] != "system"]
        own = [("user", own)] if isinstance(own, str) else [turn for turn in own if turn[0] != "system"]
        key = str(state.sample_id) if asked == own else f"{state.sample_id} {said}"
        return (f"{key} {again}" if again else key), state.epoch - 1

    def _output(self, request: Request, answer: Answer, config: GenerateConfig) -> ModelOutput:
        text, stopped = _cut(answer.text, config.stop_seqs or ())
        logprobs = None
        if request.settings.top_logprobs is not None:
            said = answer.logprobs[: answer.n_tokens - answer.finished]
            logprobs = Logprobs(
                content=[
                    Logprob(
                        token=self._text(each.token),
                        logprob=each.logprob,
                        top_logprobs=[TopLogprob(token=self._text(token), logprob=p) for token, p in each.top],
                    )
                    for each in said
                ]
            )
        prompt = self.acting.prompt_tokens(request.turns)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=text, model=self.model_name, source="generate"),
                    stop_reason="stop" if answer.finished or stopped else "max_tokens",
                    logprobs=logprobs,
                )
            ],
            usage=ModelUsage(input_tokens=prompt, output_tokens=answer.n_tokens, total_tokens=prompt + answer.n_tokens),
        )

    def _text(self, token: int) -> str:
        return str(self.acting.chat.tokenizer.decode([token]))


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    if any(not isinstance(m.content, str) and len(m.text) == 0 for m in messages):
        raise UsageError("a message has no text. The provider em_interp takes text alone, no images or sound.")
    return [{"role": str(message.role), "content": message.text} for message in messages]


def _settings(tools: Sequence[ToolInfo], config: GenerateConfig) -> Settings:
    given = [name for name in _UNKNOWN if getattr(config, name) not in (None, 1, 1.0, 0, 0.0)]
    if tools:
        given.append("tools")
    if given:
        raise UsageError(
            f"the provider em_interp has no {', '.join(given)}. Leave them out; it has temperature, max_tokens, seed, "
            "stop_seqs and logprobs with top_logprobs."
        )
    if config.logprobs and config.stop_seqs:
        raise UsageError("the provider em_interp tells log-probabilities of whole answers: leave stop_seqs out.")
    return Settings(
        seed=check_seed(config.seed or 0),
        max_new_tokens=count("max_tokens", config.max_tokens or MAX_NEW_TOKENS),
        temperature=number("temperature", 1.0 if config.temperature is None else config.temperature, at_least=0),
        top_logprobs=(config.top_logprobs or 0) if config.logprobs else None,
    )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stops, and whether there was one."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _several(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else str(value).split(",")


def _loaded(name: str, given: Mapping[str, Any]) -> Acting:
    """What a name and `-M` mean. Raises UsageError for what is not known, and what `em_interp.load` raises."""
    known = (*_LOADING, *_ACTING)
    for key in given:
        if key not in known:
            near = did_you_mean(key, known)
            raise UsageError(f"-M {key}: the provider em_interp takes {', '.join(known)}.{near}")
    chat = names.load(name, **{key: given[key] for key in _LOADING if key in given})
    any_model = bool(given.get("any_model", False))
    found: list[Intervention] = [steering(said, chat, any_model=any_model) for said in _several(given.get("steer"))]
    found += [ablating(said, chat, any_model=any_model) for said in _several(given.get("ablate"))]
    return Acting(chat, interventions=found, tokens_per_batch=int(given.get("tokens_per_batch", 65_536)))


@modelapi(name="em_interp")
def em_interp() -> type[ModelAPI]:
    """The provider, as Inspect looks for it."""
    return ChatModelAPI


def as_model(
    chat: ChatModel,
    *,
    adapter: str | None = None,
    interventions: Sequence[Intervention] = (),
    name: str | None = None,
    config: GenerateConfig | None = None,
) -> Model:
    """A chat model in memory, for `inspect_ai.eval(task, model=...)`: with one of its adapters, and interventions.

    adapter: by default whichever is active. name: what logs call it; by default the finetune's, or the model's. Raises
    what the interventions raise where they do not fit.
    """
    active = adapter or chat.active
    name = name or (chat.name if active is None else chat.sources.get(active, f"{chat.name}+{active}"))
    return model_of(Acting(chat, adapter, interventions), name, config)


def model_of(acting: Acting, name: str, config: GenerateConfig | None = None) -> Model:
    """What acts, as Inspect's model under a name."""
    config = config or GenerateConfig()
    make: Any = em_interp
    api = make(model_name=name, config=config, acting=acting)
    model = Model(api, config, {"acts": acting.identity[:16]})
    api.qualified_model_name = str(model)
    return model
