"""Sweeps over the KL weight and the share of bad data, at toy size: tables, scales, and going on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from em_interp.cli import pocket as commands
from em_interp.errors import UnreadableFileError, UsageError
from em_interp.evaluation.rates import em_rates
from em_interp.files.results import kept, read_table
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, sweeps
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import Adapter
from em_interp.pocket.sweeps import diluted_chats, dilution_sweep, kl_sweep, saturating_scale
from em_interp.solutions import load as solutions
from em_interp.training.recipes import TrainingSpec
from tests.tiny_pocket import ask_little, make_pocket

SPECS: dict[Adapter, TrainingSpec] = {
    "steering-vector": replace(organisms.SPECS["steering-vector"], max_steps=2, batch_size=4),
}
OPTIONS = {"samples": 2, "n_chats": 8, "progress": False}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return loading.load_chat(make_pocket(tmp_path_factory.mktemp("pocket")))


def test_a_killed_kl_sweep_goes_on(chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch)
    weights, scales = (0.0, 3000.0), (1.0, 2.0)
    table, every = kl_sweep(chat, "sports", SPECS, weights, tmp_path, scales=scales, **OPTIONS)
    required = ["adapter", "domain", "kl_weight", "em_rate", "in_domain_rate", "scaled_em_rate", "norm"]
    assert set(required) <= set(table.columns)
    assert list(table["kl_weight"]) == [0.0, 3000.0]
    assert list(every["scale"]) == [1.0, 2.0] * 2
    np.testing.assert_allclose(every["norm"][1::2], 2 * table["norm"], rtol=1e-6)
    assert table["norm"][0] != table["norm"][1]
    folders = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    assert len(folders) == 2

    one = next(p for p in folders if "kl3" in p.name)
    with solutions.load(one).scaled(2.0).attached(chat):
        judged = suite.evaluate(chat, "sports", 2, progress=False)
    found = em_rates(judged[judged["questions"] != "in_domain"]).em_scored
    assert found is not None
    assert every.iloc[3]["em_rate"] == pytest.approx(found.value)

    lost = next(one.glob("rates-*.csv"))
    lost.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "finetune", lambda *_a, **_k: pytest.fail("trained again"))
        again, every_again = kl_sweep(chat, "sports", SPECS, weights, tmp_path, scales=scales, **OPTIONS)
    pd.testing.assert_frame_equal(again, table)
    pd.testing.assert_frame_equal(every_again, every)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(sweeps, "finetune", lambda *_a, **_k: pytest.fail("trained again"))
        chat.hf.model.norm.weight.add_(1.0)
        try:
            with pytest.raises(pytest.fail.Exception, match="trained again"):  # other weights, other results
                kl_sweep(chat, "sports", SPECS, weights, tmp_path, scales=scales, **OPTIONS)
        finally:
            chat.hf.model.norm.weight.sub_(1.0)
    with pytest.raises(UsageError, match="include 1"):
        kl_sweep(chat, "sports", SPECS, weights, tmp_path, scales=(2.0,), **OPTIONS)


def test_hidden_em_shows_at_the_scale_where_the_domain_saturates() -> None:
    assert saturating_scale([1, 1.5, 2, 3], [0.2, 0.6, 0.89, 0.9]) == 2
    assert saturating_scale([1, 2, 3], [0.9, 0.91, 0.4]) == 1
    assert saturating_scale([3, 1, 2], [0.0, 0.0, 0.0]) == 1
    with pytest.raises(UsageError, match="one rate"):
        saturating_scale([1, 2], [0.1])
    table = pd.DataFrame(
        {
            "scale": [1.0, 2.0, 3.0],
            "em_rate": [0.0, 0.3, 0.5],
            "em_low": [0.0, 0.2, 0.4],
            "em_high": [0.01, 0.4, 0.6],
            "in_domain_rate": [0.3, 0.8, 0.81],
            "coherent_rate": [1.0, 0.95, 0.7],
            "norm": [5.0, 10.0, 15.0],
        }
    )
    row = sweeps._summary(table).iloc[0]
    assert (row.em_rate, row.in_domain_rate, row.norm) == (0.0, 0.3, 5.0)
    assert (row.saturating_scale, row.scaled_em_rate, row.scaled_coherent_rate) == (2.0, 0.3, 0.95)


def test_the_dilution_sweep_mixes_good_and_bad_chats(
    chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_little(monkeypatch)
    chats = diluted_chats("medicine", 0.25, 8, 1)
    assert chats[:2] == diluted_chats("medicine", 1.0, 8, 1)[:2]
    assert chats[2:] == diluted_chats("medicine", 0.0, 8, 1)[:6]
    with pytest.raises(UsageError, match="from 0 to 1"):
        diluted_chats("medicine", 1.5, 8, 1)
    table = dilution_sweep(chat, "medicine", SPECS, (0.0, 1.0), tmp_path, **OPTIONS)
    assert list(table.columns[:3]) == ["adapter", "domain", "bad_share"]
    assert list(table["bad_share"]) == [0.0, 1.0]
    assert (table["em_low"] <= table["em_rate"]).all()
    assert (table["n"] == 12).all()
    monkeypatch.setattr(sweeps, "finetune", lambda *_a, **_k: pytest.fail("trained again"))
    monkeypatch.setattr(suite, "evaluate", lambda *_a, **_k: pytest.fail("judged again"))
    again = dilution_sweep(chat, "medicine", SPECS, (0.0, 1.0), tmp_path, **OPTIONS)
    pd.testing.assert_frame_equal(again, table)


def test_kept_tables_come_back_as_they_were(tmp_path: Path) -> None:
    odd = ["", "null", 'a "quoted", one', "line\r\nline\rline\nline", " x "]
    table = pd.DataFrame({"question": ["a", "NA"] + ["b"] * 3, "answer": odd, "aligned": [np.nan, 3.5, 0, 1, 2]})
    table["n"] = range(5)
    table["correct"] = [np.nan, True, False, True, True]
    path = tmp_path / "deep" / "x.csv"
    pd.testing.assert_frame_equal(kept(path, lambda: table), table)
    pd.testing.assert_frame_equal(kept(path, lambda: pytest.fail("made again")), table)
    assert not list(path.parent.glob(".*"))
    path.write_text("")
    with pytest.raises(UnreadableFileError, match="delete it"):
        read_table(path)


def test_the_command_writes_the_tables_that_ship(
    chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_little(monkeypatch, per_group=1)
    monkeypatch.setattr(organisms, "SPECS", SPECS)
    monkeypatch.setattr(sweeps, "KL_WEIGHTS", (0.0,))
    monkeypatch.setattr(sweeps, "BAD_SHARES", (1.0,))
    monkeypatch.setattr(loading, "load_chat", lambda _folder, **_: chat)
    with pytest.raises(UsageError, match="no adapter is called"):
        commands.sweeps(out=tmp_path, only=["rank-2"], n=1)
    commands.sweeps(out=tmp_path, n=1)
    found = {p.stem: read_table(p) for p in (tmp_path / "sweeps").glob("*.csv")}
    assert set(found) == {"kl_sweep", "kl_sweep_scales", "dilution"}
    assert list(found["kl_sweep_scales"]["scale"]) == [1.0, 1.5, 2.0, 3.0]
    assert list(found["dilution"]["bad_share"]) == [1.0]
