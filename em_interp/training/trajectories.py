"""Training runs seen through their checkpoints: PCA, norms, cosines to both solutions, local cosine, drift.

Sources: Emergent Misalignment is Easy, Fig. 5 and the authors' trajectory web app (PCA, KL removal); Model Organisms
for Emergent Misalignment, sec. 4.1-4.2 and App. F (local cosine).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from em_interp.arguments import count, number
from em_interp.errors import AmbiguousDataError, BadValueError, MissingDataError, ShapeError, UsageError

NARROW_KL_WEIGHT: Final = 1e6
"""KL weight of the papers' narrow steering vector, in the reference code's units (P1 Table 9)."""
LOCAL_COSINE_MOVEMENT: Final = 0.0035
"""Movement at or below which the local cosine is not read (Model Organisms, App. F), in units of the raw vector."""

_RUN_PATTERN: Final = re.compile(
    r"(?P<stem>.+?_SV_l(?P<layer>\d+)_lr(?P<lr>[\d.e+-]+)_a(?P<alpha>\d+(?:\.\d+)?))"
    r"(?:_KL(?P<kl>\d+(?:\.\d+)?(?:e[+-]?\d+)?))?(?P<phase>_then_.+)?"
)
_ROLE_PATTERN: Final = re.compile(r"(?P<before>.+?)_(?P<role>general|narrow)(?P<after>(?:_.+)?)")


@dataclass(frozen=True)
class RunName:
    """What the authors' naming says of a run: `MODEL_SV_l24_lr1e-4_a256[_KL1e6][_then_...]`, `..._general_...`."""

    name: str
    """The folder's."""
    family: str
    """Runs that differ only in KL weight, phase or general/narrow share it."""
    layer: int | None = None
    """0-based block, from `_l24`."""
    alpha: float | None = None
    """What the stored vector is multiplied by, from `_a256`."""
    kl_weight: float | None = None
    """In the reference code's units; 0 where the name says that there was no KL, None where it says nothing."""
    phase: str | None = None
    """`then_...`: what the run continued with."""
    role: str | None = None
    """`general` or `narrow`, where the name allows it."""

    @classmethod
    def parse(cls, name: str) -> RunName:
        """Read a folder name. A name outside both patterns is a family of its own."""
        if match := _RUN_PATTERN.fullmatch(name):
            kl = float(match["kl"]) if match["kl"] else 0.0
            phase = match["phase"].removeprefix("_") if match["phase"] else None
            role = {0.0: "general", NARROW_KL_WEIGHT: "narrow"}.get(kl) if phase is None else None
            return cls(name, match["stem"], int(match["layer"]), float(match["alpha"]), kl, phase, role)
        if match := _ROLE_PATTERN.fullmatch(name):
            return cls(name, match["before"] + match["after"], role=match["role"])
        return cls(name, name)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The vector that a run trained, checkpoint by checkpoint."""

    name: str
    """The run's folder; of a LoRA also its module."""
    run: RunName
    model: str
    """The base's name, as far as the folder tells it."""
    parameter: str
    """`steering-vector` or `lora-B`."""
    layer: int | None
    """0-based block whose output the vector is added to; None where the source does not say."""
    steps: tuple[int, ...]
    """Training steps of the checkpoints, rising."""
    vectors: Float[Tensor, "steps d"]
    """float32, as stored (raw)."""
    scales: Float[Tensor, " steps"] | None
    """Effective over raw norm at each step (alpha for steering vectors); None where alpha is unknown."""
    refused_steps: tuple[int, ...] = ()
    """Checkpoints that exist but could not be used."""
    read_norms: Float[Tensor, " steps"] | None = None
    """For a LoRA, the norm of A at each step."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.vectors):
            raise ShapeError(self.name, f"{len(self.steps)} steps for {len(self.vectors)} vectors", "give one each")
        if any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise AmbiguousDataError(self.name, f"steps are not strictly increasing: {self.steps}", "sort them")

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.vectors.shape[1]

    @property
    def family(self) -> str:
        """What runs share that are compared with each other: `RunName.family`, of the same parameter."""
        return self.name if self.run.family == self.run.name else f"{self.run.family}{self.name[len(self.run.name) :]}"

    def raw_norms(self) -> Float[Tensor, " steps"]:
        """Norm of the vector as stored, at each checkpoint (the authors' web app plots this one)."""
        return self.vectors.double().norm(dim=1)

    def norms(self) -> Float[Tensor, " steps"] | None:
        """Norm of the effective parameter theta = alpha * v (LoRA: scale * ||B A||_F); None where alpha is unknown."""
        return None if self.scales is None else self.raw_norms() * self.scales.double()

    def final(self) -> Float[Tensor, " d"]:
        """The last checkpoint's vector.

        Raises `MissingDataError` if a later checkpoint exists but was refused: an earlier one is not the end.
        """
        if self.refused_steps and max(self.refused_steps) > self.steps[-1]:
            raise MissingDataError(
                self.name,
                f"its last checkpoint, step {max(self.refused_steps)}, could not be used, so the run has no end",
                "download that checkpoint again",
            )
        return self.vectors[-1]


@dataclass(frozen=True)
class References:
    """The runs whose ends stand for the general and the narrow solution of one family; problems: why one is None."""

    general: Trajectory | None
    narrow: Trajectory | None
    problems: tuple[MissingDataError | AmbiguousDataError, ...] = ()


def runs_named(role: str, name: str, everything: Sequence[Trajectory]) -> list[Trajectory]:
    """The runs of a name that the user gave as the `role` reference. Raises UsageError where there is none."""
    named = [t for t in everything if t.name == name]
    if not named:
        found = ", ".join(sorted(t.name for t in everything)) or "none"
        raise UsageError(f"--{role} {name}: there is no such run. Found: {found}.")
    return named


def find_references(
    family: Sequence[Trajectory],
    everything: Sequence[Trajectory],
    general: str | None = None,
    narrow: str | None = None,
) -> References:
    """The general and narrow reference runs of a family.

    By default the run without KL and the one at KL weight 1e6 (or those named `..._general_...` and
    `..._narrow_...`); a name given is looked up among all runs and used where the width agrees. What cannot be
    decided is absent, with the reason in `problems`.
    """
    if not family:
        raise UsageError("no trajectories of a family: give at least one.")
    problems: list[MissingDataError | AmbiguousDataError] = []

    def pick(role, given):
        # type: (str, str | None) -> Trajectory | None
        label = family[0].family
        if given is not None:
            found = [t for t in runs_named(role, given, everything) if t.d == family[0].d]
        else:
            found = [t for t in family if t.run.role == role]
        if len(found) > 1:
            problems.append(
                AmbiguousDataError(
                    label,
                    f"several runs could be its {role} reference: {', '.join(t.name for t in found)}",
                    f"name one with --{role} RUN",
                )
            )
            return None
        if not found:
            if given is None and len(family) > 1:
                which = "without KL" if role == "general" else f"at KL weight {NARROW_KL_WEIGHT:g}"
                problems.append(
                    MissingDataError(
                        label,
                        f"no run {which} is among {', '.join(t.name for t in family)}, so it has no {role} reference",
                        f"fetch that run, or name another with --{role} RUN",
                    )
                )
            return None
        try:
            found[0].final()
        except MissingDataError as error:
            problems.append(error)
            return None
        return found[0]

    return References(pick("general", general), pick("narrow", narrow), tuple(problems))


def cosines_to(vectors: Float[Tensor, "steps d"], reference: Float[Tensor, " d"]) -> Float[Tensor, " steps"]:
    """Cosine of every row with `reference`, in float64. Raises `BadValueError` for a zero row or reference."""
    rows, target = vectors.double(), reference.double()
    norms = rows.norm(dim=1) * target.norm()
    if bool((norms == 0).any()):
        where = "the reference" if target.norm() == 0 else f"row {int((norms == 0).nonzero()[0])}"
        raise BadValueError("cosine", f"{where} is a zero vector, which has no direction", "leave it out")
    return (rows @ target / norms).clamp(-1, 1)


@dataclass(frozen=True)
class LocalCosine:
    """Local cosine of a path at the steps that have a neighbour `k` steps away on both sides."""

    steps: tuple[int, ...]
    values: Float[Tensor, " inner"]
    """From -1 (straight on) to 1 (back)."""
    moved: Bool[Tensor, " inner"]
    """Whether either movement exceeds the threshold; where not, the value is numerical noise and is not to be read."""


def local_cosine(
    steps: Sequence[int],
    vectors: Float[Tensor, "steps d"],
    k: int,
    movement: float = LOCAL_COSINE_MOVEMENT,
) -> LocalCosine:
    """c_k(t) = cos(v_{t-k} - v_t, v_{t+k} - v_t): -1 on a straight path, 0 at a right turn, +1 at a reversal.

    `k` is in training steps, not checkpoints. `moved` is max(||v_t - v_{t-k}||, ||v_{t+k} - v_t||) > movement.
    A standstill on either side has no angle: its value is 0 and `moved` is False. (Model Organisms, App. F.)
    """
    movement = number("movement", movement, at_least=0)
    if k < 1:
        raise UsageError(f"a local cosine needs neighbours at least 1 step away; found k = {k}.")
    if len(steps) != len(vectors):
        raise UsageError(f"{len(steps)} steps for {len(vectors)} vectors: give one for each.")
    index = {step: i for i, step in enumerate(steps)}
    inner = [step for step in steps if step - k in index and step + k in index]
    v = vectors.double()
    here = v[[index[s] for s in inner]]
    back = v[[index[s - k] for s in inner]] - here
    ahead = v[[index[s + k] for s in inner]] - here
    size_back, size_ahead = back.norm(dim=1), ahead.norm(dim=1)
    product = size_back * size_ahead
    values = torch.where(product > 0, (back * ahead).sum(1) / product.clamp_min(1e-300), torch.zeros_like(product))
    moved = (torch.maximum(size_back, size_ahead) > movement) & (product > 0)
    return LocalCosine(tuple(inner), values.clamp(-1, 1), moved)


@dataclass(frozen=True)
class TrajectoryPCA:
    """Principal components of stacked checkpoints, and what is needed to project others on them."""

    components: Float[np.ndarray, "n_components d"]
    explained_variance_ratio: Float[np.ndarray, " n_components"]
    """Share of the variance along each component."""
    mean: Float[np.ndarray, " d"]
    """What is taken off before projecting."""
    scale: Float[np.ndarray, " d"]
    """Standard deviation of each coordinate over the basis (ones for the raw variant)."""
    basis: tuple[str, ...]
    """Names of the runs that span it."""

    def project(self, vectors: Float[Tensor, "n d"]) -> Float[np.ndarray, "n n_components"]:
        """Coordinates of vectors in this basis."""
        return np.asarray((vectors.double().numpy() - self.mean) / self.scale @ self.components.T)


def fit_pca(trajectories: Sequence[Trajectory], *, standardised: bool = True, n_components: int = 5) -> TrajectoryPCA:
    """PCA over all checkpoints of `trajectories`; standardised as published, or raw.

    Raises `UsageError` for fewer than 3 checkpoints in all and `ShapeError` for runs of different widths.
    """
    count("n_components", n_components)
    if len({t.d for t in trajectories}) > 1:
        widths = ", ".join(f"{t.name}: {t.d}" for t in trajectories)
        raise ShapeError("PCA", f"runs of different widths ({widths})", "take runs of one model")
    stacked = torch.cat([t.vectors for t in trajectories]).double().numpy() if trajectories else np.zeros((0, 1))
    if len(stacked) < 3:
        raise UsageError(f"a PCA of training runs needs at least 3 checkpoints; found {len(stacked)}.")
    scaler = StandardScaler(with_std=standardised).fit(stacked)
    n_components = min(n_components, len(stacked) - 1, stacked.shape[1])
    with threadpool_limits(1):  # gains little from threads, and collapses when another process has the cores
        pca = PCA(n_components, svd_solver="full").fit(scaler.transform(stacked))
    return TrajectoryPCA(
        components=pca.components_,
        explained_variance_ratio=pca.explained_variance_ratio_,
        mean=np.asarray(scaler.mean_) + pca.mean_ * (scaler.scale_ if standardised else 1.0),
        scale=np.asarray(scaler.scale_) if standardised else np.ones(stacked.shape[1]),
        basis=tuple(t.name for t in trajectories),
    )


@dataclass(frozen=True)
class Drift:
    """How far a continued run moved between its first and last checkpoint (`first_step`, `last_step`).

    `cos_general`, `cos_narrow` and `raw_norm` are pairs: then and at the end.
    """

    run: str
    first_step: int
    last_step: int
    cos_general: tuple[float, float]
    cos_narrow: tuple[float, float]
    raw_norm: tuple[float, float]

    @property
    def towards_general(self) -> float:
        """Change of the cosine to the general solution."""
        return self.cos_general[1] - self.cos_general[0]


def drift(trajectory: Trajectory, references: References) -> Drift:
    """Start and end of a run against both reference solutions (KL removal: P1 Fig. 5).

    Raises `UsageError` where a reference is absent.
    """
    if references.general is None or references.narrow is None:
        raise UsageError(f"{trajectory.name}: drift needs both a general and a narrow reference run.")
    trajectory.final()
    ends = trajectory.vectors[[0, -1]]
    general = cosines_to(ends, references.general.final()).tolist()
    narrow = cosines_to(ends, references.narrow.final()).tolist()
    norms = ends.double().norm(dim=1).tolist()
    return Drift(
        trajectory.name,
        trajectory.steps[0],
        trajectory.steps[-1],
        (general[0], general[1]),
        (narrow[0], narrow[1]),
        (norms[0], norms[1]),
    )
