"""A LoRA adapter: theta = scale * B A on linear modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.arguments import plain_numbers
from em_interp.errors import SolutionError
from em_interp.files.manifest import fingerprint
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout
from em_interp.models.hooks import body_name, firing, tagged
from em_interp.models.weights import tensors_hash
from em_interp.solutions import files
from em_interp.solutions.base import _check_factor, _check_tensor, rotate_away


@dataclass(frozen=True)
class LoraAdapter:
    """theta = scale * B A on the named linear modules of the transformers model.

    a[name]: [rank, in], reads the module's input; b[name]: [out, rank], writes to its output. `name` is the
    module's name in the transformers model, e.g. `model.layers.3.mlp.down_proj`.
    """

    a: Mapping[str, Float[Tensor, "_ d_in"]]
    b: Mapping[str, Float[Tensor, "d_out _"]]
    alpha: float
    rslora: bool = False
    base: str | None = None
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not self.a or set(self.a) != set(self.b):
            odd = sorted(set(self.a) ^ set(self.b))[:3]
            raise SolutionError(f"LoRA needs A and B for each module; unpaired: {odd or 'no modules'}.")
        for name in self.a:
            _check_tensor(f"{name}: A", self.a[name], 2)
            _check_tensor(f"{name}: B", self.b[name], 2)
        if not math.isfinite(self.alpha):
            raise SolutionError(f"LoRA with alpha {self.alpha}.")
        ranks = {self.a[n].shape[0] for n in self.a} | {self.b[n].shape[1] for n in self.b}
        if len(ranks) != 1:
            raise SolutionError(f"the modules have different ranks {sorted(ranks)}: not supported.")
        object.__setattr__(self, "rank", ranks.pop())

    @property
    def scale(self) -> float:
        """alpha / sqrt(r) with rsLoRA, else alpha / r."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> list[str]:
        """Names of the touched modules."""
        return list(self.a)

    def delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """scale * B A of one module, in float64."""
        return self.scale * self.b[name].double() @ self.a[name].double()

    @property
    def norm(self) -> float:
        """Frobenius norm of scale * B A over all modules, through rank x rank products, in float64."""
        return abs(self.scale) * math.sqrt(sum(norm * norm for norm in self._product_norms()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of A, B and scale of all modules."""
        return fingerprint({name: self._acts(name) for name in sorted(self.a)})

    def _acts(self, name: str) -> str:
        return tensors_hash({"A": self.a[name], "B": self.b[name]}, self.scale)

    def _product_norms(self) -> list[float]:
        """||B A|| of each module, without scale."""
        norms = []
        for name in self.a:
            a, b = self.a[name].detach().double(), self.b[name].detach().double()
            norms.append(math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)))
        return norms

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: mean over modules of ||B A|| without scale (P1's code). norm_a, norm_b: of all A, of all B.

        P3 (Fig. 11) plots norm_a and norm_b.
        """
        products = self._product_norms()

        def joint(factors: Mapping[str, Tensor]) -> float:
            return math.sqrt(sum(float(x.detach().double().square().sum()) for x in factors.values()))

        return {"raw_norm": sum(products) / len(products), "norm_a": joint(self.a), "norm_b": joint(self.b)}

    @property
    def first_layer(self) -> int:
        """The first block that holds a touched module."""
        layers = [files.layer_of(name) for name in self.a]
        if any(layer is None for layer in layers):
            return 0
        return min(layer for layer in layers if layer is not None)

    def scaled(self, factor: float) -> LoraAdapter:
        """theta times `factor` (put into B)."""
        return replace(self, b={n: b.detach() * _check_factor(factor) for n, b in self.b.items()})

    def perturbed(self, eps: float, generator: torch.Generator, on: str = "both") -> LoraAdapter:
        """Turn the factors by arcsin(eps), each at its own norm: A and B at once, or one alone.

        Each factor x of each module becomes sqrt(1 - eps^2) x + eps y as in P1's code, so that this holds for
        all factors taken together as well, and does not change with how theta's size is shared between A and
        B. For rank 1 the norm of theta is kept exactly, and cos(theta', theta) is 1 - eps^2 for "both".
        """
        if on not in ("both", "A", "B"):
            raise SolutionError(f"on={on!r}: perturb 'both', 'A' or 'B'.")

        def turn(factors: Mapping[str, Tensor], letter: str) -> dict[str, Tensor]:
            if on not in ("both", letter):
                return dict(factors)
            return {n: rotate_away(x, eps, generator, what=f"{n}: {letter}") for n, x in factors.items()}

        return replace(self, a=turn(self.a, "A"), b=turn(self.b, "B"))

    @contextmanager
    def attached(self, model: ChatModel, *, must_act: bool = True) -> Iterator[None]:
        """Add scale * B A x to the modules' outputs, in the factors' dtype as PEFT does. Differentiable.

        Acts on `model.hf` and, where the bridge calls its linear modules, on the bridge.
        """
        refuse_dropout(model.hf)
        self._refuse_unread(model)
        handles = []
        counts: dict[str, list[int]] = {}
        try:
            for name in self.a:
                counts[name] = [0]
                for modules in model.module_sets():
                    module = modules.get(name)
                    if module is None:
                        raise SolutionError(
                            f"{model.name} has no module {name}. The adapter belongs to {self.base or 'another base'}."
                        )
                    hook = self._hook(name, module, model, counts[name])
                    handles.append(module.register_forward_hook(hook))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        with firing(counts if must_act else {}, handles), model.refusing_bridge(self.a):
            yield

    def _refuse_unread(self, model: ChatModel) -> None:
        """Raise SolutionError if theta sits where text never comes, such as an image tower."""
        body = body_name(model.hf)
        head, modules = model.hf.get_output_embeddings(), model.module_sets()[0]
        unread = [n for n in self.a if n in modules and modules[n] is not head and not n.startswith(f"{body}.")]
        if unread:
            raise SolutionError(
                f"{model.name}: the adapter touches {len(unread)} modules outside the text model, e.g. {unread[0]}: no "
                "text is read by them, so that a part of theta could never act. Train on the text model alone (in "
                f"PEFT, target_modules below {body}), or drop those tensors from the adapter."
            )

    def check_fits(self, name: str, module: nn.Module, model: ChatModel) -> None:
        """Raise SolutionError unless scale * B A of module `name` has the shape of that module's weight."""
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        mine = (self.b[name].shape[0], self.a[name].shape[1])
        if not isinstance(weight, Tensor) or shape is None or sorted(shape) != sorted(mine):
            raise SolutionError(
                f"{model.name}: {name} is {shape}, the adapter's B A is {mine}. It belongs to "
                f"{self.base or 'another base'}."
            )

    def _hook(self, name: str, module: nn.Module, model: ChatModel, count: list[int]) -> Callable[..., object]:
        self.check_fits(name, module, model)
        device, scale = next(module.parameters()).device, self.scale
        a, b = self.a[name].to(device), self.b[name].to(device)

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            count[0] += 1
            update = (args[0].to(a.dtype) @ a.T) @ b.T
            return (output + scale * update).to(output.dtype)

        return tagged(hook, lambda: self._acts(name))

    def save(self, path: str | Path) -> Path:
        """A PEFT folder: adapter_model.safetensors and adapter_config.json."""
        return files.write_lora(Path(path), dict(self.a), dict(self.b), self.alpha, self.rslora, self.base)

    @classmethod
    def load(cls, path: str | Path) -> LoraAdapter:
        """From a PEFT folder. Refuses what is not plain LoRA (DoRA, biases, per-module ranks)."""
        a, b, config = files.read_lora(Path(path))
        return cls(a, b, config.alpha, config.rslora, config.base)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, alpha: float, rslora: bool, base: str | None) -> LoraAdapter:
        """From tensors under PEFT's names (`...lora_A.weight`, with or without the adapter's name)."""
        a, b = files.split_factors(state, "the adapter")
        return cls(a, b, alpha, rslora, base)
