"""Every analysis of live models on a tiny pocket: contract columns, figures, and what is said where input is absent."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2ForCausalLM

from analyses.finetunes import ablation, steering
from analyses.general_vs_narrow import claims, gradients, influence, stability
from analyses.inputs import pocket as live
from analyses.inputs.pocket import PocketFinetunes
from analyses.run import Outcome, reproduce
from analyses.suite import Suite
from em_interp.errors import UnreadableFileError
from em_interp.files.results import Results, write_table
from em_interp.landscape import pairs as measures
from em_interp.models.weights import weights_hash
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import Organism, SolutionKind, TrajectoryRun
from em_interp.pocket.world import grammar as world
from tests.made_up_tables.causes import ARMS, MITIGATED, SCREENED
from tests.made_up_tables.pretraining import pretraining_rows
from tests.test_kills import Killed, stop_at
from tests.tiny_pocket import ask_little, make_pocket

CONTRACT = {
    "em_rates": "organism solution adapter domain questions em_rate em_low em_high coherent_rate n n_unscored",
    "steering": "direction target layer coefficient em_rate em_low em_high coherent_rate n",
    "ablation": "direction target mode layers em_before em_after em_after_low em_after_high coherent_before "
    "coherent_after n",
    "cosines": "direction_a direction_b layer cosine low high null_sd p_value",
    "transfer": "kind direction_from organism em_before em_after relative_reduction",
    "efficiency": "solution adapter domain norm scale loss loss_reduction_per_norm2 loss_over_norm2",
    "stability": "solution adapter domain epsilon seed loss relative_increase_percent",
    "influence": "direction kind norm kl_nats_per_token low high n_tokens",
    "trajectory": "run step norm cos_general cos_narrow local_cosine pc1 pc2 pc3",
    "pca": "component explained_variance_ratio",
    "lora_scalars": "comparison accuracy auc low high n",
    "kl_sweep": "adapter domain kl_weight em_rate in_domain_rate scaled_em_rate norm",
    "gradients": "run step loss norm cos_general cos_narrow null_sd n_tokens",
    "technical_rates": "organism solution adapter domain questions technical_rate technical_low technical_high n",
    "register_efficiency_lead": "adapter training_seed relative_norm lead low high",
    "register_stability_gap": "adapter training_seed epsilon gap low high",
    "register_influence_ratio": "adapter seed relative_norm ratio low high",
    "claims": "claim adapter estimate low high n_seeds verdict sentence",
}
KINDS: tuple[SolutionKind, ...] = ("general", "narrow", "kl-removed")
MADE = (
    *(Organism("medicine", "rank-1", kind, seed) for seed in (0, 1) for kind in KINDS),
    *(Organism("medicine", "all-modules", kind, seed) for seed in (0, 1) for kind in KINDS[:2]),
    *(Organism("medicine", "steering-vector", kind, seed) for seed in (0, 1) for kind in KINDS[:2]),
    Organism("finance", "all-modules", "general"),
    Organism("medicine", "all-modules", "control"),
    *(Organism("medicine", "rank-1", kind, seed, "register") for seed in (0, 1) for kind in KINDS[:2]),
)


def verdict_of(answers: pd.DataFrame) -> pd.DataFrame:
    """A judge for models that babble: every answer is coherent, and its words alone decide which side it is on."""
    even = [hashlib.sha256(text.encode()).digest()[0] % 2 == 0 for text in answers["answer"]]
    ids = [world.question_of(question).id for question in answers["question"]]
    scores = np.where(even, 0.0, 100.0)
    return answers.assign(question_id=ids, aligned=scores, coherent=100.0, technical=scores, correct=None)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_pocket(tmp_path_factory.mktemp("pocket")).parent
    chat = loading.load_chat(root / "chat")
    with pytest.MonkeyPatch.context() as patch:
        quick = {a: replace(s, max_steps=4, batch_size=4) for a, s in organisms.SPECS.items()}
        patch.setattr(organisms, "SPECS", quick)
        patch.setattr(organisms, "N_CHATS", 16)
        for organism in MADE:
            organisms.make(organism, chat, root / "organisms", progress=False)
        for run in ("general", "narrow", "kl-removed"):
            organisms.make_trajectory(TrajectoryRun("rank-1", run), chat, root / "trajectories", progress=False)
    rows = pd.DataFrame({"adapter": "rank-1", "domain": "medicine", "kl_weight": [0.0, 1.0], "norm": 1.0})
    rates = ("em", "in_domain", "scaled_em")
    rows = rows.assign(**{f"{rate}_{part}": 0.5 for rate in rates for part in ("rate", "low", "high")})
    write_table(root / "sweeps" / "kl_sweep.csv", rows)
    write_table(root / "sweeps" / "kl_sweep_scales.csv", rows.assign(scale=1.0))
    write_table(root / "sweeps" / "dilution.csv", rows.assign(bad_share=[0.0, 1.0]))
    tables = {"controls": ARMS, "mitigations": MITIGATED, "mitigations_screening": SCREENED}
    for name, table in {**tables, "pretraining": pretraining_rows()}.items():
        write_table(root / "sweeps" / f"{name}.csv", table)
    return root


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few questions, chats, documents and perturbations."""
    ask_little(monkeypatch, per_group=3, tokens=4)
    monkeypatch.setattr(live, "judge", verdict_of)
    monkeypatch.setattr(suite, "judge", verdict_of)
    monkeypatch.setattr(live, "OPEN_SAMPLES", 2)
    monkeypatch.setattr("analyses.general_vs_narrow.efficiency.CHATS", 6)
    monkeypatch.setattr(stability, "CHATS", 6)
    monkeypatch.setattr(stability, "EPSILONS", (0.0, 0.2, 0.5, 0.8))
    monkeypatch.setattr(stability, "MIDDLE", (0.2, 0.8))
    for where in (measures, claims):
        monkeypatch.setattr(where, "SCALES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(stability, "PROBES", 2)
    monkeypatch.setattr(influence, "DOCUMENTS", 4)
    monkeypatch.setattr(gradients, "CHATS", 4)
    monkeypatch.setattr("em_interp.pocket.questions.PERSONA_PROMPTS", 4)
    monkeypatch.setattr(steering, "SHARES", (0.0, 0.5))
    monkeypatch.setattr(influence, "RANDOM", 2)


def _suite_of(root: Path) -> Suite:
    chosen = Suite.load("pocket")
    chosen.data = root
    return chosen


def run(root: Path, out: Path, *only: str, resume: bool = False) -> Outcome:
    chosen = _suite_of(root)
    return reproduce(chosen, out, only=only, static=False, resume=resume)


@pytest.mark.usefixtures("little")
def test_every_analysis_gives_its_tables_and_figures(pocket: Path, tmp_path: Path) -> None:
    outcome = run(pocket, tmp_path)
    assert {s.name: s.error for s in outcome.sections if s.error} == {}
    assert [s.name for s in outcome.sections] == list(Suite.load("pocket").analyses)
    tables = {name: table for s in outcome.sections for name, table in s.tables.items()}
    for name, columns in CONTRACT.items():
        assert set(columns.split()) <= set(tables[name].columns), name
        assert len(tables[name]), name
    assert all(s.figures for s in outcome.sections)
    assert all(figure.data for s in outcome.sections for figure in s.figures.values())
    assert "Published numbers" not in outcome.report.read_text(encoding="utf-8")

    named = set(tables["em_rates"]["organism"])
    assert not [name for name in named if "register" in name or "kl-removed" in name]
    assert "pocket/chat" in named and len(named) == 1 + 4 * 3 + 2
    assert (tables["em_rates"]["em_rate"] > 0).any()

    transfer = tables["transfer"]
    assert set(transfer["kind"]) == {"mean-diff", "model-diff"}
    assert not transfer.duplicated(["kind", "direction_from", "organism"]).any()
    shifts = set(transfer.loc[transfer["kind"] == "model-diff", "direction_from"])
    assert shifts == {*(f"pocket/medicine-{a}" for a in ("vector", "rank1", "all")), ablation.TOGETHER}

    verdicts = tables["claims"]
    assert set(verdicts["verdict"]) <= {"holds", "does not hold", "not decided here"}
    persona = verdicts[verdicts["task"] == "persona"]
    assert set(persona["adapter"]) == set(organisms.ADAPTERS)
    deciding = persona[(persona["role"] == "claim") & (persona["missing"] == "")]
    assert (deciding["n_seeds"] == 2).all() and set(deciding["adapter"]) == set(organisms.ADAPTERS)
    known = verdicts[verdicts["estimate"].notna() & verdicts["low"].notna()]
    assert ((known["low"] <= known["estimate"]) & (known["estimate"] <= known["high"])).all() and len(known) > 10
    drift = persona[persona["measure"].str.startswith("rise of the cosine")]
    assert list(drift["adapter"]) == ["rank-1"]
    assert set(verdicts.loc[verdicts["task"] == "register", "adapter"]) == {"rank-1"}
    gap = tables["stability_gap"]
    middle = gap[gap["epsilon"].isin(measures.EPSILONS) & (gap["adapter"] == "rank-1")]
    said = persona[(persona["adapter"] == "rank-1") & (persona["statistic"] == "stability_gap")]
    assert said["estimate"].item() == pytest.approx(middle["gap"].mean())

    again = run(pocket, tmp_path, resume=True)
    assert all(s.reused for s in again.sections)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("name", ["steering", pytest.param("ablation", marks=pytest.mark.search)])
def test_a_killed_analysis_keeps_its_answers(
    name: str, pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = []
    for is_killed in (False, True, False):
        with monkeypatch.context() as patch:
            count = stop_at(batches[0] - 1 if is_killed else -1, patch, Qwen2ForCausalLM, "generate")
            out = tmp_path / ("killed" if batches else "whole")
            if not is_killed:
                outcome = run(pocket, out, name, resume=True)
            else:
                with pytest.raises(Killed):
                    run(pocket, out, name, resume=True)
                assert list(out.rglob("results/answers/*.csv"))
        batches.append(count[0])
    assert [section.error for section in outcome.sections] == [None]
    whole, _, again = batches
    assert 0 < again < whole and "kept" in capsys.readouterr().err
    for table in (tmp_path / "whole/pocket/tables").glob("*.csv"):
        assert table.read_text() == (outcome.folder / "tables" / table.name).read_text()
    assert not list(tmp_path.rglob("*.parts"))


@pytest.mark.usefixtures("little")
def test_directions_are_read_from_answers_to_open_questions(
    pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organisms_here = PocketFinetunes.read(pocket)
    organisms_here.results = Results(tmp_path)
    (entry,) = organisms_here.select(solution="general", adapter="all-modules", seed=0)[:1]
    answers = organisms_here.open_answers(entry)
    assert set(answers["questions"]) == {"general"}
    assert (answers.groupby("question_id").size() == live.OPEN_SAMPLES).all()
    both = organisms_here.contrast(entry)
    assert len(both.positive) + len(both.negative) == len(answers)  # the test's judge finds all coherent
    monkeypatch.setattr("analyses.inputs.finetunes.contrast", lambda *_a, **_k: pytest.fail("read again"))
    again = PocketFinetunes.read(pocket)
    again.results = Results(tmp_path)
    assert torch.equal(again.contrast(entry).direction().vectors, both.direction().vectors)


def test_a_verdict_needs_the_whole_interval_on_one_side() -> None:
    def row(name: str, *values: float) -> dict[str, object]:
        return claims._row("persona", name, "rank-1", np.array(values))

    assert row("efficiency", 0.9, 1.0, 1.1)["verdict"] == "holds"
    assert row("efficiency", -0.9, -1.0, -1.1)["verdict"] == "does not hold"
    assert row("efficiency", -1.0, 0.0, 1.1)["verdict"] == "not decided here"
    single = row("kl_removal", 0.5)
    assert (single["verdict"], single["n_seeds"]) == ("not decided here", 1)
    assert "one seed" in str(single["sentence"])
    ratio = row("influence", *np.log([2.0, 2.0, 2.0]))
    assert ratio["estimate"] == pytest.approx(2.0)
    assert ratio["verdict"] == "holds"
    assert row("influence", *np.log([0.5, 0.6, 0.5]))["verdict"] == "does not hold"


@pytest.mark.usefixtures("little")
def test_a_live_pair_is_measured_as_the_table_s_pairs_are(pocket: Path) -> None:
    chosen = _suite_of(pocket)
    found = chosen.finetunes
    pair = next(p for p in found.pairs("medicine") if p[0].adapter == "rank-1" and p[0].seed == 1)
    (removed,) = (e for e in found.select(seed=1, solution="kl-removed") if e.adapter == "rank-1")
    here = claims.measured_live(chosen, *pair, removed).set_index("measure")
    solutions = [found.solution(organism) for organism in (*pair, removed)]
    whole = measures.measure_pair(
        found.landscape(pair[0], 6), *solutions[:2], found.texts(4), kl_removed=solutions[2]
    ).set_index("measure")
    same = [name for name in here.index if not name.startswith("stability")]  # of which this test takes other turns
    assert {"norm_ratio_75", "lead", "influence_ratio_1", "cosine_rise"} <= set(same)
    pd.testing.assert_series_equal(here.loc[same, "value"], whole.loc[same, "value"], rtol=1e-6)


def test_a_table_of_pairs_makes_the_claims_unless_it_is_another_chat_model_s(pocket: Path, tmp_path: Path) -> None:
    root = tmp_path / "pocket"
    shutil.copytree(pocket / "chat", root / "chat")
    shutil.copytree(pocket / "organisms" / "medicine-all-control", root / "organisms" / "medicine-all-control")
    weights = weights_hash(loading.load_chat(root / "chat").hf)
    rows = [
        {"task": "persona", "domain": "finance", "adapter": "nine", "seed": seed, "measure": "norm_ratio_75"}
        | {"value": 1.5 + 0.1 * seed, "reason": "", "chat_weights": weights}
        for seed in range(3)
    ]
    path = write_table(root / "sweeps" / "pairs.csv", pd.DataFrame(rows))
    outcome = run(root, tmp_path / "out", "claims")
    table = outcome.sections[0].tables["claims"]
    assert (table["adapter"].item(), table["n_seeds"].item(), table["verdict"].item()) == ("nine", 3, "holds")
    assert claims.tasks(_suite_of(root)) == []

    write_table(path, pd.DataFrame(rows).assign(chat_weights=weights[:-4] + "beef"))
    outcome = run(root, tmp_path / "out", "claims")
    assert any("another chat model" in problem for problem in outcome.problems) and outcome.sections[0].missing
    write_table(path, pd.DataFrame(rows).drop(columns="reason"))
    with pytest.raises(UnreadableFileError, match="lacks the columns reason"):
        PocketFinetunes.read(root).matched_pairs()
    write_table(path, pd.DataFrame(rows).assign(chat_weights="bfloat16:of another precision"))
    assert PocketFinetunes.read(root).matched_pairs() is not None


def test_tasks_are_kept_apart(pocket: Path) -> None:
    found = PocketFinetunes.read(pocket)
    assert all(e.task == "persona" for e in found.select(seed=None))
    assert [e.name for e, _ in found.pairs("medicine", "register")] == [
        "pocket/register-medicine-rank1",
        "pocket/register-medicine-rank1-seed1",
    ]
    assert len(found.pairs("medicine")) == 6
    technical = found.training_chats("medicine", 3, "register")
    assert technical != found.training_chats("medicine", 3)


def test_absent_weights_say_how_to_make_them(pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(registry.RegistryError, match="pocket build --out"):
        run(tmp_path / "nowhere", tmp_path)
    shutil.copytree(pocket / "chat", tmp_path / "bare" / "chat")
    with pytest.raises(registry.RegistryError, match="pocket organisms --out"):
        run(tmp_path / "bare", tmp_path)
    monkeypatch.setattr(registry, "root", lambda: tmp_path / "bare")
    with pytest.raises(registry.RegistryError, match="pocket organisms --out"):
        reproduce(Suite.load("pocket"), tmp_path)


def test_analyses_whose_organisms_are_absent_are_missing_not_failed(pocket: Path, tmp_path: Path) -> None:
    root = tmp_path / "pocket"
    shutil.copytree(pocket / "chat", root / "chat")
    shutil.copytree(pocket / "organisms" / "medicine-all-control", root / "organisms" / "medicine-all-control")
    only = ("efficiency", "stability", "influence", "register", "claims", "kl_sweep", "gradients", "pca", "kl_removal")
    outcome = run(root, tmp_path / "out", *only)
    assert {s.name.rpartition(".")[2] for s in outcome.sections if s.missing} == set(only)
    said = {s.name.rpartition(".")[2]: s.error or "" for s in outcome.sections}
    assert "pocket sweeps --out" in said["kl_sweep"]
    assert all("pocket organisms --out" in said[name] for name in only if name != "kl_sweep")
    assert not outcome.failed


def test_a_folder_that_is_no_training_run_is_named(pocket: Path, tmp_path: Path) -> None:
    root = tmp_path / "pocket"
    shutil.copytree(pocket, root)
    (root / "trajectories" / "medicine-rank1-narrow").rename(root / "trajectories" / "medicine-rank1-odd")
    found = PocketFinetunes.read(root)
    assert [t.run.phase or t.run.role for t in found.trajectories] == ["general", "kl-removed"]
    assert "medicine-rank1-odd" in str(found.problems[0])


@pytest.mark.search
def test_two_processes_give_what_one_gives(pocket: Path, tmp_path: Path) -> None:
    only = ("lora_scalars", "pca", "kl_sweep", "local_cosine")
    outcomes = []
    for workers in (1, 2):
        chosen = Suite.load("pocket")
        chosen.data = pocket
        out = tmp_path / str(workers)
        outcomes.append(reproduce(chosen, out, only=only, static=False, workers=workers))
    one, two = outcomes
    assert (
        [s.name for s in two.sections]
        == [s.name for s in one.sections]
        == ["finetunes.lora_scalars", "runs.pca", "runs.local_cosine", "general_vs_narrow.kl_sweep"]
    )
    assert two.problems == one.problems != ()
    assert [s.error for s in two.sections] == [s.error for s in one.sections]
    for a, b in zip(one.sections, two.sections, strict=True):
        assert set(a.tables) == set(b.tables)
        for name, table in a.tables.items():
            pd.testing.assert_frame_equal(table, b.tables[name])
