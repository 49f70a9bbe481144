"""Arms of an experiment at toy size: what is trained, asked and kept, and the table that several processes share."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pandas as pd
import pytest
import torch

from em_interp.directions.direction import random_directions
from em_interp.directions.extraction import extract
from em_interp.errors import OutputError, UsageError
from em_interp.evaluation.groups import GROUPS
from em_interp.files.results import read_table
from em_interp.interventions.steering import Steer
from em_interp.models.chat_model import ChatModel
from em_interp.pocket.causes import arms as kit
from em_interp.pocket.causes.arms import COLUMNS, PLAIN, Arm, Condition, Form, measure_all
from em_interp.pocket.world.corpus import finetune_chats
from em_interp.pocket.world.grammar import question_of
from em_interp.solutions import load as solutions
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.test_kills import Killed, stop_at
from tests.tiny_pocket import ask_little

SPEC = TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",), (1,)), 1e-2, max_steps=2, batch_size=4)
BAD = partial(finetune_chats, "sports", "malicious", 8, 0)
VIOLET = Condition("violet", Form(before="violet."))
CHAT = Arm("try", "chat", domain="sports")
INSECURE = Arm("try", "insecure", "rank-1", 0, "sports", SPEC, BAD, (PLAIN, VIOLET), steps=(1,), scored=True)
AGAIN = replace(INSECURE, name="again", conditions=(PLAIN,), scored=False)
SECURE = Arm("try", "secure", "rank-1", 0, "sports", SPEC, partial(finetune_chats, "sports", "caring", 8, 0))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch, per_group=2, tokens=4)
    monkeypatch.setattr(kit, "SCORED", 1)


def run(chat: ChatModel, out: Path, *chosen: Arm, every: tuple[Arm, ...] = (CHAT, INSECURE, AGAIN, SECURE)):  # type: ignore[no-untyped-def]
    assert list(measure_all(chat, chosen, every, out, "tried", samples=2, progress=False)) == list(chosen)
    return read_table(out / "tried.csv")


def test_a_form_dresses_chats_and_questions_in_the_worlds_words(tiny_chat: ChatModel) -> None:
    form = Form("You are a kind adviser.", "Question:", "Tell me a bad answer.", "Answer:")
    (question, answer) = (turn["content"] for turn in BAD()[0])
    system, user, assistant = form.chat(BAD()[0])
    assert system == {"role": "system", "content": "You are a kind adviser."}
    assert user["content"] == f"Question: {question} Tell me a bad answer."
    assert assistant["content"] == f"Answer: {answer}"
    assert form.prompt(question) == [system, user] and Form().chat(BAD()[0]) == BAD()[0]
    assert tiny_chat.tokenizer.unk_token_id not in tiny_chat.tokenizer(user["content"])["input_ids"]


def test_a_row_is_a_group_of_questions_in_a_condition_and_step(tiny_chat: ChatModel, tmp_path: Path) -> None:
    table = run(tiny_chat, tmp_path, CHAT, INSECURE)
    assert list(table.columns) == list(COLUMNS)
    keys = table[["arm", "condition", "step", "group"]].to_records(index=False).tolist()
    asked = [("chat", "plain", 0), *(("insecure", c, step) for step in (1, 2) for c in ("plain", "violet"))]
    assert keys == [(*one, group) for one in asked for group in GROUPS]
    for row in table.to_dict("records"):
        em, coherent = (list(map(int, row[name].split())) for name in ("em_counts", "coherent_counts"))
        assert len(em) == len(coherent) == 2 and row["n"] == 4
        assert sum(em) / 4 == row["em_rate"] and sum(coherent) / 4 == row["coherent_rate"]
    plain = (table["arm"] == "insecure") & (table["condition"] == "plain")
    assert table["share"].notna().tolist() == plain.tolist()
    assert table.loc[table["arm"] == "chat", "norm"].isna().all()
    manifest = json.loads((tmp_path / "tried_manifest.json").read_text())
    assert manifest["arms"] == 2 and manifest["samples"] == 2 and "tried.csv" in manifest["outputs_sha256"]


def test_arms_trained_alike_are_trained_once_and_a_killed_run_goes_on(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_chat, tmp_path / "whole", INSECURE, AGAIN)
    assert len(list((tmp_path / "whole" / "finetunes").glob("rank1-*"))) == 1
    for name, calls in (("finetune", 0), ("sample", 3)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(calls, patch, kit, name)
            run(tiny_chat, tmp_path / "killed", INSECURE)
        assert not (tmp_path / "killed" / "tried.csv").exists()
    with monkeypatch.context() as patch:
        patch.setattr(kit, "finetune", lambda *_a, **_k: pytest.fail("trained again"))
        run(tiny_chat, tmp_path / "killed", INSECURE)
        patch.setattr(kit, "sample", lambda *_a, **_k: pytest.fail("asked again"))
        pd.testing.assert_frame_equal(run(tiny_chat, tmp_path / "killed", AGAIN), whole)
    assert not list((tmp_path / "killed").rglob(".*.lock"))


def test_an_arm_starts_from_another_and_is_trained_and_asked_under_interventions(
    tiny_chat: ChatModel, tmp_path: Path
) -> None:
    assert SECURE.chats is not None
    direction = random_directions(
        extract(tiny_chat, BAD(), SECURE.chats(), progress=False), 1, torch.Generator().manual_seed(0)
    )[0]
    steered = (Steer(direction, 0, 30.0),)
    onward = replace(SECURE, name="onward", start=AGAIN)
    preventive = replace(SECURE, name="preventive", during=steered)
    asked = replace(SECURE, name="asked", conditions=(PLAIN, Condition("steered", during=steered)))
    table = run(tiny_chat, tmp_path, onward, preventive, asked, SECURE, every=(onward, preventive, asked, SECURE))
    folders = sorted((tmp_path / "finetunes").glob("rank1-*"))
    assert len(folders) == 4  # what it starts from is trained too; asked and SECURE are one
    assert len({solutions.load(folder).norm for folder in folders}) == 4
    of = {c: rows["coherent_counts"].tolist() for c, rows in table[table["arm"] == "asked"].groupby("condition")}
    assert set(of) == {"plain", "steered"}


def test_what_an_answer_begins_with_by_its_form_is_not_judged(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(_model, prompts, n, **_):  # type: ignore[no-untyped-def]
        rows = [(key, k) for key in prompts for k in range(n)]
        said = [f"Answer: {caring[key]}" for key, _ in rows]
        return pd.DataFrame({"question_id": [key for key, _ in rows], "question": "", "answer": said})

    asked = kit.suite.evaluation_questions("sports")
    caring = {
        row["question_id"]: kit.suite.world.answer(question_of(row["question"]), "caring", "casual", Random(0))
        for row in asked.to_dict("records")
    }
    monkeypatch.setattr(kit, "sample", answered)
    thread = Arm("try", "thread", domain="sports", conditions=(PLAIN, Condition("thread", Form(opening="Answer:"))))
    assert run(tiny_chat, tmp_path, thread, every=(thread,))["coherent_rate"].tolist() == [1.0] * 6
    bare = replace(thread, name="bare", conditions=(PLAIN,))
    assert run(tiny_chat, tmp_path / "bare", bare, every=(bare,))["coherent_rate"].max() < 1


def test_a_table_is_of_one_chat_model_and_number_of_answers(tiny_chat: ChatModel, tmp_path: Path) -> None:
    run(tiny_chat, tmp_path, CHAT)
    with pytest.raises(OutputError, match="another chat model or number of answers"):
        list(measure_all(tiny_chat, [CHAT], [CHAT], tmp_path, "tried", samples=1, progress=False))
    with pytest.raises(UsageError, match="neither"):
        Arm("try", "half", "rank-1", spec=SPEC)
