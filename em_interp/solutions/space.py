"""The space of effective parameters: inner products, random directions of it, and what may be compared in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from em_interp.errors import SolutionError, UsageError
from em_interp.files.adapters import same_base
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import has_our_hooks
from em_interp.solutions import files
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector

Theta = SteeringVector | LoraAdapter


def space_of(solution: Theta) -> dict[str, tuple[int, ...]]:
    """Where theta acts and with which shape: {"layer 3": (d_model,)}, or {module: (d_out, d_in)}. Rank is no part."""
    if isinstance(solution, SteeringVector):
        return {f"layer {solution.layer}": tuple(solution.vector.shape)}
    return {name: (solution.b[name].shape[0], solution.a[name].shape[1]) for name in sorted(solution.a)}


def dimension(solution: Theta) -> int:
    """Number of coordinates of the space that theta lies in (d_model, or the sum of d_out x d_in)."""
    return sum(math.prod(shape) for shape in space_of(solution).values())


def fixed_layer(solution: Theta) -> int | None:
    """The last block whose output theta does not change, before theta is added; None where there is no such block."""
    if isinstance(solution, SteeringVector):
        return solution.layer
    return solution.first_layer - 1 if solution.first_layer else None


def check_comparable(
    solutions: Mapping[str, Theta], model: ChatModel | None = None, *, may_be_zero: bool = False
) -> None:
    """Refuse solutions of different models, of different places in one model, zero ones, and none at all.

    A solution that does not record its base is taken to belong. Raises SolutionError that names both sides.
    """
    if not solutions:
        raise SolutionError("no solutions were given. Pass at least one steering vector or LoRA adapter.")
    known, whose = (model.name if model is not None else None), "the model in hand"
    first = next(iter(solutions))
    for name, solution in solutions.items():
        if solution.base and known is None:
            known, whose = solution.base, f"the base of {name}"
        names = model.names if model is not None else (known or "",)
        if solution.base and not same_base(solution.base, *names):
            raise SolutionError(
                f"{name} was trained on {solution.base}, but {whose} is {known}. "
                "Compare solutions of one model, on that model."
            )
        if not (may_be_zero or solution.norm > 0):
            raise SolutionError(
                f"{name} has theta = 0, which has no direction. Take a checkpoint after training began."
            )
        here, there = space_of(solution), space_of(solutions[first])
        if here != there:
            odd = sorted(set(here.items()) ^ set(there.items()))[0]
            raise SolutionError(
                f"{name} and {first} do not live in one space: {odd[0]} {odd[1]} is in only one of them. "
                "Compare solutions of the same kind, layer and modules."
            )


def check_bare(model: ChatModel) -> None:
    """Refuse a model that something is attached to: its answers would not be the chat model's."""
    if has_our_hooks(model.hf):
        raise UsageError(
            f"a solution or an intervention is attached to {model.name}, so it is not the chat model now. Call this "
            "outside that context."
        )


def inner(x: Theta, y: Theta) -> float:
    """<theta_x, theta_y> over all coordinates, in float64. LoRA goes through rank x rank products."""
    if isinstance(x, SteeringVector) and isinstance(y, SteeringVector):
        return float(x.theta.detach().double() @ y.theta.detach().double())
    if isinstance(x, LoraAdapter) and isinstance(y, LoraAdapter):
        total = 0.0
        for name in x.a:
            left = x.b[name].detach().double().T @ y.b[name].detach().double()
            right = x.a[name].detach().double() @ y.a[name].detach().double().T
            total += float((left * right).sum())
        return x.scale * y.scale * total
    raise SolutionError("a steering vector and a LoRA adapter have no inner product. Compare solutions of one kind.")


def random_like(solution: Theta, generator: torch.Generator) -> Theta:
    """A random direction of the same space, as long as `solution`.

    Steering vector: uniform on the sphere of that norm. LoRA: Gaussian factors of the same rank, each module's B A as
    long as that module's in `solution`, so that the parameters' size stays where training put it.
    """

    def gaussian(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=torch.float64, generator=generator)

    if isinstance(solution, SteeringVector):
        y = gaussian(solution.vector)
        length = solution.vector.detach().double().norm().cpu()
        return replace(solution, vector=(y * (length / y.norm())).to(solution.vector))
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for name in solution.a:
        drawn = LoraAdapter({name: gaussian(solution.a[name])}, {name: gaussian(solution.b[name])}, alpha=1.0)
        trained = LoraAdapter({name: solution.a[name]}, {name: solution.b[name]}, alpha=1.0)
        a[name] = drawn.a[name].to(solution.a[name])
        b[name] = (drawn.b[name] * (trained.norm / drawn.norm)).to(solution.b[name])
    return replace(solution, a=a, b=b)


def check_inside_blocks(solution: Theta) -> None:
    """Refuse LoRA on modules that lie in no block, such as the output head."""
    outside = [n for n in getattr(solution, "a", ()) if files.layer_of(n) is None]
    if outside:
        raise SolutionError(
            f"the adapter touches {outside[0]}, which lies in no block: what comes after the blocks must be the chat "
            "model's own here. Use an adapter of the blocks alone."
        )
