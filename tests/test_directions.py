from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from em_interp.directions.direction import Direction, random_directions
from em_interp.errors import (
    BadValueError,
    DirectionError,
    MissingDataError,
    OutputError,
    ShapeError,
    UnreadableFileError,
)
from em_interp.files.directions import FORMAT_VERSION


def make(seed: int = 0, layers: tuple[int, ...] = (0, 2, 3), d: int = 8, **fields: object) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(layers), d, generator=generator)
    return Direction(vectors=vectors, layers=layers, kind="data-diff", **fields)  # type: ignore[arg-type]


def test_absent_layers_are_absent() -> None:
    direction = make()
    assert torch.equal(direction.at(2), direction.vectors[1])
    with pytest.raises(DirectionError, match=r"no layer 1; it has layers 0, 2-3"):
        direction.at(1)


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_cosine_equals_a_slow_float64_oracle(seed: int, d: int) -> None:
    a, b = make(seed, d=d), make(seed + 1, layers=(2, 3, 5), d=d)
    for layer, value in a.cosine(b).items():
        x, y = a.at(layer).double().tolist(), b.at(layer).double().tolist()
        oracle = sum(p * q for p, q in zip(x, y, strict=True)) / (
            sum(p * p for p in x) ** 0.5 * sum(q * q for q in y) ** 0.5
        )
        assert value == pytest.approx(oracle, abs=1e-6)
    assert list(a.cosine(b)) == [2, 3]


def test_arithmetic_and_unit() -> None:
    a, b = make(0), make(1)
    assert torch.allclose((a + b).vectors, a.vectors + b.vectors)
    assert torch.allclose((a - b * 2).vectors, a.vectors - 2 * b.vectors)
    assert torch.allclose((-a / 2).vectors, -a.vectors / 2)
    assert torch.allclose(a.unit().vectors.norm(dim=1), torch.ones(3))
    assert (a + b).kind == "data-diff"
    activations = torch.randn(4, 8)
    assert torch.allclose(a.project(activations, 3), activations @ (a.at(3) / a.at(3).norm()), atol=1e-6)


def test_combining_across_models_widths_or_layers_is_refused() -> None:
    with pytest.raises(DirectionError, match="widths differ: 8 against 9"):
        make() + make(d=9)
    with pytest.raises(DirectionError, match="layers differ"):
        make() + make(layers=(0, 1, 2))
    with pytest.raises(DirectionError, match="models differ"):
        make(model="a").cosine(make(model="b"))
    with pytest.raises(DirectionError, match="no layer in common"):
        make(layers=(0,)).cosine(make(layers=(1,)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    vectors = torch.ones(2, 4)
    vectors[1, 2] = bad
    with pytest.raises(DirectionError, match=r"NaN or infinite values at layers \[7\]"):
        Direction(vectors=vectors, layers=(3, 7), kind="random")


def test_a_zero_vector_has_no_direction() -> None:
    zero = Direction(vectors=torch.zeros(1, 4), layers=(0,), kind="random")
    with pytest.raises(DirectionError, match="zero vector"):
        zero.unit()


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (-1, 0), (0,)])
def test_layers_must_be_in_order_and_match(layers: tuple[int, ...]) -> None:
    with pytest.raises(DirectionError):
        Direction(vectors=torch.ones(2, 4), layers=layers, kind="random")


def test_file_round_trip_keeps_everything(tmp_path: Path) -> None:
    direction = make(model="tiny", token_scope="response", n_positive=3, n_negative=4, sources=("a", "b"))
    path = direction.save(tmp_path / "deep" / "d.safetensors")
    loaded = Direction.load(path, model="tiny", n_layers=4, d_model=8)
    assert torch.equal(loaded.vectors, direction.vectors)
    assert (loaded.layers, loaded.kind, loaded.model) == (direction.layers, "data-diff", "tiny")
    assert (loaded.n_positive, loaded.n_negative, loaded.sources) == (3, 4, ("a", "b"))
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["layer.0", "layer.2", "layer.3"]
        metadata = json.loads(file.metadata()["em_interp"])
    wanted = "format_version kind model model_revision hook_point layer_convention token_scope operation"
    assert set(wanted.split()) | {"n_positive", "n_negative", "norms", "sources", "created_by"} <= set(metadata)
    assert metadata["format_version"] == FORMAT_VERSION


def test_loading_checks_against_the_model_in_hand(tmp_path: Path) -> None:
    path = make(model="tiny").save(tmp_path / "d.safetensors")
    with pytest.raises(ShapeError, match="width 8 and the model has 16"):
        Direction.load(path, d_model=16)
    with pytest.raises(ShapeError, match="layer 3 and the model only layers 0-2"):
        Direction.load(path, n_layers=3)
    with pytest.raises(ShapeError, match="made on 'tiny'"):
        Direction.load(path, model="other")


def test_damaged_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    path = make().save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableFileError, match="not a whole safetensors file"):
        Direction.load(path)
    with pytest.raises(MissingDataError, match="no such file"):
        Direction.load(tmp_path / "absent.safetensors")
    save_file({"layer.0": torch.ones(4)}, path)
    with pytest.raises(MissingDataError, match="no em_interp metadata"):
        Direction.load(path)
    metadata = make(layers=(0,), d=4).metadata()
    save_file({"layer.0": torch.ones(4)}, path, metadata={"em_interp": json.dumps(metadata)})
    with pytest.raises(BadValueError, match="altered after it was saved"):
        Direction.load(path)
    metadata["format_version"] = 99
    save_file({"layer.0": torch.ones(4)}, path, metadata={"em_interp": json.dumps(metadata)})
    with pytest.raises(UnreadableFileError, match="format_version is 99"):
        Direction.load(path)
    del metadata["kind"]
    save_file({"layer.0": torch.ones(4)}, path, metadata={"em_interp": json.dumps(metadata)})
    with pytest.raises(MissingDataError, match="lacks kind"):
        Direction.load(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "d.safetensors")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("em_interp.files.directions.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        make(5).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_random_controls_match_the_norm() -> None:
    direction = make() * 7.0
    controls = random_directions(direction, 3, torch.Generator().manual_seed(0))
    for control in controls:
        assert list(control.norms().values()) == pytest.approx(list(direction.norms().values()), rel=1e-6)
    assert not torch.equal(controls[0].vectors, controls[1].vectors)
