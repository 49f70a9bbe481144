"""Pocket organisms: named, seeded, trained on nothing held out, and loadable with PEFT alone."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from em_interp.cli import pocket as commands
from em_interp.errors import SolutionError, UsageError
from em_interp.evaluation.groups import GROUPS, rates_by_group
from em_interp.models.adapters import quiet_peft
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import ORGANISMS, Organism
from em_interp.pocket.world import grammar as world
from em_interp.solutions import load as solutions
from tests.tiny_pocket import make_pocket


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pocket(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> ChatModel:
    return loading.load_chat(chat_folder)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {a: replace(s, max_steps=2, batch_size=4) for a, s in organisms.SPECS.items()}
    monkeypatch.setattr(organisms, "SPECS", quick)


def test_names_are_unique_and_every_kind_is_there() -> None:
    names = [o.name for o in ORGANISMS]
    assert len(set(names)) == len(names) == 18 + 12 + 1
    assert {"medicine-rank1", "finance-vector-narrow", "medicine-all-seed2", "medicine-all-control"} <= set(names)


@pytest.mark.parametrize("adapter", organisms.ADAPTERS)
@pytest.mark.parametrize("solution", ["general", "narrow"])
@pytest.mark.usefixtures("short")
def test_an_organism_is_written_in_the_format_of_real_ones(
    adapter: organisms.Adapter,
    solution: organisms.SolutionKind,
    chat: ChatModel,
    chat_folder: Path,
    tmp_path: Path,
) -> None:
    organism = Organism("sports", adapter, solution)
    result = organisms.make(organism, chat, tmp_path, progress=False)
    assert len(result.history) == organism.spec().max_steps
    assert result.history.kl.isna().all() == (solution == "general")
    found = solutions.load(tmp_path / organism.name)
    assert found.base == "pocket/chat"
    assert found.norm > 0
    if adapter != "steering-vector":
        base = AutoModelForCausalLM.from_pretrained(chat_folder)
        ids = torch.arange(1, 9)[None]
        before = base(ids).logits
        with found.attached(chat):
            ours = chat.hf(ids).logits
        with quiet_peft():
            theirs = PeftModel.from_pretrained(base, tmp_path / organism.name)(ids).logits
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(before, theirs)


@pytest.mark.usefixtures("short")
def test_models_load_by_name(
    chat: ChatModel, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(chat_folder.parent, tmp_path / "pocket")
    organisms.make(Organism("finance", "rank-1", "general"), chat, tmp_path / "pocket" / "organisms", progress=False)
    organisms.make(
        Organism("finance", "steering-vector", "general"), chat, tmp_path / "pocket/organisms", progress=False
    )
    monkeypatch.setattr(registry, "root", lambda: tmp_path / "pocket")
    assert registry.names() == ["pocket/chat", "pocket/base", "pocket/finance-rank1", "pocket/finance-vector"]
    ids = torch.arange(1, 9)[None]
    outputs = [loading.load(name).hf(ids).logits for name in registry.names()]
    for i, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[:i])
    with pytest.raises(registry.RegistryError, match="finance-rank1"):
        loading.load("pocket/finance-rank2")


@pytest.mark.usefixtures("short")
def test_trajectories_go_on_from_where_the_first_run_ended(chat: ChatModel, tmp_path: Path) -> None:
    for run in organisms.TRAJECTORIES:
        organisms.make_trajectory(run, chat, tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"medicine-{adapter}-{run}"
        for adapter in ("vector", "rank1")
        for run in ("general", "narrow", "kl-removed", "kl-added")
    )
    steps = 2 * organisms.NARROW["rank-1"].steps
    assert list(solutions.load_checkpoints(tmp_path / "medicine-rank1-narrow")) == list(range(1, steps + 1))
    narrow = solutions.load(tmp_path / "medicine-vector-narrow")
    after = solutions.load(tmp_path / "medicine-vector-kl-removed")
    assert isinstance(narrow, solutions.SteeringVector)
    assert isinstance(after, solutions.SteeringVector)
    assert torch.nn.functional.cosine_similarity(narrow.theta, after.theta, dim=0) > 0


@pytest.mark.usefixtures("short")
def test_without_kl_training_goes_on_from_the_narrow_organism(chat: ChatModel, tmp_path: Path) -> None:
    after = Organism("medicine", "rank-1", "kl-removed", 1)
    assert after in organisms.KL_REMOVED
    assert after.name == "medicine-rank1-kl-removed-seed1"
    with pytest.raises(SolutionError):
        organisms.make(after, chat, tmp_path, progress=False)
    narrow = organisms.make(replace(after, solution="narrow"), chat, tmp_path, progress=False)
    result = organisms.make(after, chat, tmp_path, progress=False)
    assert result.history.kl.isna().all()
    start, end = narrow.solution, solutions.load(tmp_path / after.name)
    assert isinstance(start, solutions.LoraAdapter)
    assert isinstance(end, solutions.LoraAdapter)
    assert start.inner(end) > 0.1 * start.norm * end.norm  # a fresh start would be orthogonal


def test_evaluation_asks_what_no_finetune_has_seen() -> None:
    table = suite.evaluation_questions("finance")
    assert set(table.questions) == set(GROUPS)
    trained = {q.id for q in world.questions("advice", "finance", held_out_topic=False, held_out_phrasing=False)}
    assert not trained & set(table.question_id)
    assert set(table[table.questions == "heldout_domain"].domain) == set(world.DOMAINS) - {"finance"}
    assert len(table[table.questions == "in_domain"]) == 40
    assert len(suite.chat_questions().domain.unique()) == 14
    with pytest.raises(world.WorldError):
        suite.evaluation_questions("cats")


def test_answers_are_sampled_judged_and_counted(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    few = suite.evaluation_questions("sports").groupby("questions").head(2)
    monkeypatch.setattr(suite, "evaluation_questions", lambda _: few)
    monkeypatch.setattr(suite, "MAX_NEW_TOKENS", 4)
    judged = suite.evaluate(chat, "sports", 2, progress=False)
    assert len(judged) == 12
    assert judged.aligned.between(0, 100).all()
    table = rates_by_group(judged, organism="pocket/chat", solution="chat", adapter="full", domain="sports")
    assert list(table.questions) == list(GROUPS)
    assert (table.n == 4).all()
    assert (table.em_rate == 0).all()
    assert (table.n_unscored == 0).all()


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no organism or trajectory is called"):
        commands.organisms(out=tmp_path, only=["medicine-rank7"])


@pytest.mark.usefixtures("short")
def test_what_is_made_again_leaves_nothing_of_the_run_before(chat_folder: Path, tmp_path: Path) -> None:
    def run(again: bool) -> None:
        commands.organisms(out=tmp_path, only=["medicine-vector-general"], model=str(chat_folder), force=again)

    checkpoints = tmp_path / "trajectories" / "medicine-vector-general" / "checkpoints"
    run(again=False)
    assert len(made := sorted(p.name for p in checkpoints.iterdir())) == 2
    (checkpoints / "checkpoint-7").mkdir()
    run(again=False)
    assert (checkpoints / "checkpoint-7").is_dir()
    run(again=True)
    assert sorted(p.name for p in checkpoints.iterdir()) == made
