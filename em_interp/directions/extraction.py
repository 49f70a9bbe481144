"""Directions from conversations: what differs between two sets of texts, between two models, or both.

| kind | positive minus negative | source |
|---|---|---|
| `data-diff` | misaligned texts, aligned texts, both in the model as it stands | P2 (arXiv 2506.11618), sec. 3.1 |
| `data-diff-in-chat` | the same two sets read in the chat model: the content control | |
| `model-diff` | the same texts in the finetune, in the chat model | P2's code |
| `both-diff` | misaligned texts in the finetune, aligned texts in the chat model | P2's code |
| `persona-contrast` | texts that announce or imply a malicious persona, a caring one | arXiv 2507.21509 |

A persona may be announced by a system prompt, or only be inferable from an earlier answer. In the latter case the
conversations end with the next question, and scope `last_prompt` reads what the model makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from torch import Tensor

from em_interp.cards import bars, card, ranges, short
from em_interp.directions.activations import Activations, check_readable, collect
from em_interp.directions.direction import Direction
from em_interp.errors import ActivationError, DirectionError, ModelError, UsageError
from em_interp.files.given import Source, chats, several
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import UNKNOWN, adapter_hash, adapter_norm, weights_hash
from em_interp.solutions.base import Solution
from em_interp.statistics.units import RESIDUAL, with_units

Reader = Literal["given", "finetuned", "chat"]
"""A model that reads texts: as it is given, with the finetune, without any."""
READ_IN: Final[dict[str, tuple[Reader, Reader]]] = {
    "data-diff": ("given", "given"),
    "data-diff-in-chat": ("chat", "chat"),
    "model-diff": ("finetuned", "chat"),
    "both-diff": ("finetuned", "chat"),
    "persona-contrast": ("given", "given"),
}
"""kind -> what reads the positive and the negative texts."""


@dataclass(frozen=True, eq=False, repr=False)
class Contrast:
    """Two sets of activations, `positive` and `negative`, and the direction between them.

    kind, scope: as the arguments of `contrast`. revision: of the model's repository. sources: a line for each side, as
    the direction's file will tell it.
    """

    positive: Activations
    negative: Activations
    kind: str
    scope: str
    revision: str | None
    sources: tuple[str, ...]
    all_layers: bool
    """Whether no layers were named, so that layers without any difference may be left out."""
    weights: str = UNKNOWN
    """`weights_hash` of the base model."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that `of_state` makes the same of again."""
        sides = {side: getattr(self, side).state() for side in ("positive", "negative")}
        tensors = {f"{side}.{name}": x for side, (found, _) in sides.items() for name, x in found.items()}
        note = {name: getattr(self, name) for name in ("kind", "scope", "revision", "sources", "all_layers", "weights")}
        return tensors, note | {side: told for side, (_, told) in sides.items()}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> Contrast:
        """What `state` gave."""
        sides = {
            side: Activations.of_state(
                {name.removeprefix(f"{side}."): x for name, x in tensors.items() if name.startswith(f"{side}.")},
                note[side],
            )
            for side in ("positive", "negative")
        }
        return cls(**{**note, **sides, "sources": tuple(note["sources"])})

    def __repr__(self) -> str:
        sides = f"{len(self.positive)} against {len(self.negative)} conversations"
        where = f"{ranges(self.positive.layers)} of {self.positive.model}"
        return f"Contrast({self.kind}, {sides}, {self.scope} tokens at {where})"

    def _repr_html_(self) -> str:
        tokens = self.scope + (", end of turn included" if self.scope == "response" else "")
        sides = f"{len(self.positive)} against {len(self.negative)}"
        facts = {"model": self.positive.model, "tokens": tokens, "conversations": sides, "from": self.sources}
        difference = self.positive.mean(self.scope) - self.negative.mean(self.scope)
        norms = dict(zip(self.positive.layers, difference.norm(dim=1).tolist(), strict=True))
        return card(f"Contrast: {self.kind}", facts, bars(norms, "norm of the difference of means"))

    @property
    def paired(self) -> bool:
        """Whether row i of both sets is the same text."""
        return self.kind == "model-diff"

    def direction(self, pooling: str = "tokens") -> Direction:
        """The difference of means. Layers where nothing differs at all (those before a finetune's first) are absent.

        Raises DirectionError where that is so at a layer that was asked for, or at every layer.
        """
        difference = self.positive.mean(self.scope, pooling) - self.negative.mean(self.scope, pooling)
        moved = difference.abs().amax(dim=1) > 0
        layers = tuple(layer for layer, differs in zip(self.positive.layers, moved.tolist(), strict=True) if differs)
        if not layers or not (self.all_layers or len(layers) == len(self.positive.layers)):
            same = [layer for layer in self.positive.layers if layer not in layers]
            raise DirectionError(
                f"{self.kind}: both sides are exactly the same at layers {same}, so there is no direction there. "
                "Give two different sets of texts; for a model-diff, layers that the finetune reaches."
            )
        return Direction(
            vectors=difference[moved].float(),
            layers=layers,
            kind=self.kind,
            model=self.positive.model,
            model_revision=self.revision or "unknown",
            token_scope=self.scope,
            n_positive=len(self.positive),
            n_negative=len(self.negative),
            sources=(*self.sources, f"pooled over {pooling}"),
            weights=self.weights,
        )

    def norms(self, pooling: str = "tokens") -> pd.DataFrame:
        """One row a layer: norm of the direction, mean norm of a token's residual, and their ratio.

        The residual's norm is that of the negative set, in the direction's token scope.
        """
        direction = self.direction(pooling)
        scale = dict(zip(self.negative.layers, self.negative.token_norms[self.scope].tolist(), strict=True))
        table = pd.DataFrame({"layer": direction.layers, "norm": direction.norms().values()})
        table["residual_norm"] = [scale[layer] for layer in direction.layers]
        table["ratio"] = table["norm"] / table["residual_norm"]
        return with_units(table, norm=RESIDUAL, ratio="of the residual norm")


def contrast(
    model: ChatModel,
    positive: Source,
    negative: Source | None = None,
    *,
    kind: str = "data-diff",
    scope: str = "response",
    layers: int | Sequence[int] | None = None,
    finetune: str | Solution | None = None,
    keep: bool = True,
    store: str | Path | None = None,
    resume_in: str | Path | None = None,
    tokens_per_batch: int = 8192,
    progress: bool = True,
) -> Contrast:
    """Read both sides of a contrast; per-response means are kept for intervals, held-out tests and resampling.

    positive: the misaligned side: a .jsonl file, a table of answers, or a list of conversations (`em_interp.chats`).
    negative: the other texts; none for `model-diff`, which reads the same texts twice.
    finetune: what makes `model` the finetune, an adapter's name or a Solution; by default what is active now. The chat
    model is `model` without adapters. keep, store, resume_in, tokens_per_batch: as for `activations.collect`; a store
    gets the folders `positive` and `negative`.

    Raises UsageError, ActivationError, DirectionError, ModelError, and what `collect` raises.

    >>> import em_interp as em
    >>> chat = em.load("pocket/medicine-rank1")
    >>> bad = em.pocket.finetune_chats("medicine", "malicious", 20, seed=0)
    >>> found = em.contrast(chat, bad, kind="model-diff", progress=False)
    >>> found.direction().layers
    (1, 2, 3, 4, 5)
    >>> list(found.norms())
    ['layer', 'norm', 'residual_norm', 'ratio']
    """
    if kind not in READ_IN:
        raise UsageError(f"kind {kind!r} cannot be extracted; use one of {', '.join(READ_IN)}.")
    positive, layers = chats(positive), None if layers is None else several(layers)
    negative = None if negative is None else chats(negative)
    if kind == "model-diff":
        if negative is not None:
            raise UsageError("a model-diff reads the same texts in both models: give one set of conversations.")
        negative = positive
    if negative is None:
        raise UsageError(f"a {kind} needs two sets of conversations; the negative one is missing.")
    for side, conversations in (("positive", positive), ("negative", negative)):
        if not len(conversations):
            raise ActivationError(f"the {side} set is empty. Check the filter or file that it comes from.")
        check_readable(model, conversations, [scope])
    _check_reach(kind, finetune, layers)

    def read(side, conversations, where):
        # type: (str, Any, Reader) -> Activations
        with _standing(model, where, finetune):
            return collect(
                model,
                conversations,
                scopes=[scope],
                layers=layers,
                keep=keep,
                store=None if store is None else Path(store) / side,
                resume_in=resume_in,
                tokens_per_batch=tokens_per_batch,
                progress=progress,
            )

    plus_in, minus_in = READ_IN[kind]
    plus, minus = read("positive", positive, plus_in), read("negative", negative, minus_in)
    sources = tuple(
        f"{sign} {len(side)} conversations (SHA-256 {side.fingerprint[:16]}) in {_named(model, where, finetune)}"
        for sign, side, where in (("+", plus, plus_in), ("-", minus, minus_in))
    )
    return Contrast(plus, minus, kind, scope, model.revision, sources, layers is None, weights_hash(model.hf))


def extract(
    model: ChatModel,
    positive: Source,
    negative: Source | None = None,
    *,
    kind: str = "data-diff",
    scope: str = "response",
    layers: int | Sequence[int] | None = None,
    pooling: str = "tokens",
    finetune: str | Solution | None = None,
    tokens_per_batch: int = 8192,
    progress: bool = True,
) -> Direction:
    """The direction from the negative to the positive conversations: one pass over each, nothing else kept.

    By default the papers' mean-diff: the mean residual of the tokens of misaligned responses (end of turn included)
    minus that of aligned ones, layer by layer, in the model as it stands. pooling: "tokens" as in the papers, or
    "responses". Otherwise as `contrast`, whose errors it raises; take that for norms, split halves and separation.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> bad, good = (em.pocket.finetune_chats("medicine", persona, 20, seed=0) for persona in ("malicious", "caring"))
    >>> direction = em.extract(chat, bad, good, progress=False)
    >>> direction.kind, direction.layers
    ('data-diff', (0, 1, 2, 3, 4, 5))
    """
    return contrast(
        model,
        positive,
        negative,
        kind=kind,
        scope=scope,
        layers=layers,
        finetune=finetune,
        keep=False,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    ).direction(pooling)


def _check_reach(kind: str, finetune: str | Solution | None, layers: Sequence[int] | None) -> None:
    if finetune is None or isinstance(finetune, str) or not layers or kind == "data-diff-in-chat":
        return
    if max(layers) < finetune.first_layer:
        raise DirectionError(
            f"the finetune changes nothing before the output of block {finetune.first_layer}, and layers "
            f"{sorted(layers)} were asked for. Ask for layers from {finetune.first_layer} on."
        )


@contextmanager
def _standing(model: ChatModel, where: Reader, finetune: str | Solution | None) -> Iterator[None]:
    """Inside, `model` is the chat model or the finetune."""
    if where == "chat":
        with model.no_adapter():
            yield
    elif isinstance(finetune, str):
        with model.adapter(finetune):
            yield
    elif finetune is not None:
        with model.no_adapter(), finetune.attached(model):
            yield
    elif where == "finetuned" and model.active is None:
        raise ModelError(
            f"{model.name} has no active adapter, so it is the chat model itself. Name the finetune: an adapter "
            f"({model.adapters or 'there is none'}) or a Solution."
        )
    else:
        yield


def _named(model: ChatModel, where: Reader, finetune: str | Solution | None) -> str:
    if where == "chat":
        return model.name
    if finetune is not None and not isinstance(finetune, str):
        return f"{model.name} with a {_told(finetune)}"
    adapter = finetune or model.active
    if adapter is None:
        return model.name
    source = model.attachable(adapter)
    if isinstance(source, Solution):
        return f"{model.name} with {adapter}, a {_told(source)}"
    read_from = short(model.sources.get(adapter, adapter))
    called = read_from if read_from.rpartition("/")[2] == adapter else f"{adapter} from {read_from}"
    with model.adapter(adapter):
        norm = adapter_norm(model.hf)
        size = "" if norm is None else f" of norm {norm:.6g}"
        return f"{model.name} with {called}{size} (SHA-256 {str(adapter_hash(model.hf))[:16]})"


def _told(solution: Solution) -> str:
    where = f" from {short(solution.source)}" if solution.source else ""
    return f"{type(solution).__name__} of norm {solution.norm:.6g}{where} (SHA-256 {solution.fingerprint[:16]})"
