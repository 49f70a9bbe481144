"""Readers: every format, and every kind of damage with its typed error, and nothing else lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from em_interp.errors import (
    AmbiguousDataError,
    BadValueError,
    EmInterpError,
    InputFileError,
    MissingDataError,
    ShapeError,
    UnreadableFileError,
    UnsafeFileError,
    UsageError,
)
from em_interp.files.texts import read_questions
from em_interp.published import scan
from em_interp.published.activations import model_of, read_activation_cell, read_activation_folder
from em_interp.published.judged import read_judged_csv
from em_interp.published.questions import read_judges
from em_interp.published.runs import read_run, solution_at
from tests.published_factory import D_MODEL, FOLDER, N_LAYERS, QUESTIONS, STEPS, SV_STEM, judged_table, lora_scale


def test_everything_is_found(synthetic: Path) -> None:
    data = scan(synthetic, progress=False)
    assert data.problems == []
    assert sorted(s.label for s in data.splits) == [f"{FOLDER}/all", f"{FOLDER}/topic_x", "tiny_bad_med_R7/R7"]
    assert set(data.families()) == {SV_STEM, "Tiny_R1_0_1_0_extended_train", "Tiny_steering_vector_cooking"}
    assert sorted({j.role for j in data.judged}) == ["ablation", "baseline", "organism", "steering"]
    assert sorted(q.name for q in data.question_sets) == ["plain", "some_questions"]
    assert [log.run for log in data.logs] == ["Tiny_R1_0_1_0_extended_train"]


def test_cells_and_differences(synthetic: Path) -> None:
    folder = synthetic / "vectors" / FOLDER
    split = next(s for s in read_activation_folder(folder) if s.name == "all")
    raw = {
        m + d: torch.load(folder / f"model-{m}_data-{d}_hs_all.pt", weights_only=True)["answer"]  # noqa: TID251
        for m in "ma"
        for d in "ma"
    }
    for kind, (plus, minus) in {
        "data-diff": ("mm", "ma"),
        "model-diff": ("mm", "am"),
        "both-diff": ("mm", "aa"),
        "data-diff-in-chat": ("am", "aa"),
    }.items():
        for layer in range(N_LAYERS):
            expected = raw[plus][f"layer_{layer}"].float() - raw[minus][f"layer_{layer}"].float()
            assert torch.equal(split.direction(kind).at(layer), expected)
    questions = next(iter(read_activation_folder(folder, tokens="question")))
    assert questions.token_scope == "prompt"


def test_both_run_layouts(synthetic: Path) -> None:
    github = read_run(synthetic / "runs" / SV_STEM).trajectories[0]
    assert (github.steps, github.layer, github.d) == (STEPS, 3, D_MODEL)
    assert github.scales is not None
    assert set(github.scales.tolist()) == {16.0}
    hub = read_run(synthetic / "runs" / "Tiny_steering_vector_general_cooking").trajectories[0]
    assert (hub.steps, hub.layer, hub.run.role) == (STEPS, 3, "general")


def test_a_checkpoint_of_either_layout_is_a_solution(synthetic: Path) -> None:
    for name in (SV_STEM, "Tiny_steering_vector_general_cooking"):
        trajectory = read_run(synthetic / "runs" / name).trajectories[0]
        solution = solution_at(trajectory, STEPS[-1])
        assert (solution.layer, solution.alpha) == (3, 16.0)
        norms = trajectory.norms()
        assert norms is not None
        assert solution.norm == pytest.approx(float(norms[-1]))
        with pytest.raises(UsageError, match="has no step 99999"):
            solution_at(trajectory, 99999)
        with pytest.raises(UsageError, match="needs a steering vector with layer and alpha"):
            solution_at(replace(trajectory, scales=None), STEPS[0])


def test_a_repository_with_only_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny_steering_vector_general_cooking"
    folder.mkdir()
    torch.save({"steering_vector": torch.ones(D_MODEL), "alpha": 4.0, "layer_idx": 2}, folder / "steering_vector.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 77}))
    trajectory = read_run(folder).trajectories[0]
    assert (trajectory.steps, trajectory.layer) == ((77,), 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingDataError, match="finished adapter and no checkpoints"):
        read_run(adapter)


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_norms_equal_the_dense_product(synthetic: Path, rank: int) -> None:
    from tests.published_factory import make_lora_run

    folder = synthetic / "more" / f"Tiny_R{rank}_other"
    make_lora_run(folder, torch.Generator().manual_seed(3), rank)
    run = read_run(folder)
    trajectory = run.trajectories[0]
    norms = trajectory.norms()
    assert norms is not None
    assert trajectory.layer == 4
    for i, step in enumerate(STEPS):
        tensors = load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
        a, b = (next(v for k, v in tensors.items() if f"lora_{m}" in k).double() for m in "AB")
        assert float(norms[i]) == pytest.approx(float(lora_scale(rank) * (b @ a).norm()), rel=1e-9)
    assert run.log is not None
    assert run.log.steps == STEPS


def test_judged_columns_in_every_variant(tmp_path: Path) -> None:
    table = judged_table(0)
    renamed = table.rename(columns={"response": "answer"})[["question", "answer", "aligned", "coherent"]]
    table.to_csv(tmp_path / "a.csv", index=False)
    renamed.assign(question_id="q", medical=1.0).to_csv(tmp_path / "b.csv", index=False)
    a, b = read_judged_csv(tmp_path / "a.csv"), read_judged_csv(tmp_path / "b.csv")
    assert np.array_equal(a["aligned"], b["aligned"], equal_nan=True)
    assert list(a["answer"]) == list(b["answer"])
    assert b["medical"].dtype == float
    assert a["aligned"].isna().sum() == table["aligned"].isna().sum()


def test_questions_and_judges(synthetic: Path) -> None:
    folder = synthetic / "eval_questions"
    questions = read_questions(folder / "some_questions.yaml")
    assert questions.texts == frozenset(QUESTIONS)
    assert read_questions(folder / "plain.yaml").questions[0].id == "p1"
    assert [j.name for j in read_judges(folder / "judges.yaml")] == ["aligned"]
    with pytest.raises(UnreadableFileError, match="judge prompts, not questions"):
        read_questions(folder / "judges.yaml")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("q14b_bad_med_R4", "Qwen2.5-14B"),
        ("Qwen2.5-14B_SV_l24_lr1e-4_a256", "Qwen2.5-14B"),
        ("Qwen2.5-14B-Instruct_R1_0_1_0_full_train", "Qwen2.5-14B"),
        ("q32b_bad_med_R32", "Qwen2.5-32B"),
        ("Qwen3-14B_SV_l16", "Qwen3-14B"),
        ("Qwen2.5-0.5B_SV_l2", "Qwen2.5-0.5B"),
        ("Llama-3.1-8B-Instruct_R1", "Llama-3.1-8B"),
        ("mystery", "unknown"),
    ],
)
def test_model_names(name: str, model: str) -> None:
    assert model_of(name) == model


CELL = f"vectors/{FOLDER}/model-m_data-m_hs_all.pt"
CHECKPOINT = f"runs/{SV_STEM}/steering_vector_checkpoint_15.pt"
ADAPTER = "runs/Tiny_R1_0_1_0_extended_train/checkpoints/checkpoint-15/adapter_model.safetensors"
CSV = f"judged/{FOLDER}/steer/x_diff_data_vector/layer_3/responses_scale_2.csv"


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


class Payload:
    """A pickle that would run code. Loading it must not create the file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path(self.target),)  # type: ignore[return-value]


def poison(path: Path) -> None:
    torch.save({"steering_vector": Payload(str(path.parent / "ran"))}, path)


def change_cell(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)  # noqa: TID251
        change(content["answer"])
        torch.save(content, path)

    return damage


def change_csv(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        change(pd.read_csv(path)).to_csv(path, index=False)

    return damage


def change_adapter(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        save_file(change(load_file(path)), path)

    return damage


def to_nan(value: float) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.full((D_MODEL, 1), value), path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], type[EmInterpError], str]] = {
    "truncated cell": (CELL, truncate, UnreadableFileError, "truncated"),
    "truncated checkpoint": (CHECKPOINT, truncate, UnreadableFileError, "truncated"),
    "truncated adapter": (ADAPTER, truncate, UnreadableFileError, "truncated"),
    "empty file": (CHECKPOINT, lambda p: p.write_bytes(b""), UnreadableFileError, "truncated"),
    "text as tensor": (CELL, lambda p: p.write_text("<html>404</html>"), UnreadableFileError, "not the expected"),
    "code in a cell": (CELL, poison, UnsafeFileError, "names code"),
    "code in a checkpoint": (CHECKPOINT, poison, UnsafeFileError, "names code"),
    "nan checkpoint": (CHECKPOINT, to_nan(float("nan")), BadValueError, "NaN or infinite"),
    "infinite checkpoint": (CHECKPOINT, to_nan(float("inf")), BadValueError, "NaN or infinite"),
    "nan cell": (CELL, change_cell(lambda a: a["layer_2"].fill_(float("nan"))), BadValueError, "NaN or infinite"),
    "wrong width checkpoint": (CHECKPOINT, lambda p: torch.save(torch.ones(D_MODEL + 1, 1), p), ShapeError, "width"),
    "matrix as checkpoint": (CHECKPOINT, lambda p: torch.save(torch.ones(4, 8), p), ShapeError, "not one vector"),
    "integers": (CHECKPOINT, lambda p: torch.save(torch.ones(D_MODEL, dtype=torch.int64), p), BadValueError, "int64"),
    "wrong width cell": (
        CELL,
        change_cell(lambda a: a.update({k: torch.ones(D_MODEL + 1) for k in list(a)})),
        ShapeError,
        f"width {D_MODEL + 1}",
    ),
    "one layer of another width": (
        CELL,
        change_cell(lambda a: a.update(layer_1=torch.ones(3))),
        ShapeError,
        "not one",
    ),
    "layer too few": (CELL, change_cell(lambda a: a.pop(f"layer_{N_LAYERS - 1}")), ShapeError, "layers"),
    "layer left out": (CELL, change_cell(lambda a: a.pop("layer_2")), ShapeError, "layer_2"),
    "missing cell": (CELL, lambda p: p.unlink(), MissingDataError, "missing"),
    "adapter without B": (
        ADAPTER,
        change_adapter(lambda t: {k: v for k, v in t.items() if "lora_A" in k}),
        MissingDataError,
        "do not pair up",
    ),
    "adapter of another shape": (
        ADAPTER,
        change_adapter(lambda t: {k: (v[:-1] if "lora_B" in k else v).contiguous() for k, v in t.items()}),
        ShapeError,
        "differ from the run's first",
    ),
    "csv without score": (CSV, change_csv(lambda t: t.drop(columns="aligned")), MissingDataError, "lacks the column"),
    "csv with words": (
        CSV,
        change_csv(lambda t: t.assign(aligned=["CODE", *t["aligned"].astype(str)[1:]])),
        BadValueError,
        "'CODE' in row 2",
    ),
    "csv out of range": (CSV, change_csv(lambda t: t.assign(coherent=150.0)), BadValueError, "outside 0-100"),
    "csv header only": (CSV, change_csv(lambda t: t.head(0)), MissingDataError, "no rows"),
    "csv empty": (CSV, lambda p: p.write_text(""), MissingDataError, "empty"),
    "csv binary": (CSV, lambda p: p.write_bytes(b"\xff\xfe\x00\x01" * 30), UnreadableFileError, "binary data"),
    "bad yaml": (
        "eval_questions/plain.yaml",
        lambda p: p.write_text("- id: [unclosed"),
        UnreadableFileError,
        "not readable YAML",
    ),
    "yaml with code": (
        "eval_questions/plain.yaml",
        lambda p: p.write_text("- !!python/object/apply:os.getcwd []"),
        UnreadableFileError,
        "not readable YAML",
    ),
    "empty run": (f"runs/{SV_STEM}_KL5e3", lambda p: (shutil.rmtree(p), p.mkdir()), MissingDataError, "empty"),
    "run without weights": (
        "runs/Tiny_steering_vector_narrow_cooking",
        lambda p: shutil.rmtree(p / "checkpoints"),
        MissingDataError,
        "exists but is empty",
    ),
    "duplicate steps": (
        f"runs/{SV_STEM}_KL5e3",
        lambda p: torch.save(torch.ones(D_MODEL, 1), p / "steering_vector_checkpoint_015.pt"),
        AmbiguousDataError,
        "appear twice",
    ),
    "contradicting alpha": (
        "runs/Tiny_steering_vector_narrow_cooking/adapter_config.json",
        lambda p: p.write_text(json.dumps({"alpha": 3.0, "layer_idx": 3})),
        AmbiguousDataError,
        "alpha is 3 and 16",
    ),
    "contradicting rank": (
        "runs/Tiny_R1_0_1_0_extended_train/checkpoints/checkpoint-5/adapter_config.json",
        lambda p: p.write_text(p.read_text().replace('"r": 1', '"r": 4')),
        UnreadableFileError,
        "rank",
    ),
    "more than LoRA": (
        "runs/Tiny_R1_0_1_0_extended_train/checkpoints/checkpoint-5/adapter_config.json",
        lambda p: p.write_text(p.read_text().replace('"r": 1', '"r": 1, "use_dora": true')),
        UnreadableFileError,
        "use_dora",
    ),
    "broken json": (
        "runs/Tiny_steering_vector_narrow_cooking/adapter_config.json",
        lambda p: p.write_text("{"),
        UnreadableFileError,
        "not readable JSON",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_costs_nothing_else(synthetic: Path, case: str) -> None:
    relative, damage, kind, words = DAMAGES[case]
    before = scan(synthetic, progress=False)
    damage(synthetic / relative)
    data = scan(synthetic, progress=False)
    assert len(data.problems) >= 1
    first = next(p for p in data.problems if isinstance(p, kind))
    assert words in str(first)
    assert "To fix it:" in str(first)
    assert isinstance(first, InputFileError)
    assert Path(relative).name in first.path or Path(relative).parent.name in first.path
    # all that does not depend on the damaged file is still there
    kept = lambda d: {t.name: len(t.steps) for t in d.trajectories}  # noqa: E731
    others = {k: v for k, v in kept(before).items() if not relative.startswith(f"runs/{k}")}
    assert others.items() <= kept(data).items()
    assert len(data.judged) >= len(before.judged) - 1
    assert len(data.splits) == len(before.splits)
    assert not list(synthetic.rglob("ran"))


def test_a_refused_last_checkpoint_leaves_the_run_without_an_end(synthetic: Path) -> None:
    truncate(synthetic / "runs" / SV_STEM / f"steering_vector_checkpoint_{STEPS[-1]}.pt")
    trajectory = next(t for t in scan(synthetic, progress=False).trajectories if t.name == SV_STEM)
    assert trajectory.steps == STEPS[:-1]
    with pytest.raises(MissingDataError, match="last checkpoint"):
        trajectory.final()


def test_single_readers_raise(synthetic: Path) -> None:
    truncate(synthetic / CELL)
    with pytest.raises(UnreadableFileError):
        read_activation_cell(synthetic / CELL)
    with pytest.raises(UnreadableFileError):
        list(read_activation_folder(synthetic / "vectors" / FOLDER))
    with pytest.raises(MissingDataError, match="no such file"):
        read_activation_cell(synthetic / "absent.pt")
    with pytest.raises(MissingDataError, match="no such file"):
        read_judged_csv(synthetic / "absent.csv")


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no such folder"):
        scan(tmp_path / "absent")
    with pytest.raises(MissingDataError, match="holds no mean activations"):
        scan(tmp_path, progress=False)


def test_links_are_followed_once(synthetic: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "vectors").symlink_to(synthetic / "vectors")
    (linked / "loop").symlink_to(linked)
    assert len(scan(linked, progress=False).splits) == 3
