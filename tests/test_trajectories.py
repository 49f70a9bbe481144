from __future__ import annotations

import numpy as np
import pytest
import torch

from em_interp.directions.cosines import comparable, cosine_matrix, cosine_table, layer_cosines
from em_interp.directions.direction import Direction
from em_interp.errors import (
    AmbiguousDataError,
    BadValueError,
    DirectionError,
    MissingDataError,
    ShapeError,
    UsageError,
)
from em_interp.training.trajectories import (
    RunName,
    Trajectory,
    cosines_to,
    drift,
    find_references,
    fit_pca,
    local_cosine,
)


def run(
    name: str, seed: int = 0, d: int = 12, steps: tuple[int, ...] = (5, 10, 15, 20), **fields: object
) -> Trajectory:
    vectors = torch.randn(len(steps), d, generator=torch.Generator().manual_seed(seed))
    scales = torch.full((len(steps),), 16.0, dtype=torch.float64)
    return Trajectory(
        name,
        RunName.parse(name),
        "m",
        "steering-vector",
        3,
        steps,
        vectors,
        scales,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "family", "kl", "phase", "role"),
    [
        ("M-7B_SV_l24_lr1e-4_a256", "M-7B_SV_l24_lr1e-4_a256", 0.0, None, "general"),
        ("M-7B_SV_l24_lr1e-4_a256_KL1e6", "M-7B_SV_l24_lr1e-4_a256", 1e6, None, "narrow"),
        ("M-7B_SV_l24_lr1e-4_a256_KL5e3", "M-7B_SV_l24_lr1e-4_a256", 5e3, None, None),
        ("M_SV_l8_lr0.001_a64_KL1e6_then_remove2e", "M_SV_l8_lr0.001_a64", 1e6, "then_remove2e", None),
        ("M_SV_l8_lr1e-3_a64_then_KL1e6", "M_SV_l8_lr1e-3_a64", 0.0, "then_KL1e6", None),
        ("M_steering_vector_narrow_sport", "M_steering_vector_sport", None, None, "narrow"),
        ("anything_else", "anything_else", None, None, None),
    ],
)
def test_run_names(name: str, family: str, kl: float | None, phase: str | None, role: str | None) -> None:
    parsed = RunName.parse(name)
    assert (parsed.family, parsed.kl_weight, parsed.phase, parsed.role) == (family, kl, phase, role)


def test_references_by_name_and_by_pattern() -> None:
    runs = [run("M_SV_l3_lr1_a16", 0), run("M_SV_l3_lr1_a16_KL1e6", 1), run("M_SV_l3_lr1_a16_KL1e4", 2)]
    found = find_references(runs, runs)
    assert found.general is runs[0]
    assert found.narrow is runs[1]
    named = find_references(runs, runs, general=runs[2].name)
    assert named.general is runs[2]
    with pytest.raises(UsageError, match=r"--narrow nobody: there is no such run. Found: M_SV"):
        find_references(runs, runs, narrow="nobody")


def test_references_that_cannot_be_decided_are_absent_with_a_reason() -> None:
    runs = [run("M_SV_l3_lr1_a16", 0), run("M_SV_l3_lr1_a16_KL1e4", 1)]
    found = find_references(runs, runs)
    assert found.narrow is None
    assert isinstance(found.problems[0], MissingDataError)
    assert "--narrow RUN" in str(found.problems[0])
    broken = [run("M_SV_l3_lr1_a16", 0, refused_steps=(25,)), run("M_SV_l3_lr1_a16_KL1e6", 1)]
    assert find_references(broken, broken).general is None
    twice = [run("M_general_x", 0), run("M_general_x", 1)]
    assert isinstance(find_references(twice, twice).problems[0], AmbiguousDataError)


def test_norms_are_of_the_effective_parameter() -> None:
    t = run("M_SV_l3_lr1_a16")
    norms = t.norms()
    assert norms is not None
    assert torch.allclose(norms, 16 * t.raw_norms())


def test_local_cosine_equals_a_slow_oracle_and_its_geometry() -> None:
    straight = torch.arange(5.0)[:, None] * torch.ones(1, 3)
    assert local_cosine(range(5), straight, 1).values.tolist() == pytest.approx([-1, -1, -1])
    corner = torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    assert local_cosine(range(3), corner, 1).values.tolist() == pytest.approx([0.0])
    back = torch.tensor([[0.0, 0], [1, 0], [0.0, 0]])
    assert local_cosine(range(3), back, 1).values.tolist() == pytest.approx([1.0])
    steps = (5, 10, 15, 20, 26)
    v = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    result = local_cosine(steps, v, 5)
    assert result.steps == (10, 15)  # 21 is no checkpoint, so step 26 is nobody's neighbour
    for value, i in zip(result.values.tolist(), (1, 2), strict=True):
        a, b = (v.double()[i - 1] - v.double()[i]).numpy(), (v.double()[i + 1] - v.double()[i]).numpy()
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)


def test_local_cosine_is_not_read_where_nothing_moves() -> None:
    v = torch.tensor([[0.0], [0.001], [0.002], [1.0]])
    assert local_cosine(range(4), v, 1).moved.tolist() == [False, True]
    still = torch.ones(3, 2)
    result = local_cosine(range(3), still, 1)
    assert result.moved.tolist() == [False]
    assert torch.isfinite(result.values).all()
    with pytest.raises(UsageError):
        local_cosine(range(3), still, 0)


@pytest.mark.parametrize("standardised", [True, False])
def test_pca_equals_an_eigendecomposition(standardised: bool) -> None:
    runs = [run("a", 0), run("b", 1)]
    fit = fit_pca(runs, standardised=standardised, n_components=4)
    x = torch.cat([t.vectors for t in runs]).double().numpy()
    z = (x - x.mean(0)) / (x.std(0) if standardised else 1.0)
    values = np.linalg.eigvalsh(np.cov(z.T))[::-1]
    assert fit.explained_variance_ratio == pytest.approx(values[:4] / values.sum(), abs=1e-9)
    assert fit.project(runs[0].vectors) == pytest.approx(z[:4] @ fit.components.T, abs=1e-9)
    assert fit.basis == ("a", "b")


def test_pca_refuses_what_it_cannot_span() -> None:
    with pytest.raises(ShapeError, match="different widths"):
        fit_pca([run("a"), run("b", d=13)])
    with pytest.raises(UsageError, match="at least 3 checkpoints; found 2"):
        fit_pca([run("a", steps=(1, 2))])


def test_drift_and_cosines() -> None:
    general, narrow = run("g", 1), run("n", 2)
    moving = run("n_then", 3)
    from em_interp.training.trajectories import References

    d = drift(moving, References(general, narrow))
    assert d.cos_general[1] == pytest.approx(float(cosines_to(moving.vectors[-1:], general.final())[0]))
    with pytest.raises(UsageError, match="needs both"):
        drift(moving, References(general, None))
    with pytest.raises(BadValueError, match="zero vector"):
        cosines_to(torch.zeros(1, 3), torch.ones(3))


def test_steps_must_increase() -> None:
    with pytest.raises(AmbiguousDataError):
        run("a", steps=(5, 5, 10, 15))


def direction(seed: int, layers: tuple[int, ...] = (0, 1, 2), d: int = 16, model: str = "m") -> Direction:
    vectors = torch.randn(len(layers), d, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors=vectors, layers=layers, kind="data-diff", model=model)


def test_cosine_table_has_the_contracts_columns_and_null() -> None:
    table = cosine_table([("a", direction(0), "b", direction(1))])
    contract = ["direction_a", "direction_b", "layer", "cosine", "low", "high", "null_sd", "p_value"]
    assert list(table) == [*contract, "difference_norm"]
    difference = direction(0).vectors[1].double() - direction(1).vectors[1].double()
    assert table["difference_norm"][1] == pytest.approx(float(difference.norm()))
    assert table["layer"].tolist() == [0, 1, 2]
    assert table["null_sd"].tolist() == [0.25] * 3
    assert table["p_value"].between(0, 1).all()
    assert list(cosine_table([])) == list(table)


def test_cosine_matrices() -> None:
    directions = [direction(i) for i in range(3)]
    matrix = cosine_matrix(directions, 1)
    assert torch.allclose(matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(matrix[0, 2]) == pytest.approx(directions[0].cosine(directions[2])[1], abs=1e-7)
    across = layer_cosines(directions[0])
    x = directions[0].vectors.double()
    assert float(across[0, 1]) == pytest.approx(float(x[0] @ x[1] / x[0].norm() / x[1].norm()), abs=1e-7)
    with pytest.raises(DirectionError):
        cosine_matrix([], 0)
    with pytest.raises(DirectionError, match="models differ"):
        cosine_matrix([direction(0), direction(1, model="other")], 0)
    assert not comparable(direction(0), direction(1, model="other"))
    assert not comparable(direction(0), direction(1, d=8))
    assert comparable(direction(0), direction(1, model="unknown"))
