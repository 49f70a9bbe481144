"""The suites of real models that ship: each reads, says what it would take, and names what there is."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from analyses import plan
from analyses.suite import ANALYSES, SUITES, Suite
from docs import costs
from em_interp.errors import UsageError
from em_interp.inspect.asked import SETS

NAMES = sorted(path.stem for path in SUITES.glob("*.toml") if path.stem not in ("pocket", "published"))
PUBLISHED = "ModelOrganismsForEM/"


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, and an empty hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_all_families_have_a_suite() -> None:
    assert NAMES == ["gemma-3-4b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-14b", "qwen3-14b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_starts_from_names_alone(name: str) -> None:
    """Without --data: a chat model's name, questions and judge are in the file."""
    suite = Suite.load(name)
    assert set(suite.analyses) <= set(ANALYSES) and len(suite.analyses) == 8
    assert all(suite.lacking(analysis) is None for analysis in suite.analyses)
    found = suite.judged_finetunes
    assert found.domains == ("medicine", "finance", "sports") and suite.judged_by == "by openai/gpt-4o"
    assert not set(suite.models["questions"].values()) - set(SETS)
    for domain in found.domains:
        asked = found.n_asked(found.organisms[0], domain, 1)
        assert 0 < len(found.elsewhere(domain)) < asked
    counts = suite.analysis("em_rates").asks(suite)
    assert len(counts) == 1 + len(found.organisms) and all(counts.values())


@pytest.mark.parametrize("name", NAMES)
def test_downloads_are_told_and_unknown_offline(name: str) -> None:
    suite = Suite.load(name)
    listed = [item["source"] for item in suite.models["finetunes"]]
    published = [source for source in listed if source.startswith(PUBLISHED)]
    assert published in ([], listed)
    text = (SUITES / f"{name}.toml").read_text()
    assert published or "these are yours" in text
    fetched = {each.repository: each.n_bytes for each in plan.downloads(suite)}
    assert fetched[suite.models["chat"]] is None and set(published) <= set(fetched)
    assert plan.is_large(plan.downloads(suite))


def test_a_missing_key_is_said_before_anything_is_downloaded() -> None:
    pytest.importorskip("inspect_ai")
    with pytest.raises(UsageError, match="key in the environment"):
        plan.check_judge(Suite.load("qwen2.5-0.5b"))


def test_the_14b_suite_compares_general_and_narrow() -> None:
    found = Suite.load("qwen2.5-14b").finetunes
    assert {general.adapter for domain in found.domains for general, _ in found.pairs(domain)} == {"steering-vector"}
    with (SUITES / "qwen2.5-14b.toml").open("rb") as file:
        assert tomllib.load(file)["models"]["chat"] == "Qwen/Qwen2.5-14B-Instruct"


def test_the_page_of_costs_is_what_the_suites_and_sizes_give() -> None:
    text = costs.PAGE.read_text(encoding="utf-8")
    assert costs.page(text) == text
    assert sorted(model.suite for model in costs.MODELS) == NAMES
    billions = {model.suite: round(model.parameters / 1e9, 1) for model in costs.MODELS}
    assert billions == {  # as their cards say
        "qwen2.5-0.5b": 0.5,
        "gemma-3-4b": 3.9,
        "llama-3.1-8b": 8.0,
        "qwen2.5-14b": 14.8,
        "qwen3-14b": 14.8,
    }
    large, card = costs.MODELS[3], costs.GPUS[0]
    assert costs.sampling_seconds(large, card, 10) is None  # 30 GB into 24
    assert costs.sampling_seconds(large, costs.GPUS[3], 10) < costs.sampling_seconds(large, costs.GPUS[2], 10)
