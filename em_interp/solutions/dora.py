"""A DoRA adapter as PEFT makes it: theta = m * (W + scale * B A) / ||W + scale * B A|| - W on linear modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.errors import AdapterError, SolutionError
from em_interp.files.adapter_folders import MAGNITUDE, split_factors, split_magnitudes
from em_interp.files.adapters import adapter_tensors, describe, plain_lora, read_config
from em_interp.files.manifest import fingerprint
from em_interp.models.attaching import check_tensor, updating
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout
from em_interp.models.precision import exact
from em_interp.models.pretrained import load_on_disk
from em_interp.models.weights import own_tensor, replaced, tensors_hash, weight_owners
from em_interp.solutions import files
from em_interp.solutions.base import Base, Solution, check_factor
from em_interp.solutions.lora import LoraAdapter, oriented


@dataclass(frozen=True, eq=False, repr=False)
class DoraAdapter(Solution):
    """theta = factor * (m * V / ||V|| - W) with V = W + scale * B A, on the modules of `lora`.

    ||V||: of each row, that of one output, of the matrix as a Linear has it ([out, in], also where the module is a
    transposed Conv1D). m[name]: [out]. weights[name]: the base's W, [out, in]; no copy of a ChatModel's. factors: of
    the modules whose theta was scaled, which a change of A, B and m can express, too (`save`).
    """

    ADAPTERS = ("all-modules",)
    FACTORS = ("A", "B", "m")
    OF_BASE = True

    lora: LoraAdapter
    m: Mapping[str, Float[Tensor, " _"]]
    weights: Mapping[str, Float[Tensor, "_ _"]]
    factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (d_out, d_in) in self.lora.space.items():
            if name not in self.m or name not in self.weights:
                raise SolutionError(f"{name}: a module of DoRA needs its m and the base's W. Read it with its base.")
            check_tensor(f"{name}: m", self.m[name], 1)
            shapes = tuple(self.weights[name].shape), tuple(self.m[name].shape)
            if shapes != ((d_out, d_in), (d_out,)):
                raise SolutionError(
                    f"{name}: B A is {(d_out, d_in)}, the base's W {shapes[0]} and m {shapes[1]}. Give its own base."
                )

    @property
    def base(self) -> str | None:
        """The recorded one."""
        return self.lora.base

    def describe(self) -> str:
        """Rank and number of modules."""
        return f"a rank-{self.lora.rank} DoRA on {len(self.m)} modules"

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """{module: (d_out, d_in)}."""
        return self.lora.space

    def update(self, name: str) -> _Update:
        """What it adds to one module."""
        low = self.lora.update(name)
        return _Update(low.a, low.b, self.m[name], low.scale, self.weights[name], self.factors.get(name, 1.0))

    def delta(self, place: str) -> Float[Tensor, "d_out d_in"]:
        """theta of one module."""
        low = self.lora.update(place)
        a, b, m, own = (x.detach().cpu().double() for x in (low.a, low.b, self.m[place], self.weights[place]))
        exact = _Update(a, b, m, low.scale, own, self.factors.get(place, 1.0))
        return exact.factor * (exact.gain()[:, None] * exact.turned_weight() - own)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm over all modules, whose dense thetas are made one after the other."""
        return sum(length**2 for length in self._norms) ** 0.5

    def norms(self) -> Mapping[str, float]:
        """Norm of theta of each module."""
        return dict(zip(self.space, self._norms, strict=True))

    @cached_property
    def _norms(self) -> list[float]:
        return [float(self.delta(name).norm()) for name in self.space]

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: mean over modules of theta's. norm_a, norm_b, norm_m: of all A, all B and all m."""
        lengths = torch.cat([self.m[name].detach().flatten().cpu().double() for name in self.m])
        factors = {key: x for key, x in self.lora.paper_norms().items() if key != "raw_norm"}
        return {"raw_norm": sum(self._norms) / len(self._norms), **factors, "norm_m": float(lengths.norm())}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of A, B, m, scale, factor and W of all modules."""
        return fingerprint({name: self.update(name).acts() for name in self.space})

    @property
    def first_layer(self) -> int:
        """The first block that holds a touched module."""
        return self.lora.first_layer

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Modules such as the output head."""
        return self.lora.outside_blocks

    def scaled(self, factor: float) -> DoraAdapter:
        """theta times `factor`."""
        by = check_factor(factor)
        return replace(self, factors={name: by * self.factors.get(name, 1.0) for name in self.m})

    def tensors(self, on: str = "both") -> Mapping[str, Tensor]:
        """Every A, every B and every m, each of which is turned at its own norm; or one kind of them alone."""
        magnitudes = {f"{name}: m": x for name, x in self.m.items()}
        if on == "m":
            return magnitudes
        return {**self.lora.tensors(on), **(magnitudes if on == "both" else {})}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DoraAdapter:
        """With other A, B or m."""
        m = {name: tensors.get(f"{name}: m", x) for name, x in self.m.items()}
        return replace(self, lora=self.lora.with_tensors(tensors), m=m)

    def random_like(self, generator: torch.Generator) -> DoraAdapter:
        """Gaussian A, B and changes of m, as long as the trained ones; then each module's theta as long as its own."""
        lora = self.lora.random_like(generator)
        m = {}
        for name, trained in self.m.items():
            untrained = exact(self.weights[name].detach()).norm(dim=1).cpu()
            y = torch.randn(untrained.shape, dtype=torch.float64, generator=generator)
            m[name] = (untrained + y * ((trained.detach().cpu().double() - untrained).norm() / y.norm())).to(trained)
        drawn = replace(self, lora=lora, m=m, factors={})
        lengths = zip(self.space, self._norms, drawn._norms, strict=True)
        return replace(drawn, factors={name: wanted / length for name, wanted, length in lengths})

    # -- in a model -----------------------------------------------------------------------------------------

    @contextmanager
    def attached(self, model: ChatModel, *, must_act: bool = True) -> Iterator[None]:
        """Change the modules' outputs as PEFT does; the gain through ||V|| is differentiated, too (PEFT holds it).

        Acts on `model.hf` and, where the bridge calls its linear modules, on the bridge. Raises SolutionError where the
        model's W are not those that theta was read with.
        """
        self._check_weights(model)
        with updating(model, {name: self.update(name) for name in self.m}, base=self.base, must_act=must_act):
            yield

    @contextmanager
    def tracked(self, model: ChatModel) -> Iterator[dict[str, Tensor]]:
        """The modules' effective weights."""
        refuse_dropout(model.hf)
        self._check_weights(model)
        owners = weight_owners(model.hf)
        leaves = {}
        for name, own in self.weights.items():
            effective = (own.detach().cpu().double() + self.delta(name)).to(own)
            leaves[name] = effective.requires_grad_()
        places = [(owners[name], "weight", oriented(owners[name], leaf)) for name, leaf in leaves.items()]
        with replaced(places):
            yield leaves

    def _check_weights(self, model: ChatModel) -> None:
        owners = weight_owners(model.hf)
        for name, own in self.weights.items():
            if name not in owners:
                continue  # `updating` says so
            here = oriented(owners[name], _own_weight(name, owners[name]))
            if here.data_ptr() != own.data_ptr() and here.shape == own.shape and not torch.equal(here, own.to(here)):
                raise SolutionError(
                    f"{model.name}: {name} is not that of {self.base or 'the base'}, which theta was read with. Load "
                    "that base, or read the adapter with base=model."
                )

    # -- on disk --------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """A PEFT folder.

        Where theta was scaled, other B and m give it: with d = 1 - factor + factor * m / ||V|| for each row,
        theta = d * (W + factor * m / ||V|| / d * scale * B A) - W. Raises SolutionError where a d is 0.
        """
        b, m = dict(self.lora.b), dict(self.m)
        for name in (name for name, factor in self.factors.items() if factor != 1.0):
            update = self.update(name)
            gain = update.factor * update.gain().detach()
            d = 1 - update.factor + gain
            if not bool((d.abs() > 0).all()):
                raise SolutionError(f"{name}: theta times {update.factor} is no DoRA: it takes a row of W away.")
            b[name] = update.b.detach() * (gain / d)[:, None].to(update.b)
            m[name] = d * replace(update, b=b[name]).turned_weight().detach().norm(dim=1)
        alphas = {name: self.lora.alphas.get(name, self.lora.alpha) for name in b}
        factors = {"lora_A": self.lora.a, "lora_B": b, MAGNITUDE: m}
        return files.write_lora(Path(path), factors, alphas, self.lora.rslora, self.base)

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether a folder's adapter_config.json is that of LoRA with use_dora. Raises AdapterError."""
        found = describe(folder, read_config(folder))
        return bool(found.beyond.get("use_dora"))

    @staticmethod
    def glance(folder: Path) -> str:
        """What a folder says without its base."""
        config = plain_lora(folder, read_config(folder), understood=("use_dora",))
        n = len(split_magnitudes(adapter_tensors(folder)))
        return f"DoRA of rank {config.rank} and alpha {config.alpha:g} on {n} modules, trained on {config.base}"

    @classmethod
    def read(cls, source: Path, base: Base) -> DoraAdapter:
        """From a PEFT folder and its base. Raises SolutionError without a base, AdapterError for more than DoRA."""
        config = plain_lora(source, read_config(source), understood=("use_dora",))
        if base is None:
            raise SolutionError(
                f"{source}: DoRA, not plain LoRA: its theta is one of the base's weights. Name the base: load(source, "
                "base=MODEL), a ChatModel, a folder or a hub name."
            )
        stored = adapter_tensors(source)
        m = split_magnitudes(stored)
        a, b = split_factors({key: x for key, x in stored.items() if MAGNITUDE not in key}, source)
        if set(m) != set(a):
            raise AdapterError(f"{source}: magnitudes of {len(m)} modules, and A of {len(a)}. Fetch it again.")
        alphas = {name: config.alpha_of(name) for name in a}
        hf = base.hf if isinstance(base, ChatModel) else load_on_disk(base)
        owners = weight_owners(hf)
        if absent := sorted(set(a) - set(owners)):
            raise SolutionError(f"{source}: the base has no module {absent[0]}. Give the base that it was trained on.")
        weights = {name: oriented(owners[name], _own_weight(name, owners[name])) for name in a}
        return cls(LoraAdapter(a, b, config.alpha, config.rslora, config.base, alphas), m, weights)


def _own_weight(name: str, module: nn.Module) -> Float[Tensor, "rows columns"]:
    """A linear module's own numbers, or those of its file. Raises SolutionError."""
    with own_tensor(module, "weight") as weight:
        if weight.ndim != 2 or not weight.is_floating_point():
            raise SolutionError(f"{name} of the base is {weight.dtype}, {weight.ndim}-dimensional; theta needs its W.")
        return weight.detach()


@dataclass(frozen=True, eq=False)
class _Update:
    """What DoRA does to one module's output. a: [rank, in], b: [out, rank], m: [out], weight: [out, in]."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    m: Float[Tensor, " d_out"]
    scale: float
    weight: Float[Tensor, "d_out d_in"]
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def acts(self) -> str:
        """SHA-256 of what is added."""
        return tensors_hash({"A": self.a, "B": self.b, "m": self.m, "W": self.weight}, self.scale, self.factor)

    def turned_weight(self) -> Float[Tensor, "d_out d_in"]:
        """V = W + scale * B A, in the wider precision of W and the factors."""
        dtype = torch.promote_types(self.weight.dtype, self.a.dtype)
        return self.weight.detach().to(dtype) + self.scale * (self.b @ self.a).to(self.weight.device, dtype)

    def gain(self) -> Float[Tensor, " d_out"]:
        """m / ||V||, row by row."""
        turned = self.turned_weight()
        return self.m.to(turned) / turned.norm(dim=1)

    def hook(self, module: nn.Module) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
        """(arguments, output) of `module` -> output with theta x."""
        device = self.weight.device
        a, b, gain = self.a.to(device), self.b.to(device), self.gain()
        return partial(self._turned, a, b, gain, getattr(module, "bias", None))

    def _turned(
        self, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        low = self.scale * ((args[0].to(a.dtype) @ a.T) @ b.T)
        linear = output if bias is None else output - bias
        return (output + self.factor * ((gain - 1) * linear + gain * low)).to(output.dtype)
