"""A trained steering vector: theta = alpha * vector, added to the output of one block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from em_interp.errors import SolutionError
from em_interp.files import adapter_folders
from em_interp.files.adapters import VectorConfig, describe, read_config
from em_interp.models.attaching import AddedVector
from em_interp.models.chat_model import ChatModel
from em_interp.models.precision import exact
from em_interp.solutions.base import STACKED_ENTRIES, Base, Solution, Trained, check_factor


@dataclass(frozen=True, repr=False)
class SteeringVector(AddedVector, Solution):
    """theta = alpha * vector [d_model], added to the output of block `layer` at every token."""

    ADAPTERS = ("steering-vector",)

    def describe(self) -> str:
        """Its layer."""
        return f"a steering vector at layer {self.layer}"

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: ||vector|| without alpha, as the reference code's norm sweeps have it."""
        return {"raw_norm": float(exact(self.vector.detach()).norm())}

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """{"layer 3": (d_model,)}."""
        return {self.place: tuple(self.vector.shape)}

    @property
    def place(self) -> str:
        """The name of its one place."""
        return f"layer {self.layer}"

    def norms_by_layer(self) -> dict[int, float]:
        """That of its one layer."""
        return {self.layer: self.norm}

    def delta(self, place: str) -> Float[Tensor, "d_model"]:
        """theta."""
        return exact(self.theta.detach())

    @property
    def first_layer(self) -> int:
        """The block after whose output theta is added (that block itself is unchanged)."""
        return self.layer

    @property
    def fixed_layer(self) -> int:
        """The same block."""
        return self.layer

    def inner(self, other: Solution) -> float:
        """alpha_x alpha_y <x, y>."""
        if isinstance(other, SteeringVector) and self.space == other.space:
            return float(exact(self.theta.detach()) @ exact(other.theta.detach()))
        return super().inner(other)

    def scaled(self, factor: float) -> SteeringVector:
        """theta times `factor`."""
        return replace(self, vector=self.vector.detach() * check_factor(factor))

    def tensors(self, on: str = "both") -> Mapping[str, Tensor]:
        """The vector."""
        if on != "both":
            raise SolutionError(f"on={on!r}: a steering vector has no factors. Leave it at 'both'.")
        return {"the steering vector": self.vector}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SteeringVector:
        """With another vector, of the same alpha."""
        return replace(self, vector=tensors["the steering vector"])

    def trained(self) -> Trained:
        """The raw vector."""
        return Trained(
            "steering-vector", self.vector.flatten().float(), self.layer, direction=self.theta.flatten().float()
        )

    @property
    def unit(self) -> float:
        """|alpha|."""
        return abs(self.alpha)

    def random_like(self, generator: torch.Generator) -> SteeringVector:
        """Uniform on the sphere of its norm."""
        y = torch.randn(self.vector.shape, dtype=torch.float64, generator=generator)
        length = exact(self.vector.detach()).norm().cpu()
        return replace(self, vector=(y * (length / y.norm())).to(self.vector))

    def started_from(self, start: Solution) -> SteeringVector | None:
        """The vector of this alpha whose theta is `start`'s; None for another kind or layer."""
        if not isinstance(start, SteeringVector) or start.layer != self.layer:
            return None
        return replace(self, vector=start.theta.detach().float() / self.alpha)

    @contextmanager
    def tracked(self, model: ChatModel) -> Iterator[dict[str, Tensor]]:
        """theta itself."""
        theta = self.theta.detach().to(model.device).requires_grad_()
        with replace(self, vector=theta, alpha=1.0).attached(model):
            yield {self.place: theta}

    @property
    def alike(self) -> Hashable:
        """Layer, width and dtype."""
        return SteeringVector, self.layer, self.vector.shape, self.vector.dtype

    @property
    def at_once(self) -> int:
        """As many as are 1 GB."""
        return max(1, STACKED_ENTRIES // self.vector.numel())

    def stack(self, model: ChatModel, members: Sequence[Solution]) -> _Stack:
        """One theta for each copy of the shared residual."""
        return _Stack(model, [member for member in members if isinstance(member, SteeringVector)])

    def save(self, path: str | Path) -> Path:
        """steering_vector.safetensors and adapter_config.json, with the published keys."""
        config = {
            "adapter_type": "steering_vector",
            "layer_idx": self.layer,
            "alpha": self.alpha,
            "hidden_size": self.vector.shape[0],
            "base_model_name_or_path": self.base,
        }
        return adapter_folders.write_vector(Path(path), self.vector.detach().float().cpu(), config)

    @classmethod
    def glance(cls, folder: Path) -> str:
        """What a folder says."""
        return cls.load(folder).describe()

    @classmethod
    def read(cls, source: Path, base: Base) -> SteeringVector:
        """As `load`: its file says all."""
        return cls.load(source)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """From such a folder, ours or published (steering_vector.pt). SolutionError says what is wrong."""
        vector, layer, alpha, base = adapter_folders.read_vector(Path(path))
        return cls(vector.float(), layer, alpha, base)

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether a folder's adapter_config.json is a steering vector's. Raises AdapterError."""
        return isinstance(describe(folder, read_config(folder)), VectorConfig)


class _Stack:
    """Steering vectors at one layer: one theta is added to each copy of the shared residual."""

    def __init__(self, model: ChatModel, members: Sequence[SteeringVector]) -> None:
        self.theta = torch.stack([member.theta.detach() for member in members]).to(model.device)

    def enter(self, residual: Float[Tensor, "row token d_model"]) -> Float[Tensor, "theta_row token d_model"]:
        moved = residual + rearrange(self.theta.to(residual.dtype), "theta d -> theta 1 1 d")
        return rearrange(moved, "theta row token d -> (theta row) token d")

    def on(self, n_tokens: int, n_scored: int) -> AbstractContextManager[None]:
        return nullcontext()
