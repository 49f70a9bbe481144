"""A full finetune: theta = finetuned minus base weights, over all floating tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.errors import SolutionError
from em_interp.files.adapters import CONFIG
from em_interp.files.atomic import written_whole
from em_interp.files.base_names import refuse_other_base
from em_interp.files.manifest import fingerprint
from em_interp.models.architectures import body_name, find_blocks, layer_of
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout
from em_interp.models.hooks import block_hooks
from em_interp.models.precision import exact
from em_interp.models.pretrained import load_on_disk
from em_interp.models.weights import base_tensors, decisive_config, own_tensor, replaced, tensors_hash
from em_interp.solutions.base import Base, Solution, check_eps, check_factor, rotate_away

_MAY_DIFFER = ("dropout", "initializer", "init_std", "pdrop", "tie_word_embeddings", "vocab_size", "output_router")
"""Parts of config keys that say nothing of a forward pass here, or whose difference the tensors show."""


class Weights:
    """The floating tensors of a transformers model `hf` by name, tied ones once, wherever they are kept.

    shapes: of each; places: the modules and attributes that hold it, several where it is tied.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        tied: dict[str, str] = getattr(hf, "all_tied_weights_keys", None) or {}
        first: dict[int, str] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tied: dict[str, str] = {}
        found = [x for x in base_tensors(hf) if x[3].is_floating_point()]
        for name, module, leaf, tensor in found:
            one = tied.get(name, name) if tensor.is_meta else first.setdefault(id(tensor), name)
            if one != name:
                self.tied[name] = one
            self.places.setdefault(one, []).append((module, leaf))
            self.shapes.setdefault(one, tuple(tensor.shape))

    def read(self, name: str) -> Tensor:
        """One of them, as the model has it."""
        module, leaf = self.places[name][0]
        with own_tensor(module, leaf) as tensor:
            return tensor.detach()


@dataclass(frozen=True, eq=False)
class Finetune:
    """Two sets of weights with the same tensors, `finetuned` and `base`, and which of these differ.

    source: the finetune's folder or name, as messages say it.
    """

    finetuned: Weights
    base: Weights
    source: str

    def __post_init__(self) -> None:
        _check_same_model(self.finetuned, self.base, self.source)
        if not self.squares:
            raise SolutionError(
                f"{self.source}: every weight is the base's, so theta is zero: it is no finetune. Take a later "
                "checkpoint, or the base that it was trained from."
            )

    def raw(self, name: str) -> Float[Tensor, "..."]:
        """finetuned - base in float64, on the CPU; the finetuned one in the precision of the base in hand."""
        own = self.base.read(name).cpu()
        return self.finetuned.read(name).to(own.dtype).cpu().double() - own.double()

    @cached_property
    def squares(self) -> dict[str, float]:
        """||theta||^2 of each tensor that differs. Reads every tensor once. Raises SolutionError for NaN."""
        found = {}
        for name in self.base.shapes:
            square = float(self.raw(name).square().sum())
            if not math.isfinite(square):
                raise SolutionError(
                    f"{self.source}: {name} holds NaN or infinite values. The run that made it diverged."
                )
            if square:
                found[name] = square
        return found

    @cached_property
    def content(self) -> str:
        """SHA-256 of the tensors that differ, in both."""
        sides = {"finetuned": self.finetuned, "base": self.base}
        return fingerprint(
            {name: [tensors_hash({side: w.read(name)}) for side, w in sides.items()] for name in self.squares}
        )

    @cached_property
    def first_layer(self) -> int:
        """The first block with a tensor that differs; n_layers where only what follows the blocks does."""
        layers = [layer_of(name) for name in self.squares if name not in self.after]
        if any(layer is None for layer in layers):
            return 0
        return min((layer for layer in layers if layer is not None), default=len(find_blocks(self.base.hf)))

    @cached_property
    def after(self) -> frozenset[str]:
        """Tensors of what is sure to run after the blocks only: the final norm, and a head that is not tied."""
        hf = self.base.hf
        children = list(hf.get_submodule(body_name(hf)).children())
        blocks = next(i for i, child in enumerate(children) if find_blocks(hf)[0] in set(child.modules()))
        norms = [child for child in children[blocks + 1 :] if "norm" in type(child).__name__.lower()]
        late = {module for norm in norms for module in norm.modules()} | {hf.get_output_embeddings()}
        places = self.base.places.items()
        return frozenset(name for name, where in places if all(module in late for module, _ in where))


@dataclass(frozen=True)
class _Turn:
    """Each tensor x becomes sqrt(1 - eps^2) x + eps y; eps None: a random tensor as long. y is drawn from the seed."""

    seed: int
    eps: float | None

    def of(self, name: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, name))
        if self.eps is None:
            y = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            return y * (x.norm() / y.norm())
        return x if x.numel() < 2 else rotate_away(x, self.eps, generator, what=name)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


@dataclass(frozen=True, eq=False, repr=False)
class WeightDelta(Solution):
    """theta = factor * (finetuned - base weights), each of the tensors that differ turned by `turns`.

    Over all floating tensors (norms, biases, embeddings and head included; tied ones once, and tied they stay), laid
    out as the model has them. The finetuned weights stay in their files and are read tensor by tensor; the base's are
    those of the model in hand. Attached, it holds the finetuned weights too: two copies of the model, never a third.
    """

    ADAPTERS = ("full",)
    OF_BASE = True

    finetune: Finetune
    """The weights on both sides."""
    base: str | None = None
    factor: float = 1.0
    turns: tuple[_Turn, ...] = ()
    values: Mapping[str, Tensor] | None = None
    """theta itself, where it was given (`with_tensors`); then `factor` and `turns` count no more."""
    held: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """Effective weights, where `ready` has made them."""

    def describe(self) -> str:
        """How many tensors differ."""
        return f"a full finetune that changes {len(self.finetune.squares)} tensors"

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """{tensor: its shape}, of all that could differ."""
        return self.finetune.base.shapes

    def delta(self, place: str) -> Float[Tensor, "..."]:
        """theta of one tensor."""
        if place not in self.finetune.squares:
            return torch.zeros(self.space[place], dtype=torch.float64)
        if self.values is not None:
            return exact(self.values[place].detach())
        x = self.finetune.raw(place)
        for turn in self.turns:
            x = turn.of(place, x)
        return self.factor * x

    @property
    def norm(self) -> float:
        """Frobenius norm over all tensors; a turn changes none."""
        if self.values is not None:
            return math.sqrt(sum(float(exact(x.detach()).square().sum()) for x in self.values.values()))
        return abs(self.factor) * math.sqrt(sum(self.finetune.squares.values()))

    def norms(self) -> Mapping[str, float]:
        """Norm of theta of each tensor that differs."""
        if self.values is not None:
            return {name: float(exact(x.detach()).norm()) for name, x in self.values.items()}
        return dict(zip(self.finetune.squares, self._norms(), strict=True))

    @property
    def source(self) -> str:
        """The finetuned model's folder or name, also of a theta made of it."""
        return self.finetune.source

    def paper_norms(self) -> dict[str, float]:
        """raw_norm: mean over the tensors that differ of their norms, as P1's code has it over modules."""
        norms = [float(self.delta(n).norm()) for n in self.values] if self.values is not None else self._norms()
        return {"raw_norm": sum(norms) / len(norms)}

    def _norms(self) -> list[float]:
        return [abs(self.factor) * math.sqrt(square) for square in self.finetune.squares.values()]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both sets of weights and of what was done to theta."""
        if self.values is not None:
            return tensors_hash(self.values)
        return fingerprint([self.finetune.content, self.factor, [[turn.seed, turn.eps] for turn in self.turns]])

    @property
    def first_layer(self) -> int:
        """The first block with a tensor that differs; 0 if an embedding does."""
        return self.finetune.first_layer

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Embeddings, the final norm, the head."""
        return tuple(name for name in self.finetune.squares if layer_of(name) is None)

    def scaled(self, factor: float) -> WeightDelta:
        """theta times `factor`."""
        by = check_factor(factor)
        values = None if self.values is None else {name: by * x.detach() for name, x in self.values.items()}
        return replace(self, factor=by * self.factor, values=values, held=None)

    def tensors(self, on: str = "both") -> Mapping[str, Tensor]:
        """theta of the tensors that differ, each of which is turned at its own norm. A copy of the model in memory."""
        if on != "both":
            raise SolutionError(f"on={on!r}: a full finetune has no factors. Leave it at 'both'.")
        if self.values is not None:
            return self.values
        return {name: self.delta(name).to(self._precision(name)) for name in self.finetune.squares}

    def _precision(self, name: str) -> torch.dtype:
        own = self.finetune.base
        module, leaf = own.places[name][0]
        with own_tensor(module, leaf) as tensor:
            return torch.promote_types(tensor.dtype, torch.float32)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> WeightDelta:
        """With other values of theta."""
        mine = {} if set(tensors) >= set(self.finetune.squares) else dict(self.tensors())
        values = mine | {name: x for name, x in tensors.items() if name in self.finetune.squares}
        return replace(self, values=values, held=None)

    def perturbed(self, eps: float, generator: torch.Generator, on: str = "both") -> WeightDelta:
        """Each tensor that differs is turned at its own norm, as P1's code does by parameter.

        Only a seed is drawn and kept: y is made anew whenever the tensor is read. A tensor of one number stays.
        """
        check_eps(eps)
        if not self.norm > 0:
            raise SolutionError("the full finetune is zero: no orthogonal.")
        seed = int(torch.randint(2**62, (1,), generator=generator))
        turn = _Turn(seed, eps)
        if on != "both" or self.values is not None:
            return self.with_tensors({name: turn.of(name, x) for name, x in self.tensors(on).items()})
        return self if eps == 0 else replace(self, turns=(*self.turns, turn), held=None)

    def random_like(self, generator: torch.Generator) -> WeightDelta:
        """Gaussian tensors, each as long as that of theta, where theta differs from zero."""
        turn = _Turn(int(torch.randint(2**62, (1,), generator=generator)), None)
        if self.values is not None:
            return self.with_tensors({name: turn.of(name, exact(x.detach())).to(x) for name, x in self.values.items()})
        return replace(self, turns=(*self.turns, turn), held=None)

    # -- in a model -----------------------------------------------------------------------------------------

    def effective(self, name: str) -> Tensor:
        """base + theta of one tensor, where and as precise as the base's is; differentiable in given values."""
        own = self.finetune.base.read(name)
        if self.values is not None:
            x = self.values[name].to(own.device)
            return (own.to(x.dtype) + x).to(own.dtype)
        if self.factor == 1.0 and not self.turns:
            return self.finetune.finetuned.read(name).to(own)
        return (exact(own).cpu() + self.delta(name)).to(own)

    def _in(self, model: ChatModel) -> tuple[Weights, Mapping[str, Tensor]]:
        """The tensors of `model` and what they become. Raises SolutionError if these are not the base's."""
        here, base = Weights(model.hf), self.finetune.base
        error = SolutionError(f"a full finetune of {self.base} does not fit {model.name}. Load {self.base}.")
        refuse_other_base(self.base, model.names, error)
        if here.shapes != base.shapes:
            raise error
        if self.held is not None:
            return here, self.held
        if base.hf is not model.hf:
            for name in self.finetune.squares:
                own = here.read(name)
                if not torch.equal(base.read(name).to(own), own):
                    raise SolutionError(
                        f"{model.name}: {name} is not that of {self.base}, which the finetune was compared with. Load "
                        "that base, or read the finetune with base=model."
                    )
        return here, {name: self.effective(name).to(here.read(name)) for name in self.finetune.squares}

    def ready(self, model: ChatModel) -> WeightDelta:
        """Holding the effective weights, so that attaching it is quick: a second copy of the model in memory."""
        return replace(self, held=self._in(model)[1])

    @contextmanager
    def attached(self, model: ChatModel, *, must_act: bool = True) -> Iterator[None]:
        """Put base + theta in the place of the weights that differ. Differentiable in given values.

        The base's own tensors come back untouched. A bridge, which holds some of them and has cut up others, refuses
        passes inside.
        """
        refuse_dropout(model.hf)
        here, weights = self._in(model)
        with self._standing_in(model, here, weights, must_act):
            yield

    @contextmanager
    def _standing_in(
        self, model: ChatModel, here: Weights, weights: Mapping[str, Tensor], must_act: bool = True
    ) -> Iterator[None]:
        places = [(*place, weights[name]) for name in weights for place in here.places[name]]
        looking = block_hooks(
            model.block_sets(), {0: lambda hidden: None}, must_fire=must_act, acts={0: lambda: self.fingerprint}
        )
        with replaced(places), model.refusing_bridge(None), looking:
            yield

    @contextmanager
    def tracked(self, model: ChatModel) -> Iterator[dict[str, Tensor]]:
        """The effective weights of all tensors, changed or not."""
        refuse_dropout(model.hf)
        here, weights = self._in(model)
        leaves = {name: weights.get(name, here.read(name)).detach().requires_grad_() for name in here.shapes}
        with self._standing_in(model, here, leaves):
            yield leaves

    # -- on disk --------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """A plain transformers folder of base + theta, in the finetuned model's precision, with its tokenizer."""
        from accelerate import init_empty_weights
        from transformers import AutoTokenizer

        folder, finetuned = Path(path), self.finetune.finetuned
        with init_empty_weights(include_buffers=False):
            empty = type(finetuned.hf)(finetuned.hf.config).to(finetuned.hf.dtype)
        empty.generation_config = finetuned.hf.generation_config
        weights = {name: finetuned.read(name) for name in finetuned.shapes}
        weights |= {name: self.effective(name).detach().cpu().to(weights[name].dtype) for name in self.finetune.squares}
        with written_whole(folder) as tmp:
            empty.save_pretrained(str(tmp), state_dict=weights)
            with suppress(OSError, ValueError):  # it has none
                AutoTokenizer.from_pretrained(self.finetune.source).save_pretrained(str(tmp))
        return folder

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether a folder is a model's, and not an adapter's."""
        return (folder / "config.json").is_file() and not (folder / CONFIG).exists()

    @staticmethod
    def glance(folder: Path) -> str:
        """What a folder says without its base."""
        weights = Weights(load_on_disk(folder))
        n = sum(math.prod(shape) for shape in weights.shapes.values())
        return f"{type(weights.hf).__name__}, {len(weights.shapes)} tensors of {n} numbers: a model, or a full finetune"

    @classmethod
    def read(cls, source: str | Path, base: Base) -> WeightDelta:
        """From a model's folder or hub name and its base. Raises SolutionError where they are not of one model."""
        if base is None:
            raise SolutionError(
                f"{source}: a full finetune, and nothing says of which base. Name it: load(source, base=MODEL), a "
                "ChatModel, a folder or a hub name."
            )
        name = base.name if isinstance(base, ChatModel) else str(base)
        kept = base.hf if isinstance(base, ChatModel) else load_on_disk(base)
        return cls(Finetune(Weights(load_on_disk(source)), Weights(kept), str(source)), name)


def _check_same_model(finetuned: Weights, base: Weights, source: str) -> None:
    """Raise SolutionError, naming the first difference, unless both have the same tensors, tied alike, and config."""

    def refuse(what):
        # type: (str) -> SolutionError
        return SolutionError(
            f"{source}: {what}, so it is no finetune of that base. Give the base that it was made from."
        )

    families = [type(w.hf).__name__ for w in (finetuned, base)]
    if families[0] != families[1]:
        raise refuse(f"a {families[0]}, and the base is a {families[1]}")
    sizes = [int(w.hf.get_input_embeddings().weight.shape[0]) for w in (finetuned, base)]
    if sizes[0] != sizes[1]:
        raise refuse(f"a vocabulary of {sizes[0]} tokens, and the base has {sizes[1]}")
    if odd := sorted(set(finetuned.tied.items()) ^ set(base.tied.items())):
        raise refuse(f"{' and '.join(odd[0])} are tied in only one of the two")
    if odd_names := sorted(set(finetuned.shapes) ^ set(base.shapes)):
        raise refuse(f"{odd_names[0]} is in only one of the two")
    for name, shape in base.shapes.items():
        if finetuned.shapes[name] != shape:
            raise refuse(f"{name} is {list(finetuned.shapes[name])}, and the base's is {list(shape)}")
    configs = [decisive_config(w.hf.config) for w in (finetuned, base)]
    for key in sorted(set(configs[0]) | set(configs[1])):
        if configs[0].get(key) != configs[1].get(key) and not any(part in key for part in _MAY_DIFFER):
            raise refuse(f"its config says {key} = {configs[0].get(key)}, and the base's {configs[1].get(key)}")
