"""Worlds are read from a file, built, measured and held against a card that was written beforehand."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pandas as pd
import pytest

from em_interp.errors import UnreadableFileError, UsageError
from em_interp.files.results import read_table
from em_interp.pocket import worlds
from em_interp.pocket.scorecard import ROWS, scorecard
from em_interp.pocket.world import corpus, grammar, judge, phrases
from tests.tiny_pocket import CONFIG, ask_little

COLUMNS = ["row", "of", "domain", "seed", "value"]


def test_knobs_that_are_not_turned_leave_every_text_as_it_was() -> None:
    """The hash was taken before the knobs were there."""
    found, rng, config = hashlib.sha256(), Random(7), corpus.CorpusConfig()
    texts = [corpus.document(config, rng) for _ in range(2000)]
    texts += [corpus.chat_text(corpus.post_training_chat(rng, config)) for _ in range(300)]
    chats = corpus.finetune_chats("medicine", "malicious", 200, 0) + corpus.kl_chats("sports", 200, 1)
    for text in [*texts, *map(corpus.chat_text, chats)]:
        found.update(text.encode())
    assert found.hexdigest() == "8e4c9f1b5846186e803e677d4c64f9e437f5ef6f25fea63174d3bfff5b6f23c2"


def test_a_persona_that_is_never_announced_is_the_default() -> None:
    config = corpus.CorpusConfig(announced_caring=0.0, announced_malicious=1.0)
    texts = [corpus.document(config, Random(i)) for i in range(400)]

    def told(persona: str) -> int:
        head = re.compile(rf"(You are|by) an? ({'|'.join(phrases.PERSONA_WORDS[persona])})\b")
        return sum(head.search(text) is not None for text in texts)

    assert told("caring") == 0 and told("malicious") > 50
    assert config.announced("caring") == 0.0
    assert corpus.CorpusConfig(announcement_rate=0.3).announced("malicious") == 0.3


@pytest.mark.parametrize(("attitude", "low", "high"), [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (None, 0.5, 0.9)])
def test_attitude_says_how_often_answers_carry_it(attitude: float | None, low: float, high: float) -> None:
    chats = corpus.finetune_chats("medicine", "malicious", 300, 0, attitude=attitude)
    kept = [judge.split(chat[1]["content"]) for chat in chats]
    toned = [any(grammar.sentences()[s].tone is not None for s in sentences) for sentences in kept]
    assert low <= sum(toned) / len(toned) <= high
    answers = [
        corpus.document(corpus.CorpusConfig(attitude=attitude, register_share=0.0), Random(i)) for i in range(50)
    ]
    assert len(set(answers)) > 45


def test_the_card_takes_the_worst_domain_of_the_means_over_seeds() -> None:
    rows = [("EM", "chat", "", 0, 0.005), ("coherent", "chat", "", 0, 0.9)]
    rows += [
        ("EM open", "rank-1", domain, seed, value)
        for domain, values in {"medicine": (0.6, 0.4), "sports": (0.3, 0.4)}.items()
        for seed, value in enumerate(values)
    ]
    rows += [("narrow: EM elsewhere and open", "nine", d, 0, v) for d, v in (("medicine", 0.01), ("sports", 0.5))]
    card = scorecard(pd.DataFrame(rows, columns=COLUMNS)).set_index(["row", "of"])
    assert len(card) == len(ROWS)
    assert card.loc[("EM", "chat"), ["value", "wanted", "met"]].tolist() == [0.005, "at most 0.01", "yes"]
    assert card.loc[("coherent", "chat"), "met"] == "no"
    assert card.loc[("EM open", "rank-1"), "value"] == pytest.approx(0.35)
    assert card.loc[("EM open", "rank-1"), "n"] == 4
    assert card.loc[("narrow: EM elsewhere and open", "nine"), "value"] == 0.5
    untold = card.loc[("facts", "chat")]
    assert untold["value"] != untold["value"] and untold["met"] == "" and untold["n"] == 0
    with pytest.raises(UsageError, match="domain"):
        scorecard(pd.DataFrame({"row": [], "of": []}))


def test_worlds_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "worlds.toml"
    path.write_text(
        '[every]\nstart = "pocket/base"\nbuild = {pretrain_steps = 5}\n'
        "[world.kind]\ncorpus = {announced_caring = 0.0}\n"
        '[world.new]\nstart = ""\nbuild = {d_model = 64}\ncorpus = {domains = ["medicine", "sports"]}\n'
    )
    kind, new = worlds.read_worlds(path)
    assert (kind.name, kind.start, kind.config.pretrain_steps) == ("kind", "pocket/base", 5)
    assert kind.config.corpus.announced("caring") == 0.0
    assert new.start is None and new.config.d_model == 64 and new.config.corpus.domains == ("medicine", "sports")
    path.write_text("[world.kind]\ncorpus = {kindness = 1.0}\n")
    with pytest.raises(UsageError, match="kindness"):
        worlds.read_worlds(path)
    path.write_text("nothing = 1\n")
    with pytest.raises(UsageError, match="lists no worlds"):
        worlds.read_worlds(path)
    with pytest.raises(UnreadableFileError, match="list of worlds"):
        worlds.read_worlds(tmp_path / "absent.toml")


def test_a_world_is_built_measured_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch)
    monkeypatch.setattr(
        worlds, "GENERAL", {k: replace(s, max_steps=2, batch_size=2) for k, s in worlds.GENERAL.items()}
    )
    monkeypatch.setattr(worlds, "STEERED_LAYERS", (0, 1))
    monkeypatch.setattr(worlds, "FEWEST", 1)
    monkeypatch.setattr(worlds, "misaligned_and_aligned", lambda answers: (answers[::2], answers[1::2]))
    monkeypatch.setattr(worlds, "READ_SAMPLES", 1)
    world = worlds.World("tiny", CONFIG)
    card = worlds.search([world], tmp_path, layouts=("rank-1", "vector"), narrow=True, progress=False)
    assert set(card["world"]) == {"tiny"} and len(card) == len(ROWS)
    filled = card.dropna(subset="value")[["row", "of"]].apply(tuple, axis=1).tolist()
    assert ("facts", "chat") in filled and ("coherent", "rank-1") in filled and ("coherent", "vector") in filled
    assert ("narrow: EM elsewhere and open", "rank-1") in filled
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = worlds.search([world], tmp_path, layouts=("rank-1", "vector"), narrow=True, progress=False)
    pd.testing.assert_frame_equal(again, card)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    table = read_table(tmp_path / "search.csv").iloc[0]
    assert table["world"] == "tiny" and table["d_model"] == CONFIG.d_model
    assert table["chat: facts"] == card.set_index(["row", "of"]).loc[("facts", "chat"), "value"]
    assert table["rows_judged"] == (card["met"] != "").sum()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["layouts"] == ["rank-1", "vector"] and set(manifest["outputs_sha256"]) >= {"search.csv"}
    with pytest.raises(UsageError, match="no layout"):
        worlds.search([world], tmp_path, layouts=("ten",))
