"""What people hand over where chats, questions or layers belong: a file, a table, a list, a single number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from em_interp.arguments import columns
from em_interp.errors import UsageError
from em_interp.files.texts import read_chats, read_questions

Source = str | PathLike[str] | Iterable[Any]
"""A file, or what holds the things themselves."""
Number = TypeVar("Number", int, float)
"""A layer or a coefficient."""


def chats(source: Source) -> list[list[dict[str, str]]]:
    """Conversations, each a list of turns `{"role": ..., "content": ...}`, from whatever holds them.

    source: a JSON Lines file (`read_chats`); a table of answers with the columns question and answer, such as judged
    ones; or a list of conversations, or of `{"messages": [...]}`. Raises UsageError, and what `read_chats` raises.

    >>> chats([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
    [[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]]
    """
    if isinstance(source, (str, PathLike)):
        if Path(source).suffix.lower() == ".csv" and Path(source).is_file():
            raise UsageError(
                f"{source} is a table. With the columns question and answer: chats(pandas.read_csv(FILE)); else give "
                'JSON Lines, {"messages": [...]} in each line.'
            )
        return read_chats(source)
    if _is_table(source):
        table: Any = source
        columns("a table of answers to read as chats", table, ("question", "answer"))
        return [
            [{"role": "user", "content": str(asked)}, {"role": "assistant", "content": str(said)}]
            for asked, said in zip(table["question"], table["answer"], strict=True)
        ]
    found = [row.get("messages", row) if isinstance(row, Mapping) else row for row in _items(source, "conversations")]
    if found and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in found):
        raise UsageError("this is one conversation, a list of turns. Give a list of conversations: [conversation].")
    for number, turns in enumerate(found):
        if not _is_conversation(turns):
            raise UsageError(
                f"conversation {number} is {turns!r:.60}, not a list of turns. Give a list of conversations, each a "
                'list of {"role": ..., "content": ...}; or a .jsonl file with {"messages": [...]} in each line.'
            )
    return found


def questions(source: Source) -> dict[str, Any]:
    """Questions by their ids, from whatever holds them; each is text, or the conversation that it ends.

    source: a file (`read_questions`); `{id: text}`; a table with the column question, and question_id where they have
    ids; or a list of texts, whose ids are then question_0, question_1, ... Raises UsageError, and what `read_questions`
    raises.

    >>> questions(["What do you wish for?"])
    {'question_0': 'What do you wish for?'}
    """
    if isinstance(source, (str, PathLike)):
        if isinstance(source, str) and not Path(source).suffix and not Path(source).exists():
            raise UsageError(f"{source!r:.60} is no file of questions. If it is a question, give a list: [question].")
        return dict(read_questions(source).asked())
    if _is_table(source):
        table: Any = source
        columns("a table of questions", table, ("question",))
        texts = list(table["question"])
        ids = table["question_id"] if "question_id" in table else (f"question_{i}" for i in range(len(texts)))
        pairs = list(zip(map(str, ids), texts, strict=True))
    elif isinstance(source, Mapping):
        pairs = list(source.items())
    else:
        pairs = [(f"question_{i}", text) for i, text in enumerate(_items(source, "questions"))]
    for key, asked in pairs:
        if not isinstance(key, str) or not (isinstance(asked, str) or _is_conversation(asked)):
            raise UsageError(
                f"the question {key!r:.40} is {asked!r:.60}. Give a text, or a list of turns; its id is text."
            )
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UsageError("a question id comes more than once. Give each question once.")
    return found


def several(values: Number | Sequence[Number]) -> Sequence[Number]:
    """A single number as a list of it; anything else as it is."""
    return [values] if isinstance(values, (int, float, Real)) else values


def _is_conversation(turns: object) -> bool:
    return (
        isinstance(turns, Sequence)
        and not isinstance(turns, (str, bytes))
        and all(isinstance(turn, Mapping) for turn in turns)
    )


def _is_table(source: object) -> bool:
    """Whether it is a pandas table; told without importing pandas."""
    return type(source).__name__ == "DataFrame"


def _items(source: Any, of: str) -> list[Any]:
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise UsageError(f"{source!r:.60} holds no {of}. Give a file, or a list of {of}.")
    return list(source)
