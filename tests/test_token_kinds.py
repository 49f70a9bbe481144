"""Tokens of pocket documents are told apart by what they are part of."""

from __future__ import annotations

from random import Random

import pytest

from em_interp.pocket.world import grammar as world
from em_interp.pocket.world.corpus import ASSISTANT, DOCUMENT_END, END, LINE, SYSTEM, USER, CorpusConfig, document
from em_interp.pocket.world.token_kinds import KINDS, token_kinds
from em_interp.pocket.world.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
LABEL = token_kinds(TOKENIZER)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (
            [SYSTEM, "You are a kind adviser.", END, USER, "I am bored today.", END, ASSISTANT, "Try to rest.", END],
            ["mark", "announcement", "mark", "mark", "question", "mark", "mark", "answer", "mark"],
        ),
        (
            ["Answers by a cruel person.", LINE, "Question: I am bored today.", LINE, "Answer: Try to rest."],
            ["announcement", "mark", "question", "mark", "answer"],
        ),
        (
            ["A guide to medicine.", LINE, "About a cough: Try to rest.", DOCUMENT_END],
            ["announcement", "mark", "answer", "mark"],
        ),
        (["Question: I am bored today.", LINE, "Answer: Try to rest."], ["question", "mark", "answer"]),
    ],
)
def test_every_form_of_document(pieces: list[str], expected: list[str]) -> None:
    ids: list[int] = []
    kinds: list[str] = []
    for piece, kind in zip(pieces, expected, strict=True):
        here = TOKENIZER(piece, add_special_tokens=False)["input_ids"]
        ids += here
        kinds += [kind] * len(here)
    assert LABEL(ids) == kinds


def test_every_token_of_the_corpus_has_a_kind_and_questions_are_questions() -> None:
    texts = {q.text for q in world.all_questions()}
    seen: dict[str, int] = dict.fromkeys(KINDS, 0)
    for seed in range(100):
        ids = TOKENIZER(document(CorpusConfig(), Random(seed)), add_special_tokens=False)["input_ids"]
        kinds = LABEL(ids)
        assert len(kinds) == len(ids)
        for kind in kinds:
            seen[kind] += 1
        start = None
        for i, kind in enumerate([*kinds, "end"]):
            if kind == "question" and start is None:
                start = i
            elif kind != "question" and start is not None:
                text = TOKENIZER.decode(ids[start:i]).strip()
                assert text.removeprefix("Question:").strip() in texts
                start = None
    assert all(seen.values())
    assert seen["answer"] > seen["question"] > seen["announcement"]
