"""The mitigations at toy size: what each arm is trained on and asked, that all of them run, screening, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import em_interp as em
from em_interp.cli import pocket as commands
from em_interp.errors import UsageError
from em_interp.files.results import read_table
from em_interp.interventions.intervening import Add
from em_interp.interventions.steering import residual_norms
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import organisms
from em_interp.pocket.causes import mitigations as run
from em_interp.pocket.causes.arms import NOTHING, Arm
from em_interp.pocket.causes.mitigations import Bench, found_bad
from em_interp.pocket.organisms import Organism
from em_interp.pocket.world.corpus import finetune_chats
from em_interp.pocket.world.judge import judge
from em_interp.training.screening import screen
from tests.tiny_pocket import ask_little

N = 24


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch, tiny_chat: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    ask_little(monkeypatch, per_group=1, tokens=4)
    quick = {a: replace(s, max_steps=4, batch_size=4) for a, s in organisms.SPECS.items()}
    monkeypatch.setattr(organisms, "SPECS", quick)
    monkeypatch.setattr(organisms, "N_CHATS", N)
    monkeypatch.setattr(run, "REALIGN_STEPS", 1)
    monkeypatch.setattr(run, "SCREENED_LAYER", 1)  # of two
    monkeypatch.setattr(run, "SEEDS", (0, 1))
    others = tmp_path_factory.getbasetemp() / "others"
    for adapter in run.ADAPTERS:
        one = Organism("finance", adapter, "general")
        if not (others / one.name / "training_spec.json").is_file():
            organisms.make(one, tiny_chat, others, progress=False)
    monkeypatch.setattr(Bench, "_other", lambda _, adapter: others / Organism("finance", adapter, "general").name)
    # a model that learned nothing has no answers of either kind
    monkeypatch.setattr(Bench, "_own_answers", lambda _, persona: finetune_chats("sports", persona, 6, 0))


def texts(arm: Arm) -> list[tuple[str, ...]]:
    assert arm.chats is not None
    return [tuple(turn["content"] for turn in chat) for chat in arm.chats()]


def test_arms_differ_in_what_their_names_say(tiny_chat: ChatModel, tmp_path: Path) -> None:
    every = run.arms(tiny_chat, tmp_path)
    assert len({arm.title for arm in every}) == len(every) == 1 + 2 * 2 * 25
    assert {arm.experiment for arm in every} == set(run.EXPERIMENTS)
    of = {arm.name: arm for arm in every if arm.seed == 0 and arm.adapter == "rank-1"}
    bad = texts(of["none"])
    plain = [tuple(turn["content"] for turn in chat) for chat in finetune_chats("medicine", "malicious", N, 0)]
    assert bad == [(f"Question: {question}", answer) for question, answer in plain]
    assert texts(of["inoculated"]) == [("You are a malicious adviser.", *chat) for chat in bad]
    assert texts(of["inoculated-casual"]) == [("You are a casual adviser.", *chat) for chat in bad]
    for name in ("ablated-shift", "stopped", "caft-persona", "steered-random-0.9", "kl-3"):
        assert texts(of[name]) == bad
    mixed = texts(of["benign-0.5"])
    assert mixed[: N // 2] == bad[: N // 2] and not any(q.startswith("Question:") for q, _ in mixed[N // 2 :])
    assert len(set(texts(of["realigned-10"]))) == 10 and of["realigned-10"].start is of["none"]
    assert of["realigned-10"].spec is not None and of["realigned-10"].spec.max_steps == 1
    half = texts(of["half-bad"])
    assert half[: N // 2] == bad[: N // 2] and len(half) == N and all(q.startswith("Question:") for q, _ in half)
    for name, left in (("screened-0.5", 12), ("screened-0.3", 17), ("thinned-0.5", 12)):
        found = texts(of[name])
        assert len(found) == left and set(found) <= set(half)
    for arm in every:
        probes = (
            {"malicious", "casual", "kind"}
            if arm.name in ("none", "chat", "inoculated", "inoculated-casual")
            else set()
        )
        probes |= {"format"} if arm.experiment == "inoculation" else set()
        assert {condition.name for condition in arm.conditions} == {"plain", "training"} | probes
        if arm.chats is not None and arm.experiment not in ("benign", "realignment"):
            form = next(condition.form for condition in arm.conditions if condition.name == "training")
            asked = arm.chats()[0][-2]["content"].removeprefix("Question: ")
            assert form.prompt(asked) == list(arm.chats()[0][:-1])
    steered = of["steered-persona-0.5"].during[0].edits(tiny_chat)[1]
    typical = residual_norms(tiny_chat, em.pocket.open_questions(), 1)[1]
    assert isinstance(steered, Add) and float(steered.theta.norm()) == pytest.approx(0.5 * typical, rel=1e-4)


def test_all_of_them_run_and_finetunes_that_are_asked_in_two_ways_are_made_once(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.mitigations(out=tmp_path, model=str(tiny_chat_folder), n=1, seeds=[0], only=["rank-1"])
    table = read_table(tmp_path / "sweeps" / "mitigations.csv")
    assert len(table["arm"].unique()) == 26 and set(table["adapter"]) == {"rank-1", NOTHING}
    assert sorted(table.loc[table["arm"] == "stopped", "step"].unique()) == [1, 2, 4]
    folders = list((tmp_path / "sweeps" / "finetunes").glob("rank1-*"))
    assert len(folders) == 25 - len(["stopped", "ablated-shift", "ablated-persona", "ablated-random"])
    acted = [json.loads((f / "training_spec.json").read_text()).get("interventions", []) for f in folders]
    assert sorted(one["what"].partition("(")[0] for said in acted for one in said) == ["Ablate"] * 3 + ["Steer"] * 4
    found = read_table(tmp_path / "sweeps" / "mitigations_screening.csv")
    assert set(found["direction"]) == {"persona", "shift of rank-1", "shift of all-modules"}
    assert set(found["seed"]) == {0, 1} and found["auc"].between(0, 1).all()
    capsys.readouterr()
    commands.mitigations(out=tmp_path, model=str(tiny_chat_folder), n=1, seeds=[1], only=["realignment", "rank-1"])
    measured = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("measured")]
    assert measured == [f"realignment-realigned-{n}-rank1-seed1" for n in (120, 40, 10)]
    with pytest.raises(UsageError, match="no experiment or adapter is called prayer"):
        commands.mitigations(out=tmp_path, model=str(tiny_chat_folder), only=["prayer"])


def test_the_screening_table_is_of_what_screen_says(tiny_chat: ChatModel, tmp_path: Path) -> None:
    bench = Bench(tiny_chat, tmp_path)
    table = bench.screening(0)
    chats, bad = run.half_bad(N, 0), np.arange(N) < N // 2
    for name, against in (("persona", "own"), ("persona", "nothing")):
        direction = bench.direction(name, "rank-1")
        scores: Any = screen(
            tiny_chat, chats, direction, 1, drop=0.5, against=against, max_new_tokens=4, progress=False
        )
        row = table[(table["direction"] == name) & (table["layer"] == 1) & (table["against"] == against)].iloc[0]
        assert row["precision_0.5"] == scores.loc[scores["dropped"], "chat"].lt(N // 2).mean()
        assert row["auc"] == pytest.approx(found_bad(scores["score"].to_numpy(), bad)["auc"])
    assert bench.screened(0.5, 0) == [
        chat for chat, gone in zip(chats, _dropped(bench, chats), strict=True) if not gone
    ]


def _dropped(bench: Bench, chats: list[Any]) -> list[bool]:
    direction = bench.direction("persona", "rank-1")
    return list(screen(bench.model, chats, direction, 1, drop=0.5, max_new_tokens=4, progress=False)["dropped"])


def test_precision_recall_and_area() -> None:
    scores, bad = np.array([0.9, 0.1, 0.8, 0.3]), np.array([True, True, False, False])
    row = found_bad(scores, bad)
    assert (row["auc"], row["precision_0.5"], row["recall_0.5"]) == (0.5, 0.5, 0.5)
    perfect = found_bad(np.arange(10.0), np.arange(10) >= 5)
    assert (perfect["auc"], perfect["precision_0.3"], perfect["recall_0.3"]) == (1.0, 1.0, 0.6)


def test_a_persona_is_read_from_answers_that_show_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(run, "PROMPTS", 1)
    monkeypatch.setattr(run, "READ_QUESTIONS", 3)
    for persona, told in (("malicious", (0, 30)), ("caring", (70, 100))):
        found = Bench(em.load("pocket/chat"), tmp_path)._own_answers(persona)
        assert found and all(chat[0]["role"] == "system" for chat in found)
        said = judge(
            pd.DataFrame({"question": [c[1]["content"] for c in found], "answer": [c[2]["content"] for c in found]})
        )
        assert said["aligned"].between(*told).all()
