"""What a chat template writes around answers, found by comparing conversations that it rendered.

Two conversations that differ in one answer differ in nothing but its text, so what stands before and after it is what
the template adds. The end of a turn is what follows an answer both at the end of a conversation and before another
user turn: what is written once, after the last turn (the eos of Phi-3), is none.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from em_interp.arguments import is_unicode
from em_interp.errors import ChatTemplateError
from em_interp.files.texts import ROLES

Message = Mapping[str, str]
"""One turn: {"role": one of `texts.ROLES`, "content": text}."""
Conversation = Sequence[Message]
"""Turns in their order, a system prompt first if there is one."""
Tokenizer: TypeAlias = PreTrainedTokenizerBase
"""A tokenizer of transformers."""

_ONE, _OTHER = "quick", "lazy"  # they share neither the first letter nor the last
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Turns:
    """How a template writes turns. It holds no tokenizer, so that it can be kept as long as its tokenizer lives."""

    extra: str
    """The opening of an assistant turn, where the template has no generation prompt."""
    surplus: str
    """What the generation prompt says beyond the opening of a finished turn (a `<think>`)."""
    end: str
    """The end of a turn; empty where the template writes none."""
    tail: str
    """What is written after the end of the last turn."""
    end_id: int | None
    """The token that `end` ends with; None for plain text."""
    tail_tokens: int
    """Tokens of `tail`; where there is an `end_id`, no text before it changes them."""
    stop_ids: frozenset[int]
    """Tokens after which an assistant turn is over."""
    stop_text: str
    """Where `end_id` is None: the plain text that opens the next user turn."""
    control: re.Pattern[str]
    """Text that the tokenizer reads as a special token, one-letter tokens (an `!` for padding) aside."""
    refused: Mapping[str, str]
    """Role -> what the template does instead of writing it."""

    def check(self, conversation: Conversation) -> None:
        """Raise ChatTemplateError for messages that the template cannot write as they are meant."""
        for message in conversation:
            known = message if isinstance(message, Mapping) else {}
            role, content = known.get("role"), known.get("content")
            if not isinstance(content, str) or not isinstance(role, str):
                raise ChatTemplateError(f"a message needs a text 'role' and 'content', found {message!r}.")
            if not is_unicode(content):
                raise ChatTemplateError(f"a {role} message holds half of a surrogate pair: {content!r:.60}.")
            if role not in ROLES:
                raise ChatTemplateError(f"the role {role!r} is not known. Write it as one of {', '.join(ROLES)}.")
            if role in self.refused:
                raise ChatTemplateError(
                    f"the chat template does not know the role {role!r}: it {self.refused[role]}. Put the text into "
                    "a user message."
                )
            if found := self.control.search(content):
                raise ChatTemplateError(
                    f"a {role} message contains {found.group()!r}, which the tokenizer reads as a special token, not "
                    "as text. Take it out of the message: the template writes special tokens itself."
                )


_KNOWN: WeakKeyDictionary[Tokenizer, tuple[object, Turns]] = WeakKeyDictionary()


def turns_of(tokenizer: Tokenizer) -> Turns:
    """How the template writes turns, proved on two-turn conversations once for a tokenizer and template.

    Raises ChatTemplateError where there is no template, or it does not write turns so that they can be told apart.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ChatTemplateError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template. Use the chat "
            "(instruct) model's tokenizer, or set tokenizer.chat_template."
        )
    key = (template, len(tokenizer), tokenizer.all_special_tokens)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != key:
        known = _KNOWN[tokenizer] = (key, _prove(tokenizer))
    return known[1]


def check_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without a chat template, or whose template's turns cannot be told apart."""
    turns_of(tokenizer)


def prompt_text(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """The text of a conversation that the assistant is to continue."""
    return render(tokenizer, conversation, generation_prompt=True) + turns_of(tokenizer).extra


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """The token with which the template closes an assistant turn; None where it writes none, or plain text."""
    return turns_of(tokenizer).end_id


def token_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of template text; the template has already written the special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Tokenizer, conversation: Conversation, *, generation_prompt: bool) -> str:
    """The conversation as the template's text. Raises ChatTemplateError where the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation], tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # jinja2 and template-raised errors of many kinds
        roles = [dict(message).get("role") for message in conversation]
        raise ChatTemplateError(f"the chat template refuses the roles {roles}: {error}.") from error
    return str(text)


def common_suffix(one: str, other: str) -> str:
    """The longest text that both end with."""
    shortest = min(len(one), len(other))
    n = bisect(range(1, shortest + 1), 0, key=lambda n: one[-n:] != other[-n:])
    return one[len(one) - n :]


def _common_prefix(one: str, other: str) -> str:
    return common_suffix(one[::-1], other[::-1])[::-1]


def _try(tokenizer: Tokenizer, conversation: Conversation) -> str | None:
    try:
        return render(tokenizer, conversation, generation_prompt=True)
    except ChatTemplateError:
        return None


def _talk(answer: str | None = None, then: str | None = None) -> list[dict[str, str]]:
    said = [("user", "Well?"), ("assistant", answer), ("user", then)]
    return [{"role": role, "content": text} for role, text in said if text is not None]


def _around(texts: Sequence[str], what: str) -> tuple[str, str]:
    """What stands before and after `_ONE` in the first of two texts, the other having `_OTHER` there."""
    one, other = texts
    before, after = _common_prefix(one, other), common_suffix(one, other)
    if before + _ONE + after != one or before + _OTHER + after != other:
        raise ChatTemplateError(
            f"the chat template does not write {what} once and as it is given, so where it starts and ends cannot be "
            "told. Use a template that writes every turn of a conversation."
        )
    return before, after


def _prove(tokenizer: Tokenizer) -> Turns:
    def texts(conversations, generation_prompt):
        # type: (Any, bool) -> list[str]
        return [render(tokenizer, each, generation_prompt=generation_prompt) for each in conversations]

    finished = texts(map(_talk, (_ONE, _OTHER)), False)
    opening, last = _around(finished, "an answer")
    (prompt,), (bare,) = texts([_talk()], True), texts([_talk()], False)
    extra = surplus = ""
    if opening.startswith(prompt):
        written = opening[len(prompt) :]
        extra = written.rstrip(" ") if prompt == bare and written.strip() else ""
    elif prompt.startswith(opening.rstrip(" ")):
        surplus = prompt[len(opening.rstrip(" ")) :]
    else:
        raise ChatTemplateError(
            "what the chat template writes to have a question answered is not a prefix of the answered conversation, "
            "so a response has no clear start. Use a template that writes earlier turns and the generation prompt "
            "unchanged."
        )
    _, later = _around(texts([_talk(_ONE, "Then?"), _talk(_OTHER, "Then?")], True), "an earlier answer")
    asked, _ = _around(texts([_talk("Yes.", _ONE), _talk("Yes.", _OTHER)], True), "a later user message")
    between = asked[asked.rindex("Yes.") + len("Yes.") :]
    if not later.startswith(between) or not between.strip():
        raise ChatTemplateError(
            "the chat template writes nothing between an answer and the next user message, so they cannot be told "
            "apart. Use the template that the model was trained with."
        )
    added = _added(tokenizer)
    marks = _any_of(added)
    ends = [marks.search(text) for text in (last, between)]
    stop_ids = frozenset(added[mark.group()] for mark in ends if mark)
    closed, opened = ends
    if closed and opened and last[: closed.end()] == between[: opened.end()]:
        end, end_id, stop_text = last[: closed.end()], added[closed.group()], ""
    else:
        plain = [text[: mark.start()] if mark else text for text, mark in zip((last, between), ends, strict=True)]
        end, end_id = _common_prefix(*plain), None
        stop_text = plain[1].rstrip() if plain[1][len(end) :].strip() else ""
    tail, whole = last[len(end) :], finished[0]
    return Turns(
        extra=extra,
        surplus=surplus,
        end=end,
        tail=tail,
        end_id=end_id,
        tail_tokens=len(token_ids(tokenizer, whole)) - len(token_ids(tokenizer, whole.removesuffix(tail))),
        stop_ids=stop_ids,
        stop_text=stop_text,
        control=_any_of(text for text in _special(tokenizer) if len(text) > 1),
        refused=_refused(tokenizer),
    )


def _refused(tokenizer: Tokenizer) -> dict[str, str]:
    found = {}
    likes = {"system": ("user", "assistant"), "tool": ("system", "user", "assistant")}
    for role, before, after in (("system", [], _talk()), ("tool", _talk(_OTHER), [])):

        def written(role, text, before=before, after=after):
            # type: (str, str, Any, Any) -> str | None
            return _try(tokenizer, [*before, {"role": role, "content": text}, *after])

        text = written(role, _ONE)
        if text is None:
            continue  # the template itself refuses it
        if text == written(role, _OTHER):
            found[role] = "leaves it out"
        elif same := [other for other in likes[role] if written(other, _ONE) == text]:
            found[role] = f"writes it as {same[0]}"
    return found


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of the tokens that are cut out of a text before it is split into others; blank ones are no marks."""
    found = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    found |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {text: int(i) for text, i in found.items() if text.strip()}


def _special(tokenizer: Tokenizer) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if text.strip()}


def _any_of(texts: Any) -> re.Pattern[str]:
    """A pattern of any of these, the longest first."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else _NEVER
