"""theta: what a finetune trained, as one thing that can be scaled, perturbed, attached and compared.

theta is the *effective* parameter: alpha * v for a steering vector, scale * B A for LoRA, where scale is
alpha / r, or alpha / sqrt(r) with rsLoRA; for DoRA and full finetunes the change of the base's weights. Norms are of
theta (Frobenius over all modules).

A new kind is one file with a class of `Solution`, and its line in `load.KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.cards import bars, card, short
from em_interp.errors import SolutionError
from em_interp.models.architectures import layer_of
from em_interp.models.chat_model import ChatModel
from em_interp.models.precision import exact

Base = ChatModel | str | Path | None
"""What a solution's file may need to be read: the model in hand, or a folder or hub name of it."""


class NotShareable(Exception):
    """Why a shared pass cannot be had."""


@runtime_checkable
class Stack(Protocol):
    """Several solutions of one kind, acting in one pass: its rows are the conversations under each of them in turn."""

    def enter(self, residual: Float[Tensor, "row token d_model"]) -> Float[Tensor, "theta_row token d_model"]:
        """What comes out of the block `fixed_layer`, from what the chat model computes there."""
        ...

    def on(self, n_tokens: int, n_scored: int) -> AbstractContextManager[None]:
        """Inside, the blocks after it act. n_tokens: positions of one theta; n_scored: those that the last MLP sees."""
        ...


@dataclass(frozen=True)
class Trained:
    """What training itself wrote, as one vector: a trajectory's rows, in their own units."""

    parameter: str
    """`steering-vector`, `lora-B`, or `theta` where it is more than one vector."""
    vector: Float[Tensor, "d"]
    layer: int | None = None
    """0-based block that it acts at, where it is one."""
    read_norm: float | None = None
    """For a LoRA, the norm of A."""
    direction: Float[Tensor, "d_model"] | None = None
    """What is written to the residual stream, where that is one vector."""


class Alone(Stack):
    """A stack of one solution."""

    def __init__(self, model: ChatModel, members: Sequence[Solution]) -> None:
        (member,) = members
        self.solution, self.model = member.ready(model), model

    def enter(self, residual: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        return residual

    def on(self, n_tokens: int, n_scored: int) -> AbstractContextManager[None]:
        return self.solution.attached(self.model)


class Solution(ABC):
    """What efficiency, stability, curvature, influence, gradients and trajectories need of a trained solution.

    Abstract is what only the kind itself can say; the rest follows from that, and is overridden where a kind can do
    it in less time or memory. `space` names the places of theta; a tensor at a place has the place's shape.
    """

    ADAPTERS: ClassVar[tuple[str, ...]] = ()
    """What tables and suite files may call one of this kind: `steering-vector`, `rank-1`, `all-modules`, `full`."""
    FACTORS: ClassVar[tuple[str, ...]] = ()
    """Of what can be turned alone (`perturbed(on=...)`)."""
    OF_BASE: ClassVar[bool] = False
    """Whether its folder can be read only together with the base."""

    @property
    def base(self) -> str | None:
        """The model that it was trained on, where that is known."""
        return None

    @property
    @abstractmethod
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """Where theta acts and with which shape: {"layer 3": (d_model,)}, or {module: (d_out, d_in)}."""

    @abstractmethod
    def delta(self, place: str) -> Float[Tensor, "..."]:
        """theta at one place of the space, detached, in float64."""

    @property
    @abstractmethod
    def first_layer(self) -> int:
        """The first block that theta has to do with; everything before it can be computed once."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of theta and of where it acts: what tells two finetunes apart."""

    @abstractmethod
    def scaled(self, factor: float) -> Solution:
        """The solution whose effective theta is `factor` times this one's."""

    @abstractmethod
    def tensors(self, on: str = "both") -> Mapping[str, Tensor]:
        """The trained tensors that `perturbed` turns, by name; on: "both", or one of `FACTORS`."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Solution:
        """This solution with other values of some of its `tensors`; differentiable in them."""

    @abstractmethod
    def random_like(self, generator: torch.Generator) -> Solution:
        """A random direction of the same space, as long as this solution."""

    @abstractmethod
    def attached(self, model: ChatModel, *, must_act: bool = True) -> AbstractContextManager[None]:
        """Inside, `model` answers with theta; every pass, any batch, with or without KV cache.

        must_act: unless false, it is an error that no pass was run inside.
        """

    @abstractmethod
    def tracked(self, model: ChatModel) -> AbstractContextManager[dict[str, Tensor]]:
        """As `attached`, yielding {place: leaf}: a loss' gradient there is its gradient with respect to theta."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the folder that real ones have; returns it."""

    # -- what follows ---------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """What tables may call this one, its own name first."""
        return self.ADAPTERS

    def ready(self, model: ChatModel) -> Solution:
        """The same, with what attaching it to `model` costs done once; it holds on to that."""
        return self

    def describe(self) -> str:
        """What it is, in a few words."""
        return f"a {type(self).__name__}"

    @property
    def source(self) -> str:
        """Where it was read from; empty for one that was made here, or made of another."""
        return str(vars(self).get("_source", ""))

    def read_from(self, source: str | Path) -> Solution:
        """The same, which says that it was read from there."""
        object.__setattr__(self, "_source", str(source))
        return self

    @property
    def identity(self) -> str:
        """What tells it from another of its kind: its source, or where it has none a hash of theta."""
        if self.source:
            return f"from {short(self.source)}"
        return "" if self.OF_BASE else f"SHA-256 {self.fingerprint[:16]}"

    def __repr__(self) -> str:
        parts = [self.describe().removeprefix("a "), f"norm {self.norm:.6g}", self.identity]
        parts += [f"base {self.base}"] if self.base else []
        return f"{type(self).__name__}({', '.join(part for part in parts if part)})"

    def _repr_html_(self) -> str:
        facts = {
            "norm": f"{self.norm:.6g}",
            "from": short(self.source),
            "base": self.base,
            "acts from": f"layer {self.first_layer}",
            "outside the blocks": self.outside_blocks,
            "SHA-256": "" if self.OF_BASE else self.fingerprint[:16],
        }
        plot = bars(self.norms_by_layer(), "norm of theta")
        return card(f"{type(self).__name__}: {self.describe()}", facts, plot)

    @property
    def fixed_layer(self) -> int | None:
        """The last block whose output theta does not change, before theta is added; None where there is none."""
        return self.first_layer - 1 if self.first_layer else None

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """The places of theta that lie in no block, such as the output head."""
        return ()

    @property
    def dimension(self) -> int:
        """Number of coordinates of the space (d_model, or the sum of d_out x d_in)."""
        return sum(math.prod(shape) for shape in self.space.values())

    @property
    def norm(self) -> float:
        """Frobenius norm of the effective theta."""
        return math.sqrt(sum(float(self.delta(place).square().sum()) for place in self.space))

    def norms(self) -> Mapping[str, float]:
        """Norm of theta at each place of the space."""
        return {place: float(self.delta(place).norm()) for place in self.space}

    def norms_by_layer(self) -> dict[int, float]:
        """Norm of theta in each block that it touches."""
        squares: dict[int, float] = {}
        for place, norm in self.norms().items():
            layer = layer_of(place)
            if layer is not None and norm:
                squares[layer] = squares.get(layer, 0.0) + norm**2
        return {layer: math.sqrt(square) for layer, square in sorted(squares.items())}

    def paper_norms(self) -> dict[str, float]:
        """Norms under the papers' other conventions, by the name of their table column."""
        return {}

    def inner(self, other: Solution) -> float:
        """<theta, theta of other> over all coordinates, in float64. Raises SolutionError for another space."""
        if dict(self.space) != dict(other.space):
            raise SolutionError(
                f"{self.describe()} and {other.describe()} have no inner product. Compare solutions of one kind, layer "
                "and modules."
            )
        return sum(float((self.delta(place) * other.delta(place)).sum()) for place in self.space)

    def along(self, parts: Mapping[str, Tensor]) -> float:
        """<parts, theta> over the places that `parts` has, in float64."""
        wide = ((exact(part), self.delta(place)) for place, part in parts.items())
        return sum(float((part * delta.to(part.device)).sum()) for part, delta in wide)

    def b_cosine(self, parts: Mapping[str, Tensor], end: Solution) -> float | None:
        """For LoRA the papers' cosine of minus a gradient with the solution `end`, B by B; else None."""
        return None

    def trained(self) -> Trained:
        """What training wrote, as one float32 vector; by default all of theta."""
        return Trained("theta", torch.cat([self.delta(place).flatten() for place in self.space]).float().cpu())

    @property
    def unit(self) -> float:
        """Length of theta per length of `tensors`, where theta is a multiple of them."""
        return 1.0

    def perturbed(self, eps: float, generator: torch.Generator, on: str = "both") -> Solution:
        """sqrt(1 - eps^2) x + eps y for each of `tensors`, with y orthogonal to x and as long."""
        trained = self.tensors(on)
        return self.with_tensors({name: rotate_away(x, eps, generator, what=name) for name, x in trained.items()})

    @property
    def alike(self) -> Hashable:
        """Solutions of which this is equal have one kind and shape: what holds of one's passes does of the other's."""
        return type(self), self.fixed_layer, tuple(sorted(self.space.items()))

    @property
    def at_once(self) -> int:
        """How many that are alike to hold, and to stack, at a time."""
        return 1

    def stack(self, model: ChatModel, members: Sequence[Solution]) -> Stack:
        """`members`, alike and at most `at_once`, as one stack."""
        return Alone(model, members)


STACKED_ENTRIES = 2**28
"""Numbers in the tensors of solutions that are held at once: 1 GB in float32."""


def rotate_away(
    x: Float[Tensor, "..."], eps: float, generator: torch.Generator, *, what: str = "theta"
) -> Float[Tensor, "..."]:
    """x' = sqrt(1 - eps^2) x + eps y, y uniform among tensors orthogonal to x with x's norm (P1, Fig. 4b).

    ||x'|| = ||x|| and cos(x', x) = sqrt(1 - eps^2), computed in float64, returned in x's dtype. eps = 0
    returns x. Raises SolutionError for eps outside [0, 1] and for a zero or one-element x.
    """
    check_eps(eps)
    flat = exact(x.detach()).flatten().cpu()
    norm = flat.norm()
    if flat.numel() < 2 or not norm > 0:
        raise SolutionError(f"{what} is zero or has one element: no orthogonal.")
    if eps == 0.0:
        return x.detach().clone()
    unit = flat / norm
    y = torch.randn(flat.numel(), dtype=torch.float64, generator=generator)
    for _ in range(2):  # the second pass removes what rounding left
        y = y - (y @ unit) * unit
    y = y * (norm / y.norm())
    mixed = math.sqrt(1.0 - eps * eps) * flat + eps * y
    turned: Tensor = mixed.reshape(x.shape).to(x.device, x.dtype)
    return turned


def check_eps(eps: float) -> None:
    """Raise SolutionError unless eps is in [0, 1]."""
    if not 0.0 <= eps <= 1.0:
        raise SolutionError(f"eps is {eps}; it is a sine and must be in [0, 1].")


def check_factor(factor: float) -> float:
    """A finite number. Raises SolutionError."""
    if not math.isfinite(factor):
        raise SolutionError(f"cannot scale by {factor}.")
    return float(factor)
