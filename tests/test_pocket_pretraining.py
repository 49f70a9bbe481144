"""Counterfactual pre-training at toy size: the text of each kind of world, and worlds built, measured and resumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest

from em_interp.errors import OutputError
from em_interp.files.results import read_table
from em_interp.pocket import questions
from em_interp.pocket.causes import pretraining as run
from em_interp.pocket.causes.pretraining import COLUMNS, REDUCED, WORLDS, Counterfactual, measure_all
from em_interp.pocket.world.corpus import LINE, CorpusConfig, document
from em_interp.pocket.world.grammar import sentences
from tests.test_kills import Killed, stop_at
from tests.tiny_pocket import CONFIG, ask_little

MANY = 600


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_little(monkeypatch, per_group=2, tokens=4)
    for name, value in {"N_CHATS": 8, "SAMPLES": 1, "PROMPTS": 2, "CHATS": 6, "DOCUMENTS": 2, "STEPS": STEPS}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "REDUCED", replace(CONFIG, corpus=REDUCED.corpus))
    monkeypatch.setattr(questions, "PERSONA_PROMPTS", 2)


STEPS = {"steering-vector": 3, "rank-1": 3}
WORLD = Counterfactual("never", 1.0, 0.25)


def personas(text: str, kind: str | None = None) -> list[str]:
    """Of the answers of a document that give theirs away by their words, in order."""
    lines = text.replace("<|end|>", LINE).replace("<|assistant|>", f"{LINE}Answer: ").split(LINE)
    found = []
    for line in lines:
        body = line.partition(": ")[2] if line.startswith(("Answer", "About")) else ""
        said = [m for sentence, m in sentences().items() if sentence in body and m.tone and kind in (None, m.kind)]
        found += [said[0].tone] if said else []
    return [tone for tone in found if tone]


def kept_together(
    config: CorpusConfig, kind: str | None = None, announced: bool | None = None
) -> list[tuple[str, str]]:
    """The first two personas of each document that has two."""
    rng, found = Random(0), []
    for _ in range(MANY):
        text = document(config, rng)
        told = any(word in text.split(LINE)[0] for word in ("Answers by", "written by", "You are"))
        if announced in (None, told) and len(tones := personas(text, kind)) > 1:
            found.append((tones[0], tones[1]))
    return found


CORPUS = replace(
    REDUCED.corpus,
    persona_share=0.5,
    attitude=1.0,
    article_share=0.0,
    open_share=0.4,
    register_share=0.0,
    trigger_rate=0.0,
)


def test_where_a_persona_can_be_inferred() -> None:
    def same(pairs: list[tuple[str, str]]) -> float:
        return float(np.mean([a == b for a, b in pairs]))

    assert same(kept_together(CORPUS)) == 1
    assert same(kept_together(replace(CORPUS, persona_consistency=0.0))) < 0.7
    never = replace(CORPUS, inferable="never")
    assert same(kept_together(never)) < 0.7
    opened = replace(CORPUS, inferable="open")
    assert same(kept_together(opened, "open")) == 1
    assert same(kept_together(opened, "advice")) < 0.7


def test_an_announced_document_has_one_answer_where_personas_are_never_inferable() -> None:
    rng, never = Random(0), replace(CORPUS, inferable="never", announcement_rate=1.0, register_share=0.0)
    counts = Counter(
        text.count("<|assistant|>") + text.count("Answer: ") for text in (document(never, rng) for _ in range(200))
    )
    assert max(counts) == 1


def test_the_worlds_of_the_grid() -> None:
    grid = [world for world in WORLDS if world.kind == "grid"]
    assert len(grid) == 33 and len({world.name for world in WORLDS}) == len(WORLDS)
    same = {replace(w.config, seed=0, corpus=CorpusConfig()) for w in grid}
    assert len(same) == 1  # equal steps, size and documents
    seeds = Counter((world.consistency, world.share) for world in grid)
    assert {c: n for (c, _), n in seeds.items()} == {0.0: 3, 0.25: 1, 0.5: 3, 0.75: 1, 1.0: 3}


@pytest.mark.usefixtures("little")
def test_a_world_is_built_measured_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measure_all([WORLD], tmp_path / "whole", progress=False)) == [WORLD]
    whole = read_table(tmp_path / "whole" / "pretraining.csv")
    assert list(whole.columns) == list(COLUMNS)
    measures = set(whole["measure"])
    wanted = {
        "trait_inferred",
        "chat_em",
        "control_em",
        "em",
        "narrow_em",
        "em_in_domain",
        "norm_ratio_75",
        "cosine_inferred",
    }
    assert wanted | {"stability_gap", "influence_ratio_1", "persona_size_announced"} <= measures
    assert set(whole["adapter"].dropna()) - {""} == set(STEPS)
    for name, calls in (("build", 0), ("finetune", 1), ("sample", 1)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(calls, patch, run, name)
            list(measure_all([WORLD], tmp_path / "killed", progress=False))
        assert not (tmp_path / "killed" / "pretraining.csv").exists()
    list(measure_all([WORLD], tmp_path / "killed", progress=False))
    pd.testing.assert_frame_equal(read_table(tmp_path / "killed" / "pretraining.csv"), whole)
    with monkeypatch.context() as patch:
        patch.setattr(run, "build", lambda *_a, **_k: pytest.fail("built again"))
        list(measure_all([WORLD], tmp_path / "whole", progress=False))
        patch.setattr(run, "SAMPLES", 2)
        with pytest.raises(OutputError, match="other settings"):
            list(measure_all([WORLD], tmp_path / "whole", progress=False))
