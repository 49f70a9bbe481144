"""Mean residual streams of conversations: one pass, all layers, nothing kept that is not asked for.

Token scopes: `prompt` (everything before the response, generation prompt included), `last_prompt` (its last token),
`response` (first token after the generation prompt to the end of turn), `all`. Of several assistant turns the last is
the response. Poolings: "tokens" is the mean over the pool of tokens, where long responses weigh more (Convergent
Linear Representations, sec. 3.1, as its code does it); "responses" is the mean of per-response means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from em_interp.cards import ranges
from em_interp.directions.direction import TOKEN_SCOPES
from em_interp.directions.store import ActivationStore
from em_interp.errors import ActivationError, ChatTemplateError, StoreError
from em_interp.files.given import Source, chats, several
from em_interp.files.manifest import code_hash
from em_interp.files.tables import RunningTotals
from em_interp.models.chat import Encoded, Side, collate, encode, pad_id, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import check_layer, run_bridge_until, run_until
from em_interp.models.memory import run_in_batches
from em_interp.models.precision import exact, has_float64
from em_interp.models.ranks import Ranks, ranks
from em_interp.models.templates import Conversation, Tokenizer
from em_interp.models.weights import acting_hash

POOLINGS: Final = ("tokens", "responses")
"""What a mean is over: all tokens of all responses alike (the papers'), or all responses alike."""
_BY_SCOPE: Final = ("pooled", "averaged", "token_norms", "counts")
_UPCAST_BYTES: Final = 2**25
"""Half-precision residuals are widened at most this much at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """Means of the residual stream over a set of conversations, by token scope and layer."""

    model: str
    """Its name."""
    layers: tuple[int, ...]
    """0-based blocks; row i of every tensor below belongs to `layers[i]`."""
    pooled: Mapping[str, Float[Tensor, "present d_model"]]
    """Scope -> mean over the pool of tokens, float64."""
    averaged: Mapping[str, Float[Tensor, "present d_model"]]
    """Scope -> mean of per-response means, float64."""
    token_norms: Mapping[str, Float[Tensor, " present"]]
    """Scope -> mean L2 norm of a token's residual: the scale to hold a direction's norm against."""
    counts: Mapping[str, Int[Tensor, " n"]]
    """Scope -> number of tokens of each conversation."""
    questions: tuple[str, ...]
    """The last user message of each conversation: what intervals are clustered by."""
    fingerprint: str
    """SHA-256 of the token ids and spans."""
    _rows: Mapping[str, Float[Tensor, "present n d_model"]] | ActivationStore | None = None

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        scopes = ", ".join(self.pooled)
        return f"Activations({len(self)} conversations, {scopes} tokens at {ranges(self.layers)} of {self.model})"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that `of_state` makes the same of again. Not for those that are kept in a store."""
        if isinstance(self._rows, ActivationStore):
            raise ActivationError("these activations lie in a store already: read them there, with the same folder.")
        kept = {} if self._rows is None else self._rows
        parts = {name: getattr(self, name) for name in _BY_SCOPE} | {"rows": kept}
        tensors = {f"{part}.{scope}": x for part, by_scope in parts.items() for scope, x in by_scope.items()}
        note = {name: getattr(self, name) for name in ("model", "layers", "questions", "fingerprint")}
        return tensors, note

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> Activations:
        """What `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*_BY_SCOPE, "rows")}
        for name, x in tensors.items():
            part, _, scope = name.partition(".")
            parts[part][scope] = x
        return cls(
            model=note["model"],
            layers=tuple(note["layers"]),
            questions=tuple(note["questions"]),
            fingerprint=note["fingerprint"],
            _rows=parts.pop("rows") or None,
            **parts,
        )

    def _check(self, scope: str) -> None:
        if scope not in self.pooled:
            raise ActivationError(f"scope {scope!r} was not collected; there are {', '.join(self.pooled)}.")

    def mean(self, scope: str = "response", pooling: str = "tokens") -> Float[Tensor, "present d_model"]:
        """Mean residual at each layer, float64. pooling: "tokens" or "responses"."""
        self._check(scope)
        if pooling not in POOLINGS:
            raise ActivationError(f"pooling {pooling!r} is not known; use {' or '.join(POOLINGS)}.")
        return self.pooled[scope] if pooling == "tokens" else self.averaged[scope]

    def each(self, scope: str, layer: int) -> Float[Tensor, "n d_model"]:
        """Per-conversation means at one layer, float32, in the order given. Needs keep=True or a store."""
        self._check(scope)
        if layer not in self.layers:
            raise ActivationError(f"layer {layer} was not collected; there are {list(self.layers)}.")
        if self._rows is None:
            raise ActivationError("per-response means were not kept. Collect with keep=True, or into a store.")
        if isinstance(self._rows, ActivationStore):
            return self._rows.read(f"{scope}.{layer}", range(len(self)))
        return self._rows[scope][self.layers.index(layer)]


@dataclass(frozen=True)
class _Row:
    """A conversation, cut to the tokens that are needed. The response is [start, end)."""

    encoded: Encoded
    start: int
    end: int


def _read(tokenizer: Tokenizer, conversation: Conversation, scopes: Sequence[str]) -> _Row:
    if conversation and conversation[-1].get("role") == "assistant":
        whole = encode(tokenizer, conversation)
        start, end = whole.spans[-1]
        needed = len(whole) if "all" in scopes else end if "response" in scopes else start
        return _Row(Encoded(whole.ids[:needed], ()), start, min(end, needed))
    if "response" in scopes:
        raise ChatTemplateError("it does not end with an assistant message, so it has no response to read.")
    ids = prompt_ids(tokenizer, conversation)
    return _Row(Encoded(ids, ()), len(ids), len(ids))


def _read_all(model: ChatModel, conversations: Sequence[Conversation], scopes: Sequence[str]) -> list[_Row]:
    if not len(conversations):
        raise ActivationError("no conversations were given: there is nothing to average.")
    refuse_dropout(model.hf)
    rows = []
    for number, conversation in enumerate(conversations):
        try:
            rows.append(_read(model.tokenizer, conversation, scopes))
        except ChatTemplateError as error:
            raise ChatTemplateError(f"conversation {number}: {error}") from error
    check_lengths(model.hf, [len(row.encoded) for row in rows])
    return rows


def _question(conversation: Conversation) -> str:
    asked = [message["content"] for message in conversation if message["role"] == "user"]
    return asked[-1] if asked else ""


def masked_sums(
    hidden: Float[Tensor, "batch token d_model"], weights: Float[Tensor, "batch scope token"]
) -> tuple[Float[Tensor, "batch scope d_model"], Float[Tensor, "batch scope"]]:
    """Weighted sums over tokens of the residuals and of their L2 norms, in at least float32.

    Residuals in half precision are widened a few tokens at a time.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, length, width = hidden.shape
    weights = weights.to(hidden.device, wide)
    step = length if hidden.dtype == wide else max(1, _UPCAST_BYTES // (rows * width * 4))
    sums = torch.zeros(rows, weights.shape[1], width, dtype=wide, device=hidden.device)
    norms = torch.zeros(rows, weights.shape[1], 1, dtype=wide, device=hidden.device)
    for first in range(0, length, step):
        part = hidden[:, first : first + step].to(wide)
        weight = weights[:, :, first : first + step]
        sums.baddbmm_(weight, part)
        norms.baddbmm_(weight, torch.linalg.vector_norm(part, dim=-1, keepdim=True))
    return sums, norms[..., 0]


class _Collector:
    """Running totals over batches, and per-response means where they are kept."""

    def __init__(
        self, model: ChatModel, rows: Sequence[_Row], scopes: Sequence[str], layers: Sequence[int], *, keep: bool
    ) -> None:
        self.model, self.rows, self.scopes, self.layers = model, rows, scopes, layers
        self.encoded = [row.encoded for row in rows]
        starts, ends = torch.tensor([row.start for row in rows]), torch.tensor([row.end for row in rows])
        lengths = torch.tensor([len(row.encoded) for row in rows])
        counts = {"prompt": starts, "last_prompt": starts.clamp_max(1), "response": ends - starts, "all": lengths}
        self.counts = torch.stack([counts[scope] for scope in scopes], dim=1)
        for scope, count in zip(scopes, self.counts.T, strict=True):
            if not bool((count > 0).all()):
                empty = int((count == 0).nonzero()[0])
                raise ActivationError(f"conversation {empty} has no token in scope {scope!r}. Drop it.")
        self.totals: dict[int, list[Tensor]] = {}
        size = (len(layers), len(rows), model.d_model)
        self.kept = {scope: torch.zeros(size) for scope in scopes} if keep else None

    def forward(
        self, group: Sequence[int], side: Side, through: str, *, each: bool
    ) -> tuple[dict[int, list[Tensor]], dict[str, Tensor]]:
        """Totals over a batch by layer and, if `each`, the means of its rows under the store's names."""
        batch = collate(self.encoded, group, pad=pad_id(self.model.tokenizer), side=side).to(self.model.device)
        rows = [self.rows[i] for i in group]
        weights = batch.scope_weights([row.start for row in rows], [row.end for row in rows], self.scopes)
        counts = self.counts[list(group)].to(weights.device)
        totals: dict[int, list[Tensor]] = {}
        means: dict[int, tuple[Tensor, Tensor]] = {}

        def see(layer):
            # type: (int) -> Any
            def function(hidden):
                # type: (Tensor) -> None
                sums, norms = masked_sums(hidden, weights)
                wide, length = exact(sums), exact(norms)
                n = counts.to(wide.device)
                each_n = rearrange(n, "row scope -> row scope 1")
                parts = (wide, wide / each_n, length)
                totals[layer] = [reduce(part, "row scope ... -> scope ...", "sum") for part in parts]
                if each:
                    means[layer] = ((sums.to(wide.device) / each_n).float(), (norms.to(wide.device) / n).float())

            return function

        functions = {layer: see(layer) for layer in self.layers}
        if through == "bridge":
            run_bridge_until(self.model.bridge, batch.inputs(), functions)
        else:
            run_until(self.model.hf, batch.inputs(), functions)
        host = {layer: (a.cpu(), b.cpu()) for layer, (a, b) in means.items()}
        named = {f"{scope}.{layer}": x[:, s] for layer, (x, _) in host.items() for s, scope in enumerate(self.scopes)}
        if host:
            norms = torch.stack([host[layer][1] for layer in self.layers], dim=-1)
            named |= {f"{scope}.norms": norms[:, s] for s, scope in enumerate(self.scopes)}
        return totals, named

    def add(self, totals: Mapping[int, list[Tensor]]) -> None:
        for layer, parts in totals.items():
            if layer in self.totals:
                for total, part in zip(self.totals[layer], parts, strict=True):
                    total += part.to(total.device)
            else:
                self.totals[layer] = list(parts)

    def keep(self, group: Sequence[int], means: Mapping[str, Tensor]) -> None:
        """Hold the means of these rows where they are kept in memory."""
        for scope, kept in (self.kept or {}).items():
            for position, layer in enumerate(self.layers):
                kept[position, list(group)] = means[f"{scope}.{layer}"]

    def length(self, i: int) -> tuple[int, int]:
        """What rows are sorted by, so that all processes agree."""
        return len(self.encoded[i]), i

    def resumed(self, folder: str | Path, made_by: list[Any], n: int, us: Ranks) -> RunningTotals:
        """The totals of this process's `n` rows, with what a stopped run of the same has left in the folder."""
        whose = [us.number, us.n] if us.n > 1 else []
        return RunningTotals(folder, [acting_hash(self.model), code_hash(), *made_by, *whose], self.totals, n)

    def add_others(self, us: Ranks) -> None:
        """Make the totals, and the means that are kept in memory, those of all processes."""
        shape = (len(self.scopes), self.model.d_model)
        for layer in self.layers:
            none = [torch.zeros(size, dtype=torch.float64) for size in (shape, shape, shape[:1])]
            self.totals[layer] = [us.total(part) for part in self.totals.get(layer, none)]
        for kept in (self.kept or {}).values():
            kept.copy_(us.total(kept))

    def open_store(self, folder: str | Path, texts: str) -> ActivationStore:
        """The store in a folder. Raises StoreError where it is of another model, other texts or settings."""
        made_of = {
            "model": self.model.name,
            "revision": self.model.revision,
            "adapter": self.model.active,
            "acts": acting_hash(self.model),
            "dtype": str(self.model.dtype),
            "layers": list(self.layers),
            "scopes": list(self.scopes),
            "n": len(self.rows),
            "texts": texts,
        }
        us = ranks()
        made = ActivationStore(folder, made_of) if us.is_first else None  # the folder is made once
        us.wait()
        return made or ActivationStore(folder, made_of)

    def add_stored(self, store: ActivationStore) -> None:
        """Take the totals of what a store already holds from it."""
        done = sorted(store.where)
        n = self.counts[done].double()
        norms = {scope: store.read(f"{scope}.norms", done).double() for scope in self.scopes}
        for position, layer in enumerate(self.layers):
            means = torch.stack([store.read(f"{scope}.{layer}", done).double() for scope in self.scopes], dim=1)
            sizes = torch.stack([norms[scope][:, position] for scope in self.scopes], dim=1)
            parts = (means * rearrange(n, "row scope -> row scope 1"), means, sizes * n)
            totals = [reduce(part, "row scope ... -> scope ...", "sum") for part in parts]
            self.add({layer: [x.to(self.model.device) for x in totals] if has_float64(self.model.device) else totals})

    def check_stored(self, store: ActivationStore, side: Side, through: str) -> None:
        """Read one stored response again: other weights, adapters or interventions give another answer."""
        row = min(store.where, key=lambda i: (len(self.encoded[i]), i))
        _, again = self.forward([row], side, through, each=True)
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        for name, mean in again.items():
            before = store.read(name, [row])
            if not float((mean - before).norm()) <= tolerance * float(before.norm()):
                raise StoreError(
                    store.folder,
                    f"response {row} now gives another {name} than the stored one, so the model, its adapter or an "
                    "intervention differs from the run that made the store",
                    "give another folder, or restore that run's model and interventions",
                )


def check_readable(model: ChatModel, conversations: Sequence[Conversation], scopes: Sequence[str]) -> None:
    """Raise, before any pass, what `collect` raises for conversations that it cannot read."""
    if set(scopes) <= set(TOKEN_SCOPES):
        _read_all(model, conversations, scopes)


def _asked(model: ChatModel, scopes: Sequence[str], layers: Sequence[int] | None) -> tuple[list[str], list[int]]:
    """The scopes and layers to read, each once. Raises ActivationError for unknown scopes, and for none."""
    unknown = [scope for scope in scopes if scope not in TOKEN_SCOPES]
    if unknown or not scopes:
        raise ActivationError(f"token scopes {unknown or 'none'}: choose from {', '.join(TOKEN_SCOPES)}.")
    wanted = {
        int(check_layer(layer, model.n_layers)) for layer in (range(model.n_layers) if layers is None else layers)
    }
    if not wanted:
        raise ActivationError("no layers were asked for. Leave `layers` out to get all of them.")
    return list(dict.fromkeys(scopes)), sorted(wanted)


def collect(
    model: ChatModel,
    conversations: Source,
    *,
    scopes: Sequence[str] = ("response",),
    layers: int | Sequence[int] | None = None,
    keep: bool = False,
    store: str | Path | None = None,
    resume_in: str | Path | None = None,
    through: Literal["hf", "bridge"] = "hf",
    tokens_per_batch: int = 8192,
    side: Side = "right",
    progress: bool = True,
) -> Activations:
    """Mean residual stream of conversations at the output of every (or some) layers, in one pass.

    conversations: as `em_interp.chats` takes them. What is attached to the model acts. Length-sorted batches of at most
    `tokens_per_batch` tokens, made smaller where memory runs out; no block after the last wanted layer runs, nor the
    head; tokens after the last wanted one are not read. Sums are float32 over one response and float64 over responses.
    Beyond the forward pass the means need 32 bytes a layer, scope and unit of width. Inside `em_interp.data_parallel`
    several processes share the conversations.

    keep: hold per-response means in memory (float32, n x layers x scopes x d_model). store: keep them in this folder
    instead; a killed run goes on where it stopped. resume_in: without either, keep the running totals in this folder,
    from which a killed run of the same texts, weights and code goes on. through: "bridge" reads TransformerLens'
    `blocks.{l}.hook_out` (eager attention: slower).

    Conversations end with the assistant; for the prompt scopes and `all` they may end before it. Raises
    ActivationError, ChatTemplateError, TextLimitError, ModelError (active dropout), HookError (unknown layer),
    StoreError, MemoryLimitError or OutputError.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> chats = em.pocket.finetune_chats("medicine", "caring", 10, seed=0)
    >>> found = em.collect(chat, chats, layers=[2, 3], progress=False)
    >>> found.mean("response").shape, len(found)
    (torch.Size([2, 192]), 10)
    """
    scopes, wanted = _asked(model, scopes, None if layers is None else several(layers))
    conversations = chats(conversations)
    rows = _read_all(model, conversations, scopes)
    texts = hashlib.sha256(json.dumps([(r.encoded.ids, r.start, r.end) for r in rows]).encode()).hexdigest()
    collector = _Collector(model, rows, scopes, wanted, keep=keep and store is None)
    us = ranks()
    disk = None if store is None else collector.open_store(store, texts)
    if disk is not None and disk.where:
        collector.check_stored(disk, side, through)
        if us.is_first:
            collector.add_stored(disk)
    mine = us.share(sorted((i for i in range(len(rows)) if disk is None or i not in disk.where), key=collector.length))
    running = None
    if resume_in is not None and disk is None and not keep:
        made_by = [texts, wanted, scopes, tokens_per_batch, side, through]
        running = collector.resumed(resume_in, made_by, len(mine), us)
    done = [] if running is None else running.done
    todo = sorted(set(mine) - set(done))
    us.wait()  # before anyone adds to the store: all have seen what is there

    begun = len(rows) - len(mine) + len(done)
    hidden = not (progress and us.is_first)
    with tqdm(total=len(rows), initial=begun, desc="read", disable=hidden, leave=False) as bar:

        def run(group):
            # type: (list[int]) -> None
            totals, means = collector.forward(group, side, through, each=keep or disk is not None)
            if disk is not None:
                disk.write(group, means)
            collector.add(totals)
            collector.keep(group, means)
            if running is not None:
                running.keep(group)
            bar.update(len(group))

        run_in_batches(run, [len(row.encoded) for row in rows], tokens_per_batch, only=todo)
    if us.n > 1:
        collector.add_others(us)
        disk = None if store is None else collector.open_store(store, texts)
    return _finish(collector, conversations, texts, disk)


def _finish(
    collector: _Collector, conversations: Sequence[Conversation], texts: str, disk: ActivationStore | None
) -> Activations:
    pooled, averaged, norms = (
        torch.stack([collector.totals[layer][part].cpu() for layer in collector.layers], dim=1) for part in range(3)
    )
    counts = collector.counts.double()
    tokens = counts.sum(0)
    finite = torch.isfinite(pooled).all(-1).all(0) & torch.isfinite(averaged).all(-1).all(0)
    if not bool(finite.all()):
        bad = [layer for layer, ok in zip(collector.layers, finite.tolist(), strict=True) if not ok]
        raise ActivationError(
            f"{collector.model.name}: NaN or infinite activations at layers {bad} in {collector.model.dtype}. Load the "
            "model in bfloat16 or float32, and check what is attached to it."
        )
    named = list(enumerate(collector.scopes))
    return Activations(
        model=collector.model.name,
        layers=tuple(collector.layers),
        pooled={scope: pooled[s] / tokens[s] for s, scope in named},
        averaged={scope: averaged[s] / len(collector.rows) for s, scope in named},
        token_norms={scope: norms[s] / tokens[s] for s, scope in named},
        counts={scope: collector.counts[:, s] for s, scope in named},
        questions=tuple(_question(conversation) for conversation in conversations),
        fingerprint=texts,
        _rows=disk if disk is not None else collector.kept,
    )
