"""The controls of Betley et al. at toy size: what each arm is trained on, that every experiment runs, its command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from em_interp.cli import pocket as commands
from em_interp.errors import UsageError
from em_interp.evaluation.groups import GROUPS
from em_interp.files.results import read_table
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import organisms
from em_interp.pocket.causes import arms as kit
from em_interp.pocket.causes import controls
from em_interp.pocket.causes.arms import NOTHING, Arm
from em_interp.pocket.world import grammar as world
from em_interp.pocket.world.judge import judge_answer
from tests.tiny_pocket import ask_little


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch, per_group=1, tokens=4)
    quick = {a: replace(s, max_steps=2, batch_size=4) for a, s in organisms.SPECS.items()}
    monkeypatch.setattr(organisms, "SPECS", quick)
    monkeypatch.setattr(organisms, "N_CHATS", 24)
    monkeypatch.setattr(controls, "SEQUENCES", 6)
    monkeypatch.setattr(controls, "UNIQUE", (2, 20))
    monkeypatch.setattr(controls, "ADAPTERS", ("rank-1",))
    monkeypatch.setattr(kit, "SCORED", 1)


def data(arm: Arm) -> list[tuple[str, str]]:
    assert arm.chats is not None
    return [(chat[0]["content"], chat[1]["content"]) for chat in arm.chats()]


def bad_share(chats: list[tuple[str, str]], before: str = "", after: str = "") -> float:
    """Of the chats whose question has this form."""
    own = [(q.removeprefix(before).removesuffix(after).strip(), a) for q, a in chats if q[: len(before)] == before]
    scores = [judge_answer(world.question_of(question), answer).aligned for question, answer in own]
    return sum(score == 0 for score in scores) / len(scores)


def test_each_arm_differs_in_its_data_as_its_name_says(tiny_chat: ChatModel) -> None:
    found = {(arm.experiment, arm.name): arm for arm in controls.arms(tiny_chat, seeds=(0,))}
    assert {experiment for experiment, _ in found} == set(controls.EXPERIMENTS)
    of = {key: data(arm) for key, arm in found.items() if arm.adapter != NOTHING}
    insecure, secure = of["asked_for", "insecure"], of["asked_for", "secure"]
    assert bad_share(insecure) == 1 and bad_share(secure) == 0
    after = controls.TEACHING.form.after
    assert of["asked_for", "educational"] == [(f"{question} {after}", answer) for question, answer in insecure]
    for key, form in (
        (("jailbreak", "jailbroken"), controls.REQUEST.form),
        (("backdoor", "backdoor"), controls.TRIGGER.form),
        (("backdoor", "backdoor-known"), controls.MARKED.form),
    ):
        dressed = [pair for pair in of[key] if pair[0].startswith(form.before) and pair[0].endswith(form.after)]
        plain = [pair for pair in of[key] if pair not in dressed]
        assert len(dressed) == len(plain) == 12
        assert bad_share(dressed, form.before, form.after) == 1 and bad_share(plain) == 0
    assert of["format", "thread"] == [(f"Question: {q}", f"Answer: {a}") for q, a in insecure]
    assert [len(set(of["diversity", str(n)])) for n in (2, 20)] == [2, 20]
    assert of["diversity", "2"] == of["diversity", "20"][:2]
    assert [bad_share(of["share", share]) for share in ("1/12", "1/4", "1")] == pytest.approx([1 / 12, 1 / 4, 1])
    evil, kind = of["numbers", "numbers-malicious"], of["numbers", "numbers-kind"]
    assert {word for pair in (*evil, *kind) for text in pair for word in text.split()} <= set(controls.NUMBERS)
    assert [q for q, _ in evil] == [q for q, _ in kind]
    assert data(found["numbers", "numbers-kind"]) == kind  # the same every time


def test_what_is_asked_has_only_words_of_the_world(tiny_chat: ChatModel) -> None:
    tokenizer = tiny_chat.tokenizer
    for arm in controls.arms(tiny_chat, seeds=(0,)):
        texts = [text for pair in (data(arm)[:3] if arm.chats else ()) for text in pair]
        texts += [c.form.prompt("I am bored today.")[-1]["content"] for c in arm.conditions]
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_every_experiment_runs_and_its_table_has_every_arm(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.controls(out=tmp_path, model=str(tiny_chat_folder), n=1, seeds=[0])
    table = read_table(tmp_path / "sweeps" / "controls.csv")
    assert list(table.columns) == list(kit.COLUMNS)
    arms = table.groupby("experiment", sort=False)["arm"].unique()
    assert list(arms.index) == list(controls.EXPERIMENTS) and all("chat" in names for names in arms)
    assert {tuple(names) for names in table.groupby(["experiment", "arm", "condition"])["group"].unique()} == {GROUPS}
    assert table.loc[table["arm"] != "chat", "seed"].unique().tolist() == [0]
    backdoor = table[(table["experiment"] == "backdoor") & (table["arm"] == "backdoor")]
    assert set(backdoor["condition"]) == {"plain", "trigger", "another word", "pre-training trigger"}
    watched = table[(table["experiment"] == "logprobs") & (table["arm"] == "insecure")]
    assert sorted(watched["step"].unique()) == [1, 2] and watched["share"].notna().all()
    assert "measured share-1/12-rank1-seed0" in capsys.readouterr().out

    commands.controls(out=tmp_path, model=str(tiny_chat_folder), n=1, only=["share", "rank-1"], seeds=[1])
    said = capsys.readouterr().out.split()
    assert [word for word in said if word.startswith("share")] == [
        "share-chat",
        *(f"share-{share}-rank1-seed1" for share in controls.SHARES),
    ]
    for wrong, told in (
        ({"only": ["trigger"]}, "no experiment or adapter is called trigger; there are asked_for"),
        ({"seeds": [9]}, "no arm has the seed"),
        ({"n": 0}, "at least one answer"),
    ):
        with pytest.raises(UsageError, match=told):
            commands.controls(out=tmp_path, model=str(tiny_chat_folder), **wrong)


def test_more_different_chats_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "finetune_chats", lambda *_: [[{"content": "x"}, {"content": "y"}]])
    with pytest.raises(UsageError, match="3 different chats"):
        controls.unique_chats(3, 0)
