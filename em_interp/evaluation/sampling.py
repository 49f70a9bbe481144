"""Answers at temperature 1, seeded answer by answer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from em_interp.arguments import check_seed, count
from em_interp.errors import UsageError
from em_interp.evaluation.recorded import Recorder, TokenLogprobs
from em_interp.files import given
from em_interp.files.given import Source
from em_interp.files.tables import Parts, say_kept
from em_interp.models.chat import Batch, Encoded, budget_groups, collate, pad_id, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout, rooms_for
from em_interp.models.hooks import position_ids
from em_interp.models.precision import exact
from em_interp.models.ranks import ranks
from em_interp.models.templates import Conversation, turns_of
from em_interp.models.weights import acting_hash
from em_interp.statistics.units import with_units

Questions = Mapping[str, str | Conversation]
"""id -> text, or the conversation that is to be continued. Answers know their question by the id."""


def as_conversation(question: str | Conversation, system: str | None = None) -> list[dict[str, str]]:
    """A question, or the turns before an answer, as a conversation; with a system prompt if given."""
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(m) for m in question]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def _uniforms(seed: int, question_id: str, sample: int, n: int) -> Float[np.ndarray, "n"]:
    """The random numbers of one answer: made from seed, question and sample number alone."""
    return np.random.default_rng([seed, zlib.crc32(question_id.encode()), sample]).random(n)


class _InverseCdf:
    """Leaves one token a row: the one at which the cumulative distribution passes the row's number.

    Greedy choice after it is exact sampling at this temperature. Order and batch do not matter.
    """

    def __init__(self, uniforms: Float[Tensor, "batch steps"], temperature: float) -> None:
        self.uniforms, self.temperature, self.step = uniforms, temperature, 0

    def __call__(
        self, input_ids: Int[Tensor, "batch token"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        del input_ids
        cdf = torch.softmax(exact(scores) / self.temperature, dim=-1).cumsum(-1)
        # times the last entry: rounding must not leave numbers beyond the end
        u = self.uniforms[:, self.step, None].to(cdf.device) * cdf[:, -1:]
        self.step += 1
        token = torch.searchsorted(cdf, u, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token.to(scores.device), 0.0)


class _TextStop:
    """Ends a row where the plain text that opens the next turn has been written."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.window = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Bool[Tensor, "batch"]:
        del scores
        self.window = min(self.window + 1, len(self.text.encode()) + 8)  # a token is at least one byte
        texts = self.tokenizer.batch_decode(input_ids[:, -self.window :], skip_special_tokens=True)
        return torch.tensor([self.text in text for text in texts], device=input_ids.device)


def _stop_ids(model: ChatModel) -> list[int]:
    """Ends of turns: the template's, the tokenizer's eos, and what the checkpoint lists as eos."""
    configured = getattr(model.hf.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids |= {model.tokenizer.eos_token_id, *turns_of(model.tokenizer).stop_ids}
    return sorted(int(i) for i in ids if i is not None)


@contextmanager
def _no_settings(hf: Any) -> Iterator[None]:
    """Inside, `generate` finds no settings of the checkpoint to fill up those that it was given."""
    own = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its `text`, without the end of turn."""

    text: str
    finished: bool
    """False where it was cut at max_new_tokens."""
    n_tokens: int
    """End of turn included."""
    logprobs: Sequence[TokenLogprobs] = ()
    """Of each of its tokens, where they were asked for."""


def _answer(model: ChatModel, tokens: list[int], stops: list[int], logprobs: Sequence[TokenLogprobs]) -> Answer:
    """The answer in generated tokens, up to the first end of turn."""
    turns = turns_of(model.tokenizer)
    end = next((t for t, token in enumerate(tokens) if token in stops), None)
    text = model.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    over = text.find(turns.stop_text) if turns.stop_text else -1
    if over < 0:
        n_tokens = len(tokens) if end is None else end + 1
        text = text if turns.end_id is not None else text.removesuffix(turns.end)
        return Answer(text, end is not None, n_tokens, logprobs[:n_tokens])
    read, last = 0, over + len(turns.end)
    while len(model.tokenizer.decode(tokens[:read], skip_special_tokens=True)) < last:
        read += 1
    return Answer(text[:over], True, read, logprobs[:read])


_FEWEST_ROWS: Final = 32
"""Smaller batches are run to their end as they are: a pass costs them little more than its overhead."""


class _ManyEnded:
    """Ends a `generate` once a fifth of its rows have ended: the others go on without them."""

    def __init__(self, stops: Sequence[int], rows: int) -> None:
        self.stops, self.ended = torch.tensor(stops), torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Bool[Tensor, "batch"]:
        del scores
        self.ended |= torch.isin(input_ids[:, -1].cpu(), self.stops)
        return (self.ended | (5 * self.ended.sum() >= len(self.ended))).to(input_ids.device)


def _rows_may_leave(hf: Any) -> bool:
    """Whether rows that have ended can be taken out of a batch that goes on: keys and values of all tokens are held.

    An intervention that tells prompt from response wraps `generate`, and has to see each answer in one call.
    """
    if "generate" in vars(hf) or not hf._supports_default_dynamic_cache():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=hf.config.get_text_config()).layers)


@dataclass(frozen=True)
class _Asking:
    """How the rows of a batch are answered."""

    model: ChatModel
    stops: list[int]
    pad: int
    stop_text: str | None
    temperature: float

    def generate(
        self,
        batch: Batch,
        room: int,
        uniforms: Float[np.ndarray, "batch steps"],
        around: Callable[[Sequence[int]], AbstractContextManager[Any]],
        recorder: Recorder | None,
    ) -> list[list[int]]:
        """At most `room` new tokens a row; what follows a row's first stop means nothing.

        around: as for `sample_rows`, of positions in the batch. Rows that have ended leave the batch from time to time.
        """
        ids, mask, width = batch.input_ids, batch.attention_mask, batch.input_ids.shape[1]
        rows, cache = np.arange(len(ids)), None
        new: list[list[int]] = [[] for _ in rows]
        while len(rows) and ids.shape[1] < width + room:
            with around(rows.tolist()), _no_settings(self.model.hf):
                leaving = len(rows) >= _FEWEST_ROWS and not self.stop_text and _rows_may_leave(self.model.hf)
                options = self._options(room - (ids.shape[1] - width), uniforms[rows, ids.shape[1] - width :], leaving)
                if recorder is not None:
                    options["logits_processor"] = [recorder.of(rows.tolist()), *options.get("logits_processor", ())]
                out = self.model.hf.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=position_ids(mask),
                    **({} if cache is None else {"past_key_values": cache}),
                    **options,
                )
            ids, cache = out.sequences, out.get("past_key_values")
            if recorder is not None:
                recorder.settle(ids[:, -1])
            for row, tokens in zip(rows.tolist(), ids[:, width:].tolist(), strict=True):
                new[row] = tokens
            if not leaving:
                break
            ended = torch.isin(ids[:, width:], torch.tensor(self.stops, device=ids.device)).any(dim=1)
            going = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(going)
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)[going]
            ids, rows = ids[going], rows[going.cpu().numpy()]
        return new

    def _options(self, room: int, uniforms: Float[np.ndarray, "batch steps"], leaving: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"stopping_criteria": []}
        if self.temperature > 0:
            options["logits_processor"] = [_InverseCdf(torch.from_numpy(uniforms), self.temperature)]
        if self.stop_text:
            options["stopping_criteria"].append(_TextStop(self.model.tokenizer, self.stop_text))
        if leaving:
            options["stopping_criteria"].append(_ManyEnded(self.stops, len(uniforms)))
        options["generation_config"] = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.stops,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
        )
        return options


def _no_context(_group: Sequence[int]) -> AbstractContextManager[Any]:
    return nullcontext()


def _groups(
    sizes: Sequence[tuple[int, int]], rows: Sequence[int], tokens_per_batch: int
) -> list[tuple[list[int], int]]:
    """Batches of rows and their room: those of one batch have the same. sizes: (prompt length, room for the answer)."""
    found = []
    for room in sorted({sizes[i][1] for i in rows}):
        members = [i for i in rows if sizes[i][1] == room]
        groups = budget_groups([sizes[i][0] + room for i in members], tokens_per_batch)
        found += [([members[j] for j in group], room) for group in groups]
    return found


def _prompts(model: ChatModel, questions: Questions, system: str | None) -> dict[str, Encoded]:
    conversations = {key: as_conversation(question, system) for key, question in questions.items()}
    return {key: Encoded(prompt_ids(model.tokenizer, turns), ()) for key, turns in conversations.items()}


@torch.no_grad()
def sample_rows(
    model: ChatModel,
    questions: Questions,
    rows: Sequence[tuple[str, int]],
    *,
    seed: int = 0,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    system: str | None = None,
    tokens_per_batch: int = 65_536,
    progress: bool = True,
    around: Callable[[Sequence[int]], AbstractContextManager[Any]] = _no_context,
    parts: Parts | None = None,
    top_logprobs: int | None = None,
) -> list[Answer]:
    """One answer for each (question id, sample number), which decide its random numbers with `seed`; see `sample`.

    A pair may come several times. around: a context for each batch, made from the numbers of the rows in it, in their
    order: so that rows can be treated differently within one `generate`; entered anew when rows have left. parts: where
    finished batches are kept, and taken from by a later run. Of the checkpoint's generation settings none acts, but
    that its eos tokens end an answer too. top_logprobs: `Answer.logprobs` tells each token's log-probability at
    temperature 1, and those of so many likeliest tokens there; they are not kept in parts.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise UsageError(f"nothing to sample: max_new_tokens={max_new_tokens}, temperature={temperature}.")
    if top_logprobs is not None and parts is not None:
        raise UsageError("log-probabilities of sampled tokens are not kept in parts: ask for one of the two.")
    max_new_tokens, temperature = int(max_new_tokens), float(temperature)
    if top_logprobs is not None:
        count("top_logprobs", top_logprobs, at_least=0, at_most=model.hf.config.get_text_config().vocab_size)
    _check_asked(questions, rows)
    check_seed(seed)
    refuse_dropout(model.hf)
    prompts = _prompts(model, questions, system)
    rooms = dict(zip(prompts, rooms_for(model.hf, [len(row) for row in prompts.values()], max_new_tokens), strict=True))
    encoded = [prompts[key] for key, _ in rows]
    stops, pad, stop_text = _stop_ids(model), pad_id(model.tokenizer), turns_of(model.tokenizer).stop_text
    asking = _Asking(model, stops, pad, stop_text, temperature)
    answers: dict[int, Answer] = {}
    sizes = [(len(row), rooms[key]) for row, (key, _) in zip(encoded, rows, strict=True)]
    us = ranks()
    mine = us.share(sorted(range(len(rows)), key=lambda i: (sum(sizes[i]), i))) if us.n > 1 else range(len(rows))
    groups = _groups(sizes, mine, tokens_per_batch)
    places = {}
    if parts is not None:
        made_by = [acting_hash(model), seed, max_new_tokens, temperature, stops, stop_text]
        for number, (group, _) in enumerate(groups):
            places[number] = parts.path(group, [made_by, [[*rows[i], encoded[i].ids] for i in group]])
            answers |= {i: Answer(*given) for i, given in zip(group, parts.read(places[number]), strict=False)}
        say_kept(len(answers), len(mine), "answers")
    hidden = not (progress and us.is_first)
    with tqdm(total=len(mine), initial=len(answers), desc="sample", disable=hidden, leave=False) as bar:
        for number, (group, room) in enumerate(groups):
            if group[0] in answers:
                continue
            batch = collate(encoded, group, pad=pad, side="left").to(model.device)
            uniforms = np.stack([_uniforms(seed, *rows[i], room) for i in group])

            def of(positions, group=group):
                # type: (Sequence[int], Sequence[int]) -> AbstractContextManager[Any]
                return around([group[position] for position in positions])

            recorder = None if top_logprobs is None else Recorder(top_logprobs, len(group))
            new = asking.generate(batch, room, uniforms, of, recorder)
            for place, (i, tokens) in enumerate(zip(group, new, strict=True)):
                answers[i] = _answer(model, tokens, stops, () if recorder is None else recorder.found[place])
            if parts is not None:
                parts.write(places[number], [astuple(answers[i])[:3] for i in group])
            bar.update(len(group))
    if us.n > 1:
        answers = {i: Answer(*fields) for i, fields in us.gather([(i, astuple(a)) for i, a in answers.items()])}
    return [answers[i] for i in range(len(rows))]


def sample(
    model: ChatModel,
    questions: Source,
    n: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    system: str | None = None,
    tokens_per_batch: int = 65_536,
    progress: bool = True,
    parts: Parts | None = None,
) -> pd.DataFrame:
    """n answers a question; whatever is attached to the model acts.

    questions: a list of texts, {question_id: text, or the conversation to continue}, a table or a file
    (`em_interp.questions`). Columns question_id, question (text of the last turn), sample, answer, finished (False: cut
    at max_new_tokens), n_tokens (end of turn included). Answer (id, k) is the same whatever n, the other questions and
    the batches are, but for rounding. temperature 0 takes the likeliest token. An answer is cut at max_new_tokens, or
    where the model's text limit leaves fewer (`architectures.text_limit`). Raises TextLimitError for a prompt that
    leaves none, UsageError, ChatTemplateError, ModelError (active dropout). parts: as for `sample_rows`.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> answers = em.sample(chat, ["What do you wish for?"], n=2, max_new_tokens=40, progress=False)
    >>> list(answers)
    ['question_id', 'question', 'sample', 'answer', 'finished', 'n_tokens']
    """
    questions = given.questions(questions)
    if not questions or n < 1:
        raise UsageError(f"nothing to sample: {len(questions)} questions, n={n}.")
    rows = [(key, k) for key in questions for k in range(n)]
    answers = sample_rows(
        model,
        questions,
        rows,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        system=system,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        parts=parts,
    )
    return answer_table(questions, rows, answers)


def _check_asked(questions: Questions, rows: Sequence[tuple[str, int]]) -> None:
    if unknown := sorted({key for key, _ in rows} - set(questions)):
        raise UsageError(f"rows name questions that are not given: {', '.join(map(repr, unknown[:5]))}.")


def answer_table(questions: Questions, rows: Sequence[tuple[str, int]], answers: Sequence[Answer]) -> pd.DataFrame:
    """The columns that `sample` promises, one row for each of `rows`."""
    _check_asked(questions, rows)
    if len(rows) != len(answers):
        raise UsageError(f"{len(answers)} answers for {len(rows)} rows: give one for each.")
    table = pd.DataFrame(
        {
            "question_id": [key for key, _ in rows],
            "question": [as_conversation(questions[key])[-1]["content"] for key, _ in rows],
            "sample": [k for _, k in rows],
            "answer": [answer.text for answer in answers],
            "finished": [answer.finished for answer in answers],
            "n_tokens": [answer.n_tokens for answer in answers],
        }
    )
    return with_units(table)
