"""One reader for every command: what each format says, and what no format may say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from em_interp.errors import (
    AmbiguousDataError,
    BadValueError,
    EmInterpError,
    InputFileError,
    MissingDataError,
    UnreadableFileError,
    UsageError,
)
from em_interp.files.inputs import read_csv, read_text
from em_interp.files.texts import chats_read, read_chats, read_questions, read_texts

CHAT = [{"role": "user", "content": "a cough"}, {"role": "assistant", "content": "rest"}]
SAME = {  # two questions, the first with a system prompt, in every format
    "q.yaml": "- id: a\n  question: a fox\n  system: be brief\n- id: b\n  paraphrases: [a cough]\n",
    "q.yml": "- {id: a, question: a fox, system: be brief}\n- {id: b, question: a cough}\n",
    "q.jsonl": '{"question_id": "a", "question": "a fox", "system": "be brief"}\n\n{"id": "b", "question": "a cough"}',
    "chats.jsonl": '{"id": "a", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", '
    '"content": "a fox"}]}\n{"id": "b", "messages": [{"role": "user", "content": "a cough"}]}\n',
    "q.csv": 'question_id,question,system\na,a fox,be brief\n\nb,"a cough",\n',
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_line_end_and_byte_order_mark_gives_the_same_questions(
    name: str, ends: str, mark: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes((mark + SAME[name].replace("\n", ends)).encode())
    found = read_questions(path)
    assert found.asked() == {
        "a": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a fox"}],
        "b": [{"role": "user", "content": "a cough"}],
    }
    assert str(found) == f"{name}: 2 questions, 2 ids, 1 wording each, 1 with a system prompt"


def test_wordings_text_and_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text("- id: a\n  paraphrases: [x, y]\n- id: b\n  paraphrases: [z]\n")
    found = read_questions(tmp_path / "q.yaml")
    assert list(found.asked()) == ["a/0", "a/1", "b"]
    assert str(found) == "q.yaml: 3 questions, 2 ids, 1-2 wordings each"
    (tmp_path / "list.txt").write_text("\ufeffone\r\n\r\n two\u2028still two \r\n")
    assert [q.paraphrases[0] for q in read_questions(tmp_path / "list.txt").questions] == ["one", "two\u2028still two"]
    (tmp_path / "t.csv").write_text('question\nNA\n"why,\nso"\n')
    assert {k: t[0]["content"] for k, t in read_questions(tmp_path / "t.csv").asked().items()} == {
        "t_0": "NA",
        "t_1": "why,\nso",
    }
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, CHAT[0]]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_questions(str(tmp_path / "turns.jsonl")).asked() == {"turns_0": turns}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_only_line_feed_and_carriage_return_end_a_line(separator: str, tmp_path: Path) -> None:
    said = f"one{separator}two"
    row = {"messages": [{"role": "user", "content": said}, CHAT[1]]}
    path = tmp_path / "c.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    if ord(separator) < 32:
        text = json.dumps(row)
    path.write_text("\ufeff" + text + "\r\n", encoding="utf-8", newline="")
    (chat,) = read_chats(path)
    assert chat[0]["content"] == said
    assert chats_read(path, [chat]) == "c.jsonl: 1 conversation, 2 turns each"
    path.write_text(json.dumps({"text": said}, ensure_ascii=False), encoding="utf-8")
    assert list(read_texts(path)) == [said]


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("q.txt", SAME["q.yaml"], UnreadableFileError, "YAML.*yaml"),
        ("q", SAME["q.yaml"], UnreadableFileError, "YAML"),
        ("q.txt", "---\n- a\n", UnreadableFileError, "YAML"),
        ("q.txt", SAME["q.jsonl"], UnreadableFileError, "JSON Lines"),
        ("q.txt", SAME["q.csv"], UnreadableFileError, "CSV"),
        ("q.csv", SAME["q.yaml"], MissingDataError, "column question"),
        ("q.csv", "question,question\na,b\n", MissingDataError, "column question"),
        ("q.csv", 'question\n"a\n', UnreadableFileError, "CSV"),
        ("q.csv", "question,system\na,b,c\n", UnreadableFileError, "3 cells"),
        ("q.csv", "question\n", MissingDataError, "no question"),
        ("q.csv", "question_id,question\na,\n", BadValueError, "row 2 has no question"),
        ("q.csv", "", MissingDataError, "empty"),
        ("q.yaml", SAME["q.csv"], UnreadableFileError, "list of entries"),
        ("q.yaml", "[", UnreadableFileError, "YAML"),
        ("q.yaml", "", UnreadableFileError, "list of entries"),
        ("q.yaml", "- id: a\n- id: b\n  question: x\n", UnreadableFileError, "no wording"),
        ("q.yaml", "- id: a\n  paraphrases: ['x', ' ']\n", BadValueError, "empty wording"),
        ("q.yaml", "- id: a\n  question: x\n- question: y\n", UnreadableFileError, "without an id"),
        ("q.yaml", "- aligned: score {answer}\n", UnreadableFileError, "judge prompts"),
        ("q.yaml", "- id: a\n  question: x\n  system: [y]\n", BadValueError, "system"),
        ("q.yaml", "- id: a\n  question: x\n  samples_per_paraphrase: many\n", BadValueError, "whole number"),
        ("q.yaml", "- id: 1\n  question: x\n- id: '1'\n  question: y\n", AmbiguousDataError, "more than once: 1"),
        ("q.csv", "question_id,question\na,x\na,y\n", AmbiguousDataError, "more than once: a"),
        ("q.jsonl", '{"id": "a", "question": "x"}\n{"id": "a", "question": "y"}', AmbiguousDataError, "more than once"),
        ("q.jsonl", json.dumps({"messages": CHAT}), BadValueError, "line 1 is a chat with its answer"),
        ("q.jsonl", '{"text": "x"}', BadValueError, "no question"),
        ("q.jsonl", '{"question": 3}', BadValueError, "no question"),
        ("q.jsonl", '{"question": "x", "id": null}', BadValueError, "id"),
        ("q.jsonl", "[1]", UnreadableFileError, "not an object"),
        ("q.jsonl", "[" * 100_000, UnreadableFileError, "not JSON"),
        ("q.jsonl", "\n", MissingDataError, "no question"),
        ("q.txt", "\n \n", MissingDataError, "no question"),
        ("q.txt", b"\xff\xfe\xfa", UnreadableFileError, "UTF-8"),
        ("q.txt", "one".encode("utf-16"), UnreadableFileError, "binary"),
        ("q.pdf", "one", UnreadableFileError, "pdf"),
    ],
)
def test_what_is_no_question_file_is_refused(
    name: str, content: str | bytes, error: type[EmInterpError], told: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=told):
        read_questions(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"messages": [{"role": "human", "content": "x"}]}, "role 'human'.*system, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": None}]}, "not a conversation"),
        ({"messages": []}, "not a conversation"),
        ({"messages": {"role": "user", "content": "x"}}, "not a conversation"),
        ({"question": "x"}, "not a conversation: it has question"),
    ],
)
def test_what_is_no_chat_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(content))
    with pytest.raises(BadValueError, match=rf"line 2.*{told}"):
        read_chats(path)


@pytest.mark.parametrize(
    "reader", [read_questions, read_chats, lambda path: list(read_texts(path)), read_csv, read_text]
)
def test_what_is_no_regular_file_is_refused_without_opening_it(reader: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "null.txt").symlink_to("/dev/null")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name in ("fifo.txt", "link.txt", "folder.txt", "null.txt", "loop.txt", "absent.txt", "a" * 300 + ".txt", "\0"):
        with pytest.raises(InputFileError):
            reader(tmp_path / name)


def test_texts_are_not_read_from_other_formats(tmp_path: Path) -> None:
    for name, content in (("t.txt", '{"text": "x"}\n'), ("t.yaml", "- a\n"), ("t.csv", "text\nx\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UnreadableFileError, match="plain text"):
            list(read_texts(tmp_path / name))
    (tmp_path / "t.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(BadValueError, match="line 1"):
        list(read_texts(tmp_path / "t.jsonl"))
    with pytest.raises(UsageError, match="`text`"):
        list(read_texts([{"body": "x"}]))
