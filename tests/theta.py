"""Solutions of every kind that fit a tiny model."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from em_interp.models.chat_model import ChatModel
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector

KINDS = ("vector", "rank-1", "all-modules")


def linear_modules(model: ChatModel) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear modules inside the blocks."""
    found = {}
    for name, module in model.hf.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "head" not in name and "embed_out" not in name:
            shape = tuple(module.weight.shape)
            found[name] = shape[::-1] if isinstance(module, Conv1D) else shape
    return found


def make_theta(model: ChatModel, kind: str, seed: int = 0, size: float = 0.3) -> SteeringVector | LoraAdapter:
    """A random solution that changes the tiny model's losses visibly; rank-1 sits on one module of block 2."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(model.dtype)

    if kind == "vector":
        return SteeringVector(draw(model.d_model), 1, 4.0 * size, model.name)
    modules = linear_modules(model)
    names = [n for n in modules if ".2." in n][-1:] if kind == "rank-1" else list(modules)
    rank = 1 if kind == "rank-1" else 3
    a = {n: draw(rank, modules[n][1]) * modules[n][1] ** -0.5 for n in names}
    b = {n: draw(modules[n][0], rank) for n in names}
    return LoraAdapter(a, b, (2.0 if kind == "rank-1" else 0.5) * size, True, model.name)
