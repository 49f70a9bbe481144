"""A LoRA adapter: theta = scale * B A on linear modules."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.arguments import plain_numbers
from em_interp.errors import SolutionError
from em_interp.files import adapter_folders
from em_interp.files.adapters import LoraConfig, describe, read_config
from em_interp.files.manifest import fingerprint
from em_interp.models.architectures import last_mlp, layer_of, output_axis
from em_interp.models.attaching import LowRank, check_tensor, updating
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import firing, tagged
from em_interp.models.precision import exact
from em_interp.models.weights import replaced, weight_owners
from em_interp.solutions import files
from em_interp.solutions.base import (
    STACKED_ENTRIES,
    Base,
    NotShareable,
    Solution,
    Trained,
    check_factor,
)


@dataclass(frozen=True, repr=False)
class LoraAdapter(Solution):
    """theta = scale * B A on the named linear modules of the transformers model.

    a[name]: [rank, in], reads the module's input; b[name]: [out, rank], writes to its output. `name` is the
    module's name in the transformers model, e.g. `model.layers.3.mlp.down_proj`. rank: the largest of the modules'.
    alphas: of the modules whose alpha is not `alpha` (PEFT's alpha_pattern). rslora: scale is alpha / sqrt(rank), not
    alpha / rank.
    """

    ADAPTERS = ("rank-1", "all-modules")
    FACTORS = ("A", "B")

    a: Mapping[str, Float[Tensor, "_ d_in"]]
    b: Mapping[str, Float[Tensor, "d_out _"]]
    alpha: float
    rslora: bool = False
    base: str | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not self.a or set(self.a) != set(self.b):
            odd = sorted(set(self.a) ^ set(self.b))[:3]
            raise SolutionError(f"LoRA needs A and B for each module; unpaired: {odd or 'no modules'}.")
        for name in self.a:
            check_tensor(f"{name}: A", self.a[name], 2)
            check_tensor(f"{name}: B", self.b[name], 2)
            if self.a[name].shape[0] != self.b[name].shape[1]:
                ranks = self.a[name].shape[0], self.b[name].shape[1]
                raise SolutionError(f"{name}: A and B have different ranks, {ranks[0]} and {ranks[1]}.")
        if not all(math.isfinite(alpha) for alpha in (self.alpha, *self.alphas.values())):
            raise SolutionError(f"LoRA with alpha {self.alpha}{f' and {dict(self.alphas)}' if self.alphas else ''}.")
        object.__setattr__(self, "rank", max(x.shape[0] for x in self.a.values()))

    def scale_of(self, name: str) -> float:
        """alpha / sqrt(r) of a module with rsLoRA, else alpha / r. Raises SolutionError for one that is not touched."""
        if name not in self.a:
            raise SolutionError(f"the adapter touches no module {name!r}. It touches {', '.join(self.modules[:4])}.")
        rank = self.a[name].shape[0]
        return self.alphas.get(name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def scale(self) -> float:
        """That of all modules. Raises SolutionError where they have several."""
        scales = {self.scale_of(name) for name in self.a}
        if len(scales) > 1:
            raise SolutionError(f"the modules have different scales {sorted(scales)}: take scale_of(module).")
        return scales.pop()

    @property
    def modules(self) -> list[str]:
        """Names of the touched modules."""
        return list(self.a)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Rank 1, or all modules; of rank 1 on all modules, either."""
        return self.ADAPTERS if self.rank == 1 else ("all-modules",)

    def describe(self) -> str:
        """Rank and number of modules."""
        return f"a rank-{self.rank} LoRA on {len(self.a)} module{'' if len(self.a) == 1 else 's'}"

    def update(self, name: str) -> LowRank:
        """What it adds to one module."""
        return LowRank(self.a[name], self.b[name], self.scale_of(name))

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """{module: (d_out, d_in)}. Rank is no part."""
        return {name: (self.b[name].shape[0], self.a[name].shape[1]) for name in sorted(self.a)}

    def delta(self, place: str) -> Float[Tensor, "d_out d_in"]:
        """scale * B A of one module, in float64."""
        return self.scale_of(place) * exact(self.b[place].detach()) @ exact(self.a[place].detach())

    @property
    def norm(self) -> float:
        """Frobenius norm of scale * B A over all modules, through rank x rank products, in float64."""
        return math.sqrt(sum(norm**2 for norm in self.norms().values()))

    def norms(self) -> Mapping[str, float]:
        """||scale * B A|| of each module."""
        return {name: abs(self.scale_of(name)) * norm for name, norm in self._product_norms().items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of A, B and scale of all modules."""
        return fingerprint({name: self.update(name).acts() for name in sorted(self.a)})

    def _product_norms(self) -> dict[str, float]:
        """||B A|| of each module, without scale."""
        norms = {}
        for name in self.a:
            a, b = exact(self.a[name].detach()), exact(self.b[name].detach())
            norms[name] = math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
        return norms

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: mean over modules of ||B A|| without scale (P1's code). norm_a, norm_b: of all A, of all B.

        P3 (Fig. 11) plots norm_a and norm_b.
        """
        products = self._product_norms().values()
        return {"raw_norm": sum(products) / len(products), "norm_a": _joint(self.a), "norm_b": _joint(self.b)}

    def inner(self, other: Solution) -> float:
        """Through rank x rank products."""
        if not isinstance(other, LoraAdapter) or self.space != other.space:
            return super().inner(other)
        total = 0.0
        for name in self.a:
            left = exact(self.b[name].detach()).T @ exact(other.b[name].detach())
            right = exact(self.a[name].detach()) @ exact(other.a[name].detach()).T
            total += self.scale_of(name) * other.scale_of(name) * float((left * right).sum())
        return total

    def b_cosine(self, parts: Mapping[str, Tensor], end: Solution) -> float | None:
        """cos(-dL/dB at this A, B of `end`) over all modules; None where kind or ranks differ."""
        if not isinstance(end, LoraAdapter) or any(self.b[n].shape != end.b[n].shape for n in self.b):
            return None
        along, size, length = 0.0, 0.0, 0.0
        for name, part in parts.items():
            down = -(part @ exact(self.a[name].detach()).cpu().T)
            b = exact(end.b[name].detach()).cpu()
            along += float((down * b).sum())
            size, length = size + float(down.square().sum()), length + float(b.square().sum())
        return along / (size * length) ** 0.5 if size > 0 and length > 0 else None

    @property
    def first_layer(self) -> int:
        """The first block that holds a touched module."""
        layers = [layer_of(name) for name in self.a]
        if any(layer is None for layer in layers):
            return 0
        return min(layer for layer in layers if layer is not None)

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Modules such as the output head."""
        return tuple(name for name in self.a if layer_of(name) is None)

    def scaled(self, factor: float) -> LoraAdapter:
        """theta times `factor` (put into B)."""
        return replace(self, b={n: b.detach() * check_factor(factor) for n, b in self.b.items()})

    def tensors(self, on: str = "both") -> Mapping[str, Tensor]:
        """Every A, then every B; or one of them alone.

        P1's code turns each factor of each module at its own norm. That holds for all factors taken together as well,
        and does not change with how theta's size is shared between A and B. For rank 1 the norm of theta is kept
        exactly, and cos(theta', theta) is 1 - eps^2 for "both".
        """
        if on not in ("both", *self.FACTORS):
            raise SolutionError(f"on={on!r}: perturb 'both', 'A' or 'B'.")
        factors = {f"{n}: A": x for n, x in self.a.items()} | {f"{n}: B": x for n, x in self.b.items()}
        return {key: x for key, x in factors.items() if on in ("both", key[-1])}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LoraAdapter:
        """With other factors."""
        a = {n: tensors.get(f"{n}: A", x) for n, x in self.a.items()}
        b = {n: tensors.get(f"{n}: B", x) for n, x in self.b.items()}
        return replace(self, a=a, b=b)

    def trained(self) -> Trained:
        """B of one module; of several, all of theta."""
        if len(self.b) > 1:
            return super().trained()
        ((name, b),) = self.b.items()
        direction = b[:, 0].float() if self.rank == 1 else None
        return Trained("lora-B", b.flatten().float(), self.first_layer, float(self.a[name].norm()), direction)

    def random_like(self, generator: torch.Generator) -> LoraAdapter:
        """Gaussian factors of the same ranks, each module's B A as long as that module's.

        So the parameters' size stays where training put it.
        """

        def gaussian(like):
            # type: (Tensor) -> Tensor
            return torch.randn(like.shape, dtype=torch.float64, generator=generator)

        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for name in self.a:
            drawn = LoraAdapter({name: gaussian(self.a[name])}, {name: gaussian(self.b[name])}, alpha=1.0)
            trained = LoraAdapter({name: self.a[name]}, {name: self.b[name]}, alpha=1.0)
            a[name] = drawn.a[name].to(self.a[name])
            b[name] = (drawn.b[name] * (trained.norm / drawn.norm)).to(self.b[name])
        return replace(self, a=a, b=b)

    def started_from(self, start: Solution) -> LoraAdapter | None:
        """The adapter of these scales whose theta is `start`'s; None for another kind, other modules or shapes."""
        shapes = {key: x.shape for key, x in self.tensors().items()}
        if not isinstance(start, LoraAdapter) or {key: x.shape for key, x in start.tensors().items()} != shapes:
            return None
        b = {name: b * (start.scale_of(name) / self.scale_of(name)) for name, b in start.b.items()}
        return replace(self, a=start.a, b=b)

    @contextmanager
    def attached(self, model: ChatModel, *, must_act: bool = True) -> Iterator[None]:
        """Add scale * B A x to the modules' outputs, in the factors' dtype as PEFT does. Differentiable.

        Acts on `model.hf` and, where the bridge calls its linear modules, on the bridge.
        """
        with updating(model, {name: self.update(name) for name in self.a}, base=self.base, must_act=must_act):
            yield

    @contextmanager
    def tracked(self, model: ChatModel) -> Iterator[dict[str, Tensor]]:
        """The modules' weights: a module computes W x + scale B A x, so that dL/dW is dL/d(scale B A).

        Each is a leaf of its own over the same numbers: a tied weight also acts where theta does not.
        """
        owners = weight_owners(model.hf)
        with self.attached(model):
            leaves = {name: own_weight(name, owners[name]) for name in self.a}
            places = [(owners[name], "weight", oriented(owners[name], leaf)) for name, leaf in leaves.items()]
            with replaced(places):
                yield leaves

    @property
    def alike(self) -> Hashable:
        """Modules, shapes and dtype."""
        shapes = ((n, self.a[n].shape, self.b[n].shape, self.a[n].dtype) for n in sorted(self.a))
        return LoraAdapter, *shapes

    @property
    def at_once(self) -> int:
        """As many as are 1 GB."""
        return max(1, STACKED_ENTRIES // sum(x.numel() for x in self.tensors().values()))

    def stack(self, model: ChatModel, members: Sequence[Solution]) -> _Stack:
        """Every module adds a theta of its own to each copy of the batch."""
        return _Stack(model, [member for member in members if isinstance(member, LoraAdapter)])

    def save(self, path: str | Path) -> Path:
        """A PEFT folder: adapter_model.safetensors and adapter_config.json."""
        alphas = {name: self.alphas.get(name, self.alpha) for name in self.a}
        return files.write_lora(Path(path), {"lora_A": self.a, "lora_B": self.b}, alphas, self.rslora, self.base)

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether a folder's adapter_config.json is LoRA's. Raises AdapterError."""
        return isinstance(describe(folder, read_config(folder)), LoraConfig)

    @classmethod
    def glance(cls, folder: Path) -> str:
        """What a folder says."""
        return cls.load(folder).describe()

    @classmethod
    def read(cls, source: Path, base: Base) -> LoraAdapter:
        """As `load`: its file says all."""
        return cls.load(source)

    @classmethod
    def load(cls, path: str | Path) -> LoraAdapter:
        """From a PEFT folder. Refuses what is not plain LoRA (biases, whole modules)."""
        a, b, config = adapter_folders.read_lora(Path(path))
        alphas = {name: config.alpha_of(name) for name in a if config.alpha_of(name) != config.alpha}
        return cls(a, b, config.alpha, config.rslora, config.base, alphas)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, alpha: float, rslora: bool, base: str | None) -> LoraAdapter:
        """From tensors under PEFT's names (`...lora_A.weight`, with or without the adapter's name)."""
        a, b = adapter_folders.split_factors(state, "the adapter")
        return cls(a, b, alpha, rslora, base)


def as_lora(solution: Solution) -> LoraAdapter:
    """The solution, where it is plain LoRA, for what is asked of its A and B. Raises SolutionError for another kind."""
    if not isinstance(solution, LoraAdapter):
        raise SolutionError(f"{solution.describe()} has no A and B of theta = scale * B A. Give a LoRA adapter.")
    return solution


def own_weight(name: str, module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """A leaf over the numbers of a linear module's weight, with a Linear's orientation. Raises SolutionError."""
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise SolutionError(f"{name} has no floating-point weight to differentiate. Load it unquantised.")
    return oriented(module, weight.detach()).requires_grad_()


def oriented(module: nn.Module, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "_ _"]:
    """A matrix of the module as a Linear has it, from how the module has it, and back."""
    return weight.T if output_axis(module) == 1 else weight


class _Stack:
    """LoRA adapters on the same modules: every module adds a theta of its own to each copy of the batch."""

    def __init__(self, model: ChatModel, members: Sequence[LoraAdapter]) -> None:
        first = members[0]
        self.modules = {name: model.hf.get_submodule(name) for name in first.modules}
        self.n = len(members)
        late = last_mlp(model.hf)
        self.late = {name for name, x in self.modules.items() if late is not None and x in set(late.modules())}

        def stacked(parts, module):
            # type: (list[Tensor], nn.Module) -> Tensor
            return torch.stack(parts).detach().to(next(module.parameters()).device)

        self.factors = {
            name: (
                stacked([m.a[name] for m in members], module).mT,
                stacked([m.scale_of(name) * m.b[name] for m in members], module).mT,
            )
            for name, module in self.modules.items()
        }

    def enter(self, residual: Float[Tensor, "row token d_model"]) -> Float[Tensor, "theta_row token d_model"]:
        return repeat(residual, "row token d -> (theta row) token d", theta=self.n)

    @contextmanager
    def on(self, n_tokens: int, n_scored: int) -> Iterator[None]:
        """The hooks. Modules are given all positions of one theta after the other, in the last MLP the scored ones."""
        counts: dict[str, list[int]] = {name: [0] for name in self.modules}
        handles = [
            module.register_forward_hook(
                tagged(partial(self._add, name, n_scored if name in self.late else n_tokens, counts[name]))
            )
            for name, module in self.modules.items()
        ]
        with firing(counts, handles):
            yield

    def _add(
        self, name: str, n_tokens: int, count: list[int], _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        count[0] += 1
        (a, b), x = self.factors[name], args[0]
        if x.numel() != self.n * n_tokens * x.shape[-1]:
            raise NotShareable(f"{name} is not run on every token")
        update = torch.bmm(x.reshape(self.n, n_tokens, -1).to(a.dtype), a)
        flat = output.reshape(self.n, n_tokens, -1)
        if flat.dtype == b.dtype:
            return torch.baddbmm(flat, update, b).view_as(output)
        return (flat + torch.bmm(update, b)).to(output.dtype).view_as(output)


def _joint(factors: Mapping[str, Tensor]) -> float:
    """The norm of all factors together."""
    return math.sqrt(sum(float(exact(x.detach()).square().sum()) for x in factors.values()))
