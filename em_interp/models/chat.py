"""Conversations to token ids, masks and padded batches, with spans decided by the chat template alone.

A response runs from the first token after the generation prompt to the end-of-turn token, included; what the template
appends after the last turn is not part of it. No generation prompt follows a finished conversation (the reference
code's training text ends in an empty assistant turn).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from em_interp.arguments import count
from em_interp.errors import ChatTemplateError, UsageError
from em_interp.models.hooks import position_ids
from em_interp.models.templates import Conversation as Conversation
from em_interp.models.templates import Message as Message
from em_interp.models.templates import Tokenizer as Tokenizer
from em_interp.models.templates import check_template as check_template
from em_interp.models.templates import common_suffix, prompt_text, turns_of
from em_interp.models.templates import end_of_turn_id as end_of_turn_id
from em_interp.models.templates import render as render
from em_interp.models.templates import token_ids as token_ids

Side = Literal["left", "right"]
"""Where a batch is padded."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids, with the half-open spans [start, end) of its scored responses."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_response(self) -> int:
        """Number of response tokens, end-of-turn tokens included."""
        return sum(end - start for start, end in self.spans)

    def tokens_of(self, scope: str) -> slice:
        """The tokens that a scope means; the response is the last one. Raises UsageError for an unknown scope."""
        start, end = self.spans[-1]
        scopes = {
            "prompt": slice(0, start),
            "last_prompt": slice(start - 1, start),
            "response": slice(start, end),
            "all": slice(0, len(self)),
        }
        if scope not in scopes:
            raise UsageError(f"scope {scope!r}: take one of {', '.join(scopes)}.")
        return scopes[scope]


@dataclass(frozen=True)
class Batch:
    """Padded conversations. `index` says which of the given conversations each row is.

    attention_mask is 0 at pads of input_ids; answer_mask is True at the tokens of scored responses.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Int[Tensor, "batch token"]
    answer_mask: Bool[Tensor, "batch token"]
    index: tuple[int, ...]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a transformers forward pass, positions included."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": position_ids(self.attention_mask),
        }

    def predicting(self) -> Bool[Tensor, "batch token"]:
        """True at the positions whose next token is a response token: where a response is scored."""
        scored = torch.zeros_like(self.answer_mask)
        scored[:, :-1] = self.answer_mask[:, 1:]
        return scored

    def targets(self) -> Int[Tensor, "n_response"]:
        """The response tokens, in the order in which `predicting()` picks positions."""
        return self.input_ids[self.answer_mask]

    def scope_weights(
        self, starts: Sequence[int], ends: Sequence[int], scopes: Sequence[str]
    ) -> Float[Tensor, "batch scope token"]:
        """1 at the tokens of each scope, 0 elsewhere and at pads, for either padding side; float32.

        starts, ends: each row's response [start, end), counted in its real tokens.
        """
        real, rank = self.attention_mask.bool(), position_ids(self.attention_mask)
        start, end = (rearrange(torch.tensor(given, device=rank.device), "row -> row 1") for given in (starts, ends))
        masks = {
            "prompt": real & (rank < start),
            "last_prompt": real & (rank == start - 1),
            "response": real & (rank >= start) & (rank < end),
            "all": real,
        }
        return rearrange([masks[scope] for scope in scopes], "scope row token -> row scope token").float()

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.answer_mask.to(device), self.index)


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation) -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to continue, generation prompt included."""
    turns_of(tokenizer).check(conversation)
    if not conversation or conversation[-1]["role"] == "assistant":
        raise ChatTemplateError("a prompt must end with a message that is not the assistant's.")
    return token_ids(tokenizer, prompt_text(tokenizer, conversation))


def _response_span(
    tokenizer: Tokenizer, text: str, full: tuple[int, ...], conversation: Conversation, turn: int
) -> tuple[int, int]:
    turns = turns_of(tokenizer)
    last = turn == len(conversation) - 1
    if not turn or conversation[turn - 1]["role"] == "assistant":
        raise ChatTemplateError(f"turn {turn}: the assistant answers nothing. Put a user message before it.")
    opening = prompt_text(tokenizer, conversation[:turn]).removesuffix(turns.surplus)
    rest = turns.end + turns.tail if last else _after(tokenizer, text, conversation, turn)
    if not text.startswith(opening) or not text.endswith(rest) or not rest.startswith(turns.end):
        raise ChatTemplateError(
            f"turn {turn}: the text of the prompt is not a prefix of the whole conversation's, or another text than "
            f"{turns.end!r} follows, so the response has no clear start or end. End the conversation at this turn, or "
            "use a template that writes earlier turns and the generation prompt unchanged."
        )
    stop = len(text) - len(rest)
    content, written = conversation[turn]["content"], text[len(opening) : stop]
    if not content or not (content.strip() or content in written):
        raise ChatTemplateError(
            f"turn {turn}: the response is empty once the template is applied. Drop it or end earlier."
        )
    if "".join(content.split()) not in "".join(written.split()):
        raise ChatTemplateError(
            f"turn {turn}: the template leaves out or rewrites a part of the answer, {content[:60]!r}. Give the answer "
            "without it (a block of thoughts, for example)."
        )
    start_ids = token_ids(tokenizer, opening)
    if last and turns.end_id is not None:
        end_ids = full[: len(full) - turns.tail_tokens]
    else:
        end_ids = token_ids(tokenizer, text[: stop + len(turns.end)])
    for what, part in (("prompt", start_ids), ("conversation up to the response", end_ids)):
        if full[: len(part)] != part or turns.end_id not in (None, end_ids[-1]):
            raise ChatTemplateError(
                f"turn {turn}: the tokens of the {what} are not a prefix of the whole conversation's tokens, so the "
                "response has no clear start. Strip white space at the start of the answer, end the conversation at "
                "this turn, or use a template that writes earlier turns and the generation prompt unchanged."
            )
    return len(start_ids), len(end_ids)


def _after(tokenizer: Tokenizer, text: str, conversation: Conversation, turn: int) -> str:
    """What the template writes after the answer of an earlier turn: what stays if that answer is another."""
    answer = conversation[turn]["content"]
    other = next(letter for letter in "xyz" if letter not in (answer[-1:], answer.rstrip()[-1:]))
    changed = [*conversation[:turn], {"role": "assistant", "content": other}, *conversation[turn + 1 :]]
    return common_suffix(text, render(tokenizer, changed, generation_prompt=False))


def encode(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    turns: Literal["last", "all"] = "last",
    empty_turn: bool = False,
) -> Encoded:
    """Ids of a conversation that ends with the assistant, with the span of its last (or of all) responses.

    empty_turn reproduces a defect: the reference's training text goes on with an empty assistant turn and
    eos, scored too. Its phase-transition figures depend on it.
    """
    turns_of(tokenizer).check(conversation)
    if not conversation or conversation[-1]["role"] != "assistant":
        raise ChatTemplateError("a conversation to score must end with an assistant message.")
    text = render(tokenizer, conversation, generation_prompt=False)
    full = token_ids(tokenizer, text)
    wanted = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if turns == "last":
        wanted = wanted[-1:]
    spans = [_response_span(tokenizer, text, full, conversation, turn) for turn in wanted]
    if empty_turn:
        opened = token_ids(tokenizer, render(tokenizer, conversation, generation_prompt=True))
        if opened[: len(full)] != full or tokenizer.eos_token_id is None:
            raise ChatTemplateError("this template or tokenizer cannot write the reference's empty turn.")
        full = (*opened, int(tokenizer.eos_token_id))
        spans.append((len(opened), len(full)))
    return Encoded(full, tuple(spans))


def encode_all(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    turns: Literal["last", "all"] = "last",
    empty_turn: bool = False,
    max_tokens: int | None = None,
) -> list[Encoded]:
    """`encode` for many. Refuses an empty list and anything longer than `max_tokens` (nothing is cut)."""
    if not len(conversations):
        raise ChatTemplateError("no conversations were given.")
    encoded: list[Encoded] = []
    for number, conversation in enumerate(conversations):
        try:
            encoded.append(encode(tokenizer, conversation, turns=turns, empty_turn=empty_turn))
        except ChatTemplateError as error:
            raise ChatTemplateError(f"conversation {number}: {error}") from error
        if max_tokens is not None and len(encoded[-1]) > max_tokens:
            raise ChatTemplateError(
                f"conversation {number} has {len(encoded[-1])} tokens, more than the limit of {max_tokens}. "
                "Raise the limit or drop the conversation: a cut response has no end."
            )
    return encoded


def unreadable(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> dict[int, ChatTemplateError]:
    """Position -> why, of finished conversations that the chat template cannot take, with which `encode_all` stops.

    An answer that begins with white space may be one: a real vocabulary joins it to what stands before.
    """
    found = {}
    for position, conversation in enumerate(conversations):
        try:
            encode(tokenizer, conversation)
        except ChatTemplateError as error:
            found[position] = error
    return found


def pad_id(tokenizer: Tokenizer) -> int:
    """An id to fill with; masked everywhere, so any valid id would do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def collate(encoded: Sequence[Encoded], index: Sequence[int], *, pad: int, side: Side = "right") -> Batch:
    """The conversations at `index`, padded to the longest of them."""
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    rows = [encoded[i] for i in index]
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    answer = np.zeros((len(rows), width), dtype=bool)
    for r, row in enumerate(rows):
        first = width - len(row) if side == "left" else 0
        ids[r, first : first + len(row)] = row.ids
        mask[r, first : first + len(row)] = 1
        for start, end in row.spans:
            answer[r, first + start : first + end] = True
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(answer), tuple(index))


def budget_groups(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices grouped by length, longest first, so that rows x longest row stays within `tokens_per_batch`.

    A row longer than the budget gets a group of its own. Longest first: memory runs out at once or never.
    Raises UsageError for a budget below 1.
    """
    count("tokens in a batch", tokens_per_batch)
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def batches(
    encoded: Sequence[Encoded], *, pad: int, tokens_per_batch: int = 8192, side: Side = "right"
) -> Iterator[Batch]:
    """All conversations in length-sorted, token-budgeted batches; `Batch.index` restores the order."""
    for group in budget_groups([len(row) for row in encoded], tokens_per_batch):
        yield collate(encoded, group, pad=pad, side=side)
