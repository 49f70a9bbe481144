"""theta: a trained steering vector or LoRA adapter, as one thing that can be scaled, perturbed and attached.

theta is the *effective* parameter: alpha * v for a steering vector, scale * B A for LoRA, where scale is
alpha / r, or alpha / sqrt(r) with rsLoRA. Norms are of theta (Frobenius over all modules).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.errors import SolutionError
from em_interp.models.chat_model import ChatModel


@runtime_checkable
class Solution(Protocol):
    """What efficiency, stability and influence need of a trained solution."""

    @property
    def base(self) -> str | None:
        """The model that it was trained on, where that is known."""
        ...

    @property
    def norm(self) -> float:
        """Frobenius norm of the effective theta."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of theta and of where it acts: what tells two finetunes apart."""
        ...

    @property
    def first_layer(self) -> int:
        """The first block whose computation theta changes; everything before it can be computed once."""
        ...

    def paper_norms(self) -> dict[str, float]:
        """Norms under the papers' other conventions, by the name of their table column."""
        ...

    def scaled(self, factor: float) -> Solution:
        """The solution whose effective theta is `factor` times this one's."""
        ...

    def perturbed(self, eps: float, generator: torch.Generator) -> Solution:
        """sqrt(1 - eps^2) x + eps y, with y orthogonal to x and as long."""
        ...

    def attached(self, model: ChatModel, *, must_act: bool = True) -> AbstractContextManager[None]:
        """Inside, `model` answers with theta; every pass, any batch, with or without KV cache.

        must_act: unless false, it is an error that no pass was run inside.
        """
        ...

    def save(self, path: str | Path) -> Path:
        """Write the folder that real ones have; returns it."""
        ...


def refuse_other_models(model: ChatModel, solutions: Iterable[Solution]) -> None:
    """Raise SolutionError unless every solution that names its base was trained on `model`.

    Bases are compared as `ChatModel.add_adapter` does.
    """
    for solution in solutions:
        if solution.base is not None and not model.is_known_as(solution.base):
            raise SolutionError(
                f"a solution trained on {solution.base} cannot be compared on {model.name}. Load {solution.base}, or, "
                f"if it is the same model under another name, dataclasses.replace(solution, base={model.name!r})."
            )


def rotate_away(
    x: Float[Tensor, "..."], eps: float, generator: torch.Generator, *, what: str = "theta"
) -> Float[Tensor, "..."]:
    """x' = sqrt(1 - eps^2) x + eps y, y uniform among tensors orthogonal to x with x's norm (P1, Fig. 4b).

    ||x'|| = ||x|| and cos(x', x) = sqrt(1 - eps^2), computed in float64, returned in x's dtype. eps = 0
    returns x. Raises SolutionError for eps outside [0, 1] and for a zero or one-element x.
    """
    if not 0.0 <= eps <= 1.0:
        raise SolutionError(f"eps is {eps}; it is a sine and must be in [0, 1].")
    flat = x.detach().double().flatten().cpu()
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


def _check_tensor(name: str, x: Tensor, ndim: int) -> None:
    if x.ndim != ndim or x.numel() == 0:
        raise SolutionError(f"{name} has shape {tuple(x.shape)}; expected {ndim} non-empty dimensions.")
    if not torch.isfinite(x.detach()).all():
        raise SolutionError(f"{name} holds NaN or infinite values. The run that made it diverged.")


def _check_factor(factor: float) -> float:
    if not math.isfinite(factor):
        raise SolutionError(f"cannot scale by {factor}.")
    return float(factor)
