"""A trained steering vector: theta = alpha * vector, added to the output of one block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.arguments import plain_numbers
from em_interp.errors import SolutionError
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout
from em_interp.models.hooks import add_to_hidden, block_hooks, check_layer
from em_interp.models.weights import tensors_hash
from em_interp.solutions import files
from em_interp.solutions.base import _check_factor, _check_tensor, rotate_away


@dataclass(frozen=True)
class SteeringVector:
    """theta = alpha * vector [d_model], added to the output of block `layer` at every token."""

    vector: Float[Tensor, "d_model"]
    layer: int
    alpha: float
    base: str | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_tensor("the steering vector", self.vector, 1)
        if isinstance(self.layer, bool) or self.layer < 0 or not math.isfinite(self.alpha) or self.alpha == 0:
            raise SolutionError(f"a steering vector with layer {self.layer} and alpha {self.alpha}.")

    @property
    def theta(self) -> Float[Tensor, "d_model"]:
        """The vector that is added to the residual stream."""
        return self.alpha * self.vector

    @property
    def norm(self) -> float:
        """||alpha * vector||, in units of the residual stream."""
        return float(abs(self.alpha) * self.vector.detach().double().norm())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vector, alpha and layer."""
        return tensors_hash({"vector": self.vector}, self.alpha, self.layer)

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: ||vector|| without alpha, as the reference code's norm sweeps have it."""
        return {"raw_norm": float(self.vector.detach().double().norm())}

    @property
    def first_layer(self) -> int:
        """The block after whose output theta is added (that block itself is unchanged)."""
        return self.layer

    def scaled(self, factor: float) -> SteeringVector:
        """theta times `factor`."""
        return replace(self, vector=self.vector.detach() * _check_factor(factor))

    def perturbed(self, eps: float, generator: torch.Generator) -> SteeringVector:
        """theta turned by arcsin(eps) into a random orthogonal direction, at equal norm."""
        return replace(self, vector=rotate_away(self.vector, eps, generator, what="the steering vector"))

    @contextmanager
    def attached(self, model: ChatModel, *, must_act: bool = True) -> Iterator[None]:
        """Add theta to the residual stream of `model` (and of its bridge). Differentiable in `vector`."""
        if self.vector.shape[0] != model.d_model:
            raise SolutionError(
                f"a steering vector of width {self.vector.shape[0]} (trained on {self.base}) for "
                f"{model.name} with "
                f"d_model {model.d_model}. Load the model that it was trained on."
            )
        check_layer(self.layer, model.n_layers)
        refuse_dropout(model.hf)
        functions = {self.layer: lambda hidden: add_to_hidden(hidden, self.theta)}
        acts = {self.layer: lambda: self.fingerprint}
        with block_hooks(model.block_sets(), functions, must_fire=must_act, acts=acts):
            yield

    def save(self, path: str | Path) -> Path:
        """steering_vector.safetensors and adapter_config.json, with the published keys."""
        config = {
            "adapter_type": "steering_vector",
            "layer_idx": self.layer,
            "alpha": self.alpha,
            "hidden_size": self.vector.shape[0],
            "base_model_name_or_path": self.base,
        }
        return files.write_vector(Path(path), self.vector.detach().float().cpu(), config)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """From such a folder, ours or published (steering_vector.pt). SolutionError says what is wrong."""
        vector, layer, alpha, base = files.read_vector(Path(path))
        return cls(vector.float(), layer, alpha, base)
