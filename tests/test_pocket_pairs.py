"""Matched pairs at toy size: what differs between the two, the table, going on after a kill, and sharing a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from em_interp.cli import pocket as commands
from em_interp.errors import OutputError, UsageError
from em_interp.files.results import read_table
from em_interp.landscape import pairs as measures
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import organisms, pairs
from em_interp.pocket.pairs import Pair, measure_all
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from tests.test_kills import Killed, stop_at
from tests.tiny_pocket import ask_little

RANK1, VECTOR = Pair("sports", "rank-1"), Pair("sports", "steering-vector")
RATES = [f"rate_{group}_returned" for group in ("open", "elsewhere", "in_domain")]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch, per_group=1, tokens=4)
    quick = {a: replace(s, max_steps=2, batch_size=4) for a, s in organisms.SPECS.items()}
    monkeypatch.setattr(organisms, "SPECS", quick)
    monkeypatch.setattr(organisms, "N_CHATS", 8)
    monkeypatch.setattr(pairs, "CHATS", 6)
    monkeypatch.setattr(pairs, "DOCUMENTS", 3)
    monkeypatch.setattr(measures, "SCALES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(measures, "EPSILONS", (0.4,))


def run(chat: ChatModel, out: Path, *chosen: Pair) -> pd.DataFrame:
    assert list(measure_all(chat, chosen, out, samples=1, progress=False)) == list(chosen)
    return read_table(out / "pairs.csv")


def trained(out: Path) -> dict[str, Solution]:
    (folder,) = [p for p in (out / "pairs").iterdir() if p.is_dir() and "rank1" in p.name]
    return {name: solutions.load(folder / name) for name in ("general", "narrow", "kl-removed")}


def test_every_pair_that_claims_need_is_there() -> None:
    assert len({p.name for p in pairs.PAIRS}) == len(pairs.PAIRS) == 2 * 4 * (8 + 3 + 3)
    for pair in pairs.PAIRS:
        assert pair.spec().kl_weight > 0 and pair.spec().seed == pair.seed
    assert {p.adapter for p in pairs.PAIRS} >= {"nine", *organisms.ADAPTERS}


def test_a_row_is_the_live_measure_of_organisms_that_differ_in_kl_alone(tiny_chat: ChatModel, tmp_path: Path) -> None:
    table = run(tiny_chat, tmp_path, RANK1)
    assert list(table.columns) == list(pairs.COLUMNS)
    assert not table["measure"].duplicated().any() and set(RATES) <= set(table["measure"])
    assert (table["value"].isna() == (table["reason"] != "")).all()

    made = trained(tmp_path)
    live = measures.measure_pair(
        Landscape(tiny_chat, pairs.fresh_chats("sports", 6)),
        made["general"],
        made["narrow"],
        pairs.texts(3),
        kl_removed=made["kl-removed"],
    )
    row = table.set_index("measure")["value"]
    assert live.set_index("measure")["value"].to_dict() == pytest.approx(
        row[live["measure"]].to_dict(), rel=1e-6, abs=1e-9, nan_ok=True
    )
    for rate in RATES:
        before, after = (row[rate.replace("returned", name)] for name in ("narrow", "kl_removed"))
        assert row[rate] == after - before or before != before

    def told(which: str) -> dict[str, object]:
        (path,) = tmp_path.glob(f"pairs/*rank1*/{which}/training_spec.json")
        return dict(json.loads(path.read_text()))

    general, narrow = told("general"), told("narrow")
    assert {key for key in narrow if general[key] != narrow[key]} == {"kl_weight"}
    assert told("kl-removed") == general
    steps = [len(json.loads(p.read_text())["log_history"]) for p in tmp_path.rglob("trainer_state.json")]
    assert steps == 3 * [2 * organisms.NARROW["rank-1"].steps]


def test_a_killed_run_goes_on_and_several_share_a_folder(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tiny_chat, tmp_path / "whole", RANK1)
    parts = ((pairs, "finetune", 1), (measures, "efficiency_curves", 0), (measures, "_kls", 0), (pairs, "_rates", 2))
    for owner, name, calls in parts:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(calls, patch, owner, name)
            run(tiny_chat, tmp_path / "killed", RANK1)
        assert not (tmp_path / "killed" / "pairs.csv").exists()
    with monkeypatch.context() as patch:  # all of it is there but the last answers
        for owner, name in ((pairs, "finetune"), (measures, "efficiency_curves"), (measures, "_kls")):
            patch.setattr(owner, name, lambda *_a, **_k: pytest.fail("made again"))
        pd.testing.assert_frame_equal(run(tiny_chat, tmp_path / "killed", RANK1), whole)
    assert not list(tmp_path.rglob(".*"))

    both = run(tiny_chat, tmp_path / "killed", VECTOR)
    pd.testing.assert_frame_equal(both[both["adapter"] == "rank-1"].reset_index(drop=True), whole)
    assert set(both["adapter"]) == {"rank-1", "steering-vector"}
    assert json.loads((tmp_path / "killed" / "pairs_manifest.json").read_text())["pairs"] == 2
    monkeypatch.setattr(pairs, "_measured", lambda *_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(run(tiny_chat, tmp_path / "killed", RANK1, VECTOR), both)
    assert "kept 6 of 6 finetunes" in capsys.readouterr().err


def test_a_table_is_of_one_chat_model_and_number_of_answers(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_chat, tmp_path, VECTOR)
    with pytest.raises(OutputError, match="another chat model or number of answers"):
        list(measure_all(tiny_chat, [VECTOR], tmp_path, samples=2, progress=False))
    with pytest.raises(UsageError, match="samples"):
        list(measure_all(tiny_chat, [VECTOR], tmp_path, samples=0, progress=False))
    with torch.no_grad():
        tiny_chat.hf.model.norm.weight.add_(1.0)
        try:
            with pytest.raises(OutputError, match="another chat model"):
                run(tiny_chat, tmp_path, VECTOR)
        finally:
            tiny_chat.hf.model.norm.weight.sub_(1.0)
    monkeypatch.setattr(organisms, "N_CHATS", 12)  # other settings, other pairs: what was made before is left out
    table = run(tiny_chat, tmp_path, Pair("sports", "steering-vector", 1))
    assert set(table["seed"]) == {1}


def test_the_command_takes_a_part(tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Pair] = []
    monkeypatch.setattr(pairs, "measure_all", lambda _, chosen, *_a, **_k: measured.extend(chosen) or [])
    chosen = {"task": ["register"], "domain": ["medicine", "sports"], "seeds": [0, 5]}
    commands.pairs(out=tmp_path, model=str(tiny_chat_folder), only=["nine"], **chosen)
    assert [(p.domain, p.seed) for p in measured] == [("medicine", 0), ("medicine", 5), ("sports", 0)]
    assert {(p.adapter, p.task) for p in measured} == {("nine", "register")}
    for wrong, said in (
        ({"only": ["rank-2"]}, "no adapter is called"),
        ({"domain": ["cats"]}, "no domain is called"),
        ({"seeds": [9]}, "no seed is called"),
        ({"domain": ["sports"], "seeds": [5]}, "no such pair"),
        ({"n": 0}, "at least one answer"),
    ):
        with pytest.raises(UsageError, match=said):
            commands.pairs(out=tmp_path, **wrong)
