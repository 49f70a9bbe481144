"""Conversations to token ids, masks and padded batches, with spans decided by the chat template alone.

A response runs from the first token after the generation prompt to the end-of-turn token, included. No
generation prompt follows a finished conversation (the reference code's training text ends in an empty
assistant turn).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from em_interp.errors import ChatTemplateError
from em_interp.hooks import position_ids

Message = Mapping[str, str]
Conversation = Sequence[Message]
Side = Literal["left", "right"]
Tokenizer = Any  # a transformers tokenizer


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


@dataclass(frozen=True)
class Batch:
    """Padded conversations. `index` says which of the given conversations each row is."""

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

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.answer_mask.to(device), self.index)


def check_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template. Use the chat "
            "(instruct) "
            "model's tokenizer, or set tokenizer.chat_template."
        )


def render(tokenizer: Tokenizer, conversation: Conversation, *, generation_prompt: bool) -> str:
    """The conversation as the template's text."""
    check_template(tokenizer)
    for message in conversation:
        if not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"a message needs a text 'role' and 'content', found {dict(message)!r}.")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:  # jinja2 and template-raised errors of many kinds
        roles = [message["role"] for message in conversation]
        raise ChatTemplateError(f"the chat template refuses the roles {roles}: {error}.") from error
    return str(text)


def token_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of template text; the template has already written the special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation) -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to continue, generation prompt included."""
    if not conversation or conversation[-1]["role"] == "assistant":
        raise ChatTemplateError("a prompt must end with a message that is not the assistant's.")
    return token_ids(tokenizer, render(tokenizer, conversation, generation_prompt=True))


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _response_span(
    tokenizer: Tokenizer, full: tuple[int, ...], conversation: Conversation, turn: int
) -> tuple[int, int]:
    start_ids = prompt_ids(tokenizer, conversation[:turn])
    end_ids = token_ids(tokenizer, render(tokenizer, conversation[: turn + 1], generation_prompt=False))
    for what, part in (("prompt", start_ids), ("conversation up to the response", end_ids)):
        if full[: len(part)] != part:
            raise ChatTemplateError(
                f"turn {turn}: the tokens of the {what} are not a prefix of the whole conversation's "
                "tokens, so the "
                "response has no clear start. Strip white space at the start of the answer, end the "
                "conversation at "
                "this turn, or use a template that writes earlier turns and the generation prompt unchanged."
            )
    start, end = len(start_ids), len(end_ids)
    special = _special_ids(tokenizer)
    closing = [i for i in range(start, end) if full[i] in special]
    end = closing[-1] + 1 if closing else end
    if end - start < (2 if closing else 1):
        raise ChatTemplateError(f"turn {turn}: the response is empty once the template is applied.")
    return start, end


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
    if not conversation or conversation[-1]["role"] != "assistant":
        raise ChatTemplateError("a conversation to score must end with an assistant message.")
    full = token_ids(tokenizer, render(tokenizer, conversation, generation_prompt=False))
    wanted = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if turns == "last":
        wanted = wanted[-1:]
    spans = [_response_span(tokenizer, full, conversation, turn) for turn in wanted]
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


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """The token with which the template closes an assistant turn; None where it writes none."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ids = token_ids(tokenizer, render(tokenizer, probe, generation_prompt=False))
    start = len(prompt_ids(tokenizer, probe[:1]))
    special = _special_ids(tokenizer)
    closing = [i for i in ids[start:] if i in special]
    return closing[-1] if closing else None


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
    """
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
