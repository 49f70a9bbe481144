"""What a trained solution does to a model while it acts: adds a vector after a block, or B A x beside linear modules.

Plain mechanics: whose numbers these are, `solutions/` knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.arguments import plain_numbers
from em_interp.errors import SolutionError
from em_interp.files.adapter_folders import read_vector
from em_interp.models.architectures import body_name
from em_interp.models.checks import refuse_dropout
from em_interp.models.hooks import add_to_hidden, block_hooks, check_layer, firing, tagged
from em_interp.models.precision import exact
from em_interp.models.weights import tensors_hash


@runtime_checkable
class Host(Protocol):
    """What a solution is attached to: a `ChatModel`, whose fields `hf`, `name`, `n_layers` and `d_model` these are."""

    hf: Any
    name: str
    n_layers: int
    d_model: int

    def block_sets(self) -> list[list[nn.Module]]:
        """The blocks to hook."""
        ...

    def module_sets(self) -> list[dict[str, nn.Module]]:
        """Modules by name."""
        ...

    def refusing_bridge(self, modules: Iterable[str] | None) -> AbstractContextManager[None]:
        """Inside, a bridge that would leave these modules' outputs out refuses passes; None: any bridge does."""
        ...


def check_tensor(name: str, x: Tensor, ndim: int) -> None:
    """Raise SolutionError unless a trained tensor has `ndim` dimensions, entries, and finite ones only."""
    if x.ndim != ndim or x.numel() == 0:
        raise SolutionError(f"{name} has shape {tuple(x.shape)}; expected {ndim} non-empty dimensions.")
    if not torch.isfinite(x.detach()).all():
        raise SolutionError(f"{name} holds NaN or infinite values. The run that made it diverged.")


@dataclass(frozen=True, repr=False)
class AddedVector:
    """theta = alpha * vector [d_model], added to the output of block `layer` at every token.

    base: the name of the model that it was trained on, where that is known.
    """

    vector: Float[Tensor, "d_model"]
    layer: int
    alpha: float
    base: str | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_tensor("the steering vector", self.vector, 1)
        if isinstance(self.layer, bool) or self.layer < 0 or not math.isfinite(self.alpha) or self.alpha == 0:
            raise SolutionError(f"a steering vector with layer {self.layer} and alpha {self.alpha}.")

    @property
    def theta(self) -> Float[Tensor, "d_model"]:
        """The vector that is added to the residual stream."""
        return self.alpha * self.vector

    @property
    def norm(self) -> float:
        """||alpha * vector||, in units of the residual stream."""
        return float(abs(self.alpha) * exact(self.vector.detach()).norm())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vector, alpha and layer."""
        return tensors_hash({"vector": self.vector}, self.alpha, self.layer)

    @contextmanager
    def attached(self, model: Host, *, must_act: bool = True) -> Iterator[None]:
        """Add theta to the residual stream of `model` (and of its bridge). Differentiable in `vector`."""
        if self.vector.shape[0] != model.d_model:
            raise SolutionError(
                f"a steering vector of width {self.vector.shape[0]} (trained on {self.base}) for {model.name} with "
                f"d_model {model.d_model}. Load the model that it was trained on."
            )
        check_layer(self.layer, model.n_layers)
        refuse_dropout(model.hf)
        functions = {self.layer: lambda hidden: add_to_hidden(hidden, self.theta)}
        acts = {self.layer: lambda: self.fingerprint}
        with block_hooks(model.block_sets(), functions, must_fire=must_act, acts=acts):
            yield

    @classmethod
    def load(cls, path: str | Path) -> AddedVector:
        """From a folder, ours or published (steering_vector.pt). SolutionError says what is wrong."""
        vector, layer, alpha, base = read_vector(Path(path))
        return cls(vector.float(), layer, alpha, base)


@dataclass(frozen=True)
class LowRank:
    """scale * B A of one linear module. a: [rank, in], b: [out, rank]."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), that of a Linear's weight."""
        return self.b.shape[0], self.a.shape[1]

    def acts(self) -> str:
        """SHA-256 of what is added."""
        return tensors_hash({"A": self.a, "B": self.b}, self.scale)

    def hook(self, module: nn.Module) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
        """(arguments, output) of `module` -> output with scale * B A x, in the factors' dtype as PEFT does."""
        device = next(module.parameters()).device
        return partial(_plus_low_rank, self.a.to(device), self.b.to(device), self.scale)


def _plus_low_rank(a: Tensor, b: Tensor, scale: float, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    update = (args[0].to(a.dtype) @ a.T) @ b.T
    return (output + scale * update).to(output.dtype)


@runtime_checkable
class ModuleUpdate(Protocol):
    """What is added to one linear module's output."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        ...

    def acts(self) -> str:
        """SHA-256 of what is added."""
        ...

    def hook(self, module: nn.Module) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
        """(arguments, output) of `module` -> its new output."""
        ...


@contextmanager
def updating(
    model: Host, updates: Mapping[str, ModuleUpdate], *, base: str | None, must_act: bool = True
) -> Iterator[None]:
    """Change the outputs of linear modules of `model.hf` and, where the bridge calls them, of the bridge.

    base: the model that the updates were trained on, for messages. Raises SolutionError for modules that are not there,
    have another shape, or that no text comes to.
    """
    refuse_dropout(model.hf)
    _refuse_unread(model, updates)
    handles = []
    counts: dict[str, list[int]] = {}
    try:
        for name, update in updates.items():
            counts[name] = [0]
            for modules in model.module_sets():
                module = modules.get(name)
                if module is None:
                    raise SolutionError(
                        f"{model.name} has no module {name}. The adapter belongs to {base or 'another base'}."
                    )
                check_shape(model.name, name, module, update, base)
                handles.append(module.register_forward_hook(_counted(update, module, counts[name])))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    with firing(counts if must_act else {}, handles), model.refusing_bridge(updates):
        yield


def _counted(update: ModuleUpdate, module: nn.Module, count: list[int]) -> Callable[..., object]:
    return tagged(partial(_count_and_change, update.hook(module), count), update.acts)


def _count_and_change(
    changed: Callable[[tuple[Tensor, ...], Tensor], Tensor],
    count: list[int],
    _module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    count[0] += 1
    return changed(args, output)


def check_shape(model_name: str, name: str, module: nn.Module, update: ModuleUpdate, base: str | None) -> None:
    """Raise SolutionError unless the update of module `name` has the shape of that module's weight."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if shape is None or sorted(shape) != sorted(update.shape):
        raise SolutionError(
            f"{model_name}: {name} is {shape}, the adapter's B A is {update.shape}. It belongs to "
            f"{base or 'another base'}."
        )


def _refuse_unread(model: Host, names: Iterable[str]) -> None:
    """Raise SolutionError if theta sits where text never comes, such as an image tower."""
    body = body_name(model.hf)
    head, modules = model.hf.get_output_embeddings(), model.module_sets()[0]
    unread = [n for n in names if n in modules and modules[n] is not head and not n.startswith(f"{body}.")]
    if unread:
        raise SolutionError(
            f"{model.name}: the adapter touches {len(unread)} modules outside the text model, e.g. {unread[0]}: no "
            "text is read by them, so that a part of theta could never act. Train on the text model alone (in "
            f"PEFT, target_modules below {body}), or drop those tensors from the adapter."
        )


@contextmanager
def frozen(hf: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `hf` asks for a gradient unless told to; afterwards each does as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
