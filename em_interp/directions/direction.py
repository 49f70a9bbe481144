"""Directions in the residual stream: one vector a layer, what they mean, and the file they live in.

Layer `l` (0-based) is the output of decoder block `l` (`blocks.{l}.hook_out` in TransformerLens). The sign is
misaligned minus aligned, so adding a direction induces misalignment (Convergent Linear Representations, sec. 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.arguments import plain_numbers
from em_interp.cards import bars, card, ranges
from em_interp.errors import BadValueError, DirectionError, ShapeError
from em_interp.files.directions import (
    FORMAT_VERSION,
    HOOK_POINT,
    LAYER_CONVENTION,
    check_norms,
    read_direction,
    write_direction,
)
from em_interp.files.given import several
from em_interp.models.weights import UNKNOWN, same_weights

KINDS: Final = (
    "data-diff",
    "data-diff-in-chat",
    "model-diff",
    "both-diff",
    "persona-contrast",
    "steering-vector",
    "lora-B",
    "random",
    "combination",
)
"""What a direction is the difference of, or was trained as; see `extraction`."""
TOKEN_SCOPES: Final = ("prompt", "last_prompt", "response", "all")
"""Tokens of a conversation that a mean may be over. The response includes its end-of-turn token."""
OPERATIONS: Final = ("add", "ablate")
"""How a direction may be meant to be applied."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction at one or more layers. Immutable; absent layers are absent, not zero.

    Raises `DirectionError` for an unknown kind, scope or operation, for NaN or infinite values, and for layers that
    are negative, repeated or out of order.

    >>> import torch
    >>> import em_interp as em
    >>> v = em.Direction(torch.eye(3)[:2], layers=(0, 1), kind="random")
    >>> v.norms()
    {0: 1.0, 1: 1.0}
    >>> (2 * v).at(1)
    tensor([0., 2., 0.])
    >>> v.cosine(-v)
    {0: -1.0, 1: -1.0}
    >>> v.save("v.safetensors")
    PosixPath('v.safetensors')
    >>> em.Direction.load("v.safetensors").layers
    (0, 1)
    """

    vectors: Float[Tensor, "present d_model"]
    """float32; row `i` belongs to `layers[i]`. In units of the residual stream."""
    layers: tuple[int, ...]
    """0-based block indices, strictly increasing."""
    kind: str
    """One of `KINDS`."""
    model: str = "unknown"
    """Name of the model whose residual stream this lives in."""
    model_revision: str = "unknown"
    """Commit of the model's repository, where it came from one."""
    token_scope: str = "response"
    """Which tokens were averaged: one of `TOKEN_SCOPES`."""
    operation: str = "add"
    """How it is meant to be applied: one of `OPERATIONS`."""
    n_positive: int | None = None
    """Number of misaligned responses behind it; None where the source does not say."""
    n_negative: int | None = None
    """The same of the aligned ones."""
    sources: tuple[str, ...] = field(default=())
    """What it was made from: file names, organisms, or the expressions that combined them."""
    weights: str = UNKNOWN
    """`weights.weights_hash` of the base weights whose residual stream this lives in."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        object.__setattr__(self, "vectors", self.vectors.detach().to(torch.float32).contiguous())
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("token_scope", self.token_scope, TOKEN_SCOPES),
            ("operation", self.operation, OPERATIONS),
        ):
            if value not in allowed:
                raise DirectionError(f"{name} {value!r} is not known; use one of {', '.join(allowed)}.")
        if self.vectors.ndim != 2 or len(self.layers) != self.vectors.shape[0]:
            raise DirectionError(
                f"{len(self.layers)} layers were named for vectors of shape {tuple(self.vectors.shape)}; "
                "give one row of [d_model] for each layer."
            )
        if not self.layers:
            raise DirectionError("a direction needs at least one layer; none was given.")
        if self.layers[0] < 0 or any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise DirectionError(f"layers must be 0-based and strictly increasing; found {self.layers}.")
        finite = torch.isfinite(self.vectors).all(dim=1)
        if not bool(finite.all()):
            bad = [layer for layer, ok in zip(self.layers, finite.tolist(), strict=True) if not ok]
            raise DirectionError(f"NaN or infinite values at layers {bad}; check what it was computed from.")

    # -- looking

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[1]

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector at one layer. Raises `DirectionError` where this direction has none there."""
        if layer not in self.layers:
            raise DirectionError(f"this {self.kind} direction has no layer {layer}; it has {ranges(self.layers)}.")
        return self.vectors[self.layers.index(layer)]

    def only(self, layers: int | Sequence[int]) -> Direction:
        """The same direction at fewer layers."""
        layers = several(layers)
        if not layers:
            raise DirectionError(f"no layers are named; this direction has {ranges(self.layers)}.")
        return replace(
            self,
            vectors=torch.stack([self.at(layer) for layer in sorted(layers)]),
            layers=tuple(sorted(layers)),
        )

    def for_model(self, name: str) -> Direction:
        """The same direction, said to live in the residual stream of the model `name`, whose weights may be others.

        For a finetune of the model that it was made on: the two share their axes.
        """
        return replace(self, model=name, model_revision="unknown", weights=UNKNOWN)

    def norms(self) -> dict[int, float]:
        """L2 norm at each layer, in units of the residual stream."""
        return dict(zip(self.layers, self.vectors.double().norm(dim=1).tolist(), strict=True))

    def cosine(self, other: Direction) -> dict[int, float]:
        """Cosine with `other` at every layer both have, computed in float64.

        Raises `DirectionError` for another width, no layer in common, or a zero vector.
        """
        common = [layer for layer in self.layers if layer in other.layers]
        self._check_same_space(other)
        if not common:
            raise DirectionError(f"no layer in common: {ranges(self.layers)} against {ranges(other.layers)}.")
        for each in (self, other):
            each.unit()  # refuses zero
        a, b = self.only(common).vectors.double(), other.only(common).vectors.double()
        values = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
        return dict(zip(common, values.clamp(-1.0, 1.0).tolist(), strict=True))

    def project(self, activations: Float[Tensor, "*tokens d_model"], layer: int) -> Float[Tensor, "*tokens"]:
        """Scalar projection of activations on the unit direction at `layer`, in the activations' units."""
        if activations.shape[-1] != self.d_model:
            raise DirectionError(
                f"activations of width {activations.shape[-1]} cannot be projected on a direction of width "
                f"{self.d_model}; they come from different models."
            )
        unit = self.only([layer]).unit().vectors[0]
        return activations.to(torch.float32) @ unit.to(activations.device)

    # -- arithmetic

    def unit(self) -> Direction:
        """Every layer scaled to norm 1. Raises `DirectionError` at a zero vector, which has no direction."""
        norms = self.vectors.double().norm(dim=1, keepdim=True)
        zero = [layer for layer, n in zip(self.layers, norms[:, 0].tolist(), strict=True) if n == 0]
        if zero:
            raise DirectionError(f"zero vector at layers {zero}: it has no direction. Drop those layers.")
        return replace(self, vectors=(self.vectors.double() / norms).float())

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, Real):
            return NotImplemented
        return replace(self, vectors=self.vectors * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if not isinstance(divisor, Real):
            return NotImplemented
        if not divisor:
            raise DirectionError("a direction cannot be divided by 0.")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Direction:
        return self * -1.0

    def __add__(self, other: Direction) -> Direction:
        return self._combine(other, "+", self.vectors + self._matching(other))

    def __sub__(self, other: Direction) -> Direction:
        return self._combine(other, "-", self.vectors - self._matching(other))

    def _matching(self, other: Direction) -> Tensor:
        if not isinstance(other, Direction):
            raise DirectionError(f"a Direction combines with a Direction, not with {type(other).__name__}.")
        self._check_same_space(other)
        if self.layers != other.layers:
            raise DirectionError(
                f"layers differ: {ranges(self.layers)} against {ranges(other.layers)}; bring both to the same ones "
                "with .only(layers)."
            )
        return other.vectors

    def _combine(self, other: Direction, sign: str, vectors: Tensor) -> Direction:
        return Direction(
            vectors=vectors,
            layers=self.layers,
            kind=self.kind if self.kind == other.kind else "combination",
            model=self.model if self.model != "unknown" else other.model,
            model_revision=self.model_revision if self.model_revision == other.model_revision else "unknown",
            token_scope=self.token_scope,
            operation=self.operation,
            sources=(f"({self.describe()}) {sign} ({other.describe()})",),
            weights=self.weights if self.weights == other.weights else UNKNOWN,
        )

    def _check_same_space(self, other: Direction) -> None:
        if self.d_model != other.d_model:
            raise DirectionError(
                f"widths differ: {self.d_model} against {other.d_model}; they come from different models."
            )
        same = same_weights(self.weights, other.weights)
        if same is None:
            same = "unknown" in (self.model, other.model) or self.model == other.model
        if not same:
            raise DirectionError(
                f"models differ: {self.model!r} against {other.model!r}; their residual streams share no axes. If one "
                "is a finetune of the other, say so: direction.for_model(name)."
            )

    def describe(self) -> str:
        """One line: kind, layers, width, where it came from."""
        source = f" from {'; '.join(self.sources)}" if self.sources else ""
        return f"{self.kind} at {ranges(self.layers)}, d_model {self.d_model}{source}"

    __repr__ = describe

    def _repr_html_(self) -> str:
        counts = [f"{n} {side}" for n, side in ((self.n_positive, "misaligned"), (self.n_negative, "aligned")) if n]
        tokens = self.token_scope + (", end of turn included" if self.token_scope == "response" else "")
        facts = {
            "model": self.model,
            "tokens": tokens,
            "conversations": " and ".join(counts),
            "from": self.sources,
            "norm": f"{next(iter(self.norms().values())):.4g}" if len(self.layers) == 1 else "",
        }
        what = f"Direction: {self.kind} at {ranges(self.layers)}, d_model {self.d_model}"
        return card(what, facts, bars(self.norms(), "norm"))

    # -- files

    def metadata(self) -> dict[str, Any]:
        """What the file says about itself, as a JSON object."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "model": self.model,
            "model_revision": self.model_revision,
            "hook_point": HOOK_POINT,
            "layer_convention": LAYER_CONVENTION,
            "token_scope": self.token_scope,
            "operation": self.operation,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "norms": {str(layer): norm for layer, norm in self.norms().items()},
            "sources": list(self.sources),
            "weights": self.weights,
            "created_by": {name: version(name) for name in ("em_interp", "torch", "safetensors")},
        }

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with one tensor `layer.{l}` a layer. Atomic. Raises `OutputError`."""
        write_direction(Path(path), dict(zip(self.layers, self.vectors, strict=True)), self.metadata())
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: str | None = None,
        n_layers: int | None = None,
        d_model: int | None = None,
        weights: str = UNKNOWN,
    ) -> Direction:
        """Read and check a direction file; with the other arguments, also against the model in hand.

        weights: its `weights_hash`; where that can be compared, the model's name is not.

        Raises `UnreadableFileError`, `MissingDataError`, `BadValueError` or `ShapeError`, each naming the
        file and the remedy.
        """
        path = Path(path)
        metadata, rows = read_direction(path)
        try:
            direction = cls(
                vectors=torch.stack([row.float() for _, row in rows]),
                layers=tuple(layer for layer, _ in rows),
                kind=metadata["kind"],
                model=metadata["model"],
                model_revision=metadata["model_revision"],
                token_scope=metadata["token_scope"],
                operation=metadata["operation"],
                n_positive=metadata["n_positive"],
                n_negative=metadata["n_negative"],
                sources=tuple(metadata["sources"]),
                weights=str(metadata.get("weights", UNKNOWN)),
            )
        except DirectionError as error:
            raise BadValueError(path, str(error), "extract the direction again") from error
        check_norms(path, direction.norms(), metadata["norms"])
        _check_model(path, direction, model, n_layers, d_model, weights)
        return direction


def _check_model(
    path: Path, direction: Direction, model: str | None, n_layers: int | None, d_model: int | None, weights: str
) -> None:
    if d_model is not None and direction.d_model != d_model:
        raise ShapeError(
            path,
            f"it has width {direction.d_model} and the model has {d_model}",
            f"use the model it was made on ({direction.model})",
        )
    if n_layers is not None and direction.layers[-1] >= n_layers:
        raise ShapeError(
            path,
            f"it has layer {direction.layers[-1]} and the model only layers 0-{n_layers - 1}",
            f"use the model it was made on ({direction.model})",
        )
    same = same_weights(direction.weights, weights)
    if same is None:
        same = model is None or "unknown" in (model, direction.model) or model == direction.model
    if not same:
        raise ShapeError(
            path,
            f"it was made on {direction.model!r} (weights {direction.weights}) and the model in hand is {model!r} "
            f"(weights {weights})",
            "use that model, or load without model= and weights= if you know that the two share their axes",
        )


def random_directions(like: Direction, count: int, generator: torch.Generator) -> list[Direction]:
    """Norm-matched random controls: a unit Gaussian direction times the norm of `like`, layer by layer.

    (The reference code's controls are a factor sqrt(d_model) too long.)
    """
    scale = like.vectors.double().norm(dim=1, keepdim=True)
    controls = []
    for index in range(count):
        noise = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64)
        controls.append(
            replace(
                like,
                vectors=(noise / noise.norm(dim=1, keepdim=True) * scale).float(),
                kind="random",
                n_positive=None,
                n_negative=None,
                sources=(f"random control {index} for ({like.describe()})",),
            )
        )
    return controls
