"""Running only the blocks after a layer, from a residual that was computed once.

What a solution does not touch is the same in every step of a finetune and for every theta of a sweep: the
residual before its first layer and, for a KL, the chat model's own last residual. Both are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from em_interp.errors import HookError
from em_interp.models.architectures import find_blocks, last_mlp, unwrap
from em_interp.models.chat import Batch, Encoded, collate
from em_interp.models.hooks import EndPass, check_layer, hidden_of, scored_logits, with_hidden


@contextmanager
def replaced_up_to(
    blocks: Sequence[nn.Module],
    layer: int,
    residual: Float[Tensor, "batch token d_model"],
    *,
    as_tuple: bool,
) -> Iterator[None]:
    """Inside, blocks 0..layer do nothing and block `layer` puts out `residual`; forward hooks still run.

    as_tuple: whether this architecture's blocks return tuples. Blocks are restored whatever happens.
    """
    check_layer(layer, len(blocks))
    before = [block.__dict__.get("forward") for block in blocks[: layer + 1]]
    try:
        for number in range(layer + 1):
            blocks[number].forward = partial(_passing, residual if number == layer else None, as_tuple)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=False):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _passing(
    output: Tensor | None, as_tuple: bool, /, hidden_states: Tensor, *_args: object, **_kwargs: object
) -> object:
    """A block's forward that puts out what came in, or `output`."""
    result = hidden_states if output is None else output
    return (result,) if as_tuple else result


@contextmanager
def last_mlp_sees_only(hf: nn.Module, positions: Bool[Tensor, "row token"]) -> Iterator[None]:
    """Inside, the last MLP runs at `positions` only; elsewhere it puts out zeros, which nothing scored reads.

    BLOOM's takes the residual as a second argument, and adds it.
    """
    mlp = last_mlp(hf)
    handles: list[RemovableHandle] = []
    if mlp is not None:
        handles.append(mlp.register_forward_pre_hook(partial(_picked, positions)))
        handles.append(mlp.register_forward_hook(partial(_spread, positions)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _picked(positions: Bool[Tensor, "row token"], _module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        x[positions].unsqueeze(0) if isinstance(x, Tensor) and x.shape[:2] == positions.shape else x for x in args
    )


def _spread(
    positions: Bool[Tensor, "row token"], _module: nn.Module, _args: tuple[Tensor, ...], output: object
) -> object:
    hidden = hidden_of(output)
    whole = hidden.new_zeros(*positions.shape, hidden.shape[-1])
    whole[positions] = hidden[0]
    return with_hidden(output, whole)


class ResidualCache:
    """The unchanged model's residual at a few layers, per conversation, computed when first asked for.

    layers: which block outputs to keep. off: a context in which `hf` is the unchanged model. Beyond
    `max_bytes` nothing more is kept and rows are computed anew (bytes_left: what remains of it). Kept where the model
    runs, in its dtype. encoded, pad: the conversations and the id that pads them. blocks: the model's; as_tuple:
    whether they return tuples, known after the first pass.
    """

    def __init__(
        self,
        hf: nn.Module,
        encoded: Sequence[Encoded],
        layers: Sequence[int],
        *,
        pad: int,
        off: Callable[[], AbstractContextManager[Any]] = nullcontext,
        max_bytes: int = 2**31,
    ) -> None:
        self.hf = hf
        self.encoded = encoded
        self.layers = sorted(set(layers))
        self.pad = pad
        self.off = off
        self.blocks = find_blocks(hf)
        self.bytes_left = max_bytes
        self.rows: dict[int, dict[int, Tensor]] = {}
        self.as_tuple = False

    def get(self, batch: Batch) -> dict[int, Float[Tensor, "batch token d_model"]]:
        """{layer: residual} for a right-padded batch of these conversations; zeros at the pads."""
        missing = [i for i in batch.index if i not in self.rows]
        fresh = self._compute(missing, batch.input_ids.device) if missing else {}
        for i, row in fresh.items():
            size = sum(x.numel() * x.element_size() for x in row.values())
            if size <= self.bytes_left:
                self.bytes_left -= size
                self.rows[i] = row
        out: dict[int, Tensor] = {}
        for layer in self.layers:
            parts = [(self.rows.get(i) or fresh[i])[layer] for i in batch.index]
            out[layer] = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            if out[layer].shape[:2] != batch.input_ids.shape:
                raise HookError("a batch to run from a cached residual must be right-padded to its longest row.")
        return out

    @torch.no_grad()
    def _compute(self, index: Sequence[int], device: torch.device) -> dict[int, dict[int, Tensor]]:
        batch = collate(self.encoded, list(index), pad=self.pad).to(device)
        seen: dict[int, Tensor] = {}
        handles = [self.blocks[layer].register_forward_hook(partial(self._keep, seen, layer)) for layer in self.layers]
        try:
            with self.off():
                self.hf(**batch.inputs(), use_cache=False)
        except EndPass:
            pass
        finally:
            for handle in handles:
                handle.remove()
        lengths = [len(self.encoded[i]) for i in index]
        return {i: {layer: seen[layer][r, : lengths[r]].clone() for layer in self.layers} for r, i in enumerate(index)}

    def _keep(self, seen: dict[int, Tensor], layer: int, _module: nn.Module, _args: object, output: Any) -> None:
        self.as_tuple = isinstance(output, tuple)
        seen[layer] = hidden_of(output)
        if layer == self.layers[-1]:
            raise EndPass

    def logits(
        self, batch: Batch, layer: int, residual: Tensor, where: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "n_scored vocab"]:
        """Logits at `where` of a pass that starts from `residual`, the output of block `layer`."""
        with replaced_up_to(self.blocks, layer, residual, as_tuple=self.as_tuple):
            return scored_logits(self.hf, batch.inputs(), where)


class ModelEnd:
    """What follows the last block, as a function of residuals: final norm, output head, and whatever the
    architecture does to logits afterwards.

    hf: the model; blocks: its blocks; device: where its ids go; as_tuple: whether its blocks return tuples.
    """

    def __init__(self, hf: nn.Module, *, as_tuple: bool | None = None) -> None:
        self.hf = hf
        self.blocks = find_blocks(hf)
        self.device = unwrap(hf).get_input_embeddings().weight.device
        self.as_tuple = self._detect() if as_tuple is None else as_tuple

    @torch.no_grad()
    def _detect(self) -> bool:
        """Whether blocks return tuples, seen in a pass over one token."""
        seen: list[bool] = []
        handle = self.blocks[0].register_forward_hook(lambda _m, _a, output: seen.append(isinstance(output, tuple)))
        try:
            self.hf(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    def logits(self, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Logits of rows of the last block's output."""
        n = residual.shape[0]
        nothing = torch.zeros(n, 1, dtype=torch.long, device=residual.device)
        each_a_text = rearrange(residual, "n d -> n 1 d")
        with replaced_up_to(self.blocks, len(self.blocks) - 1, each_a_text, as_tuple=self.as_tuple):
            out = self.hf(
                input_ids=nothing, attention_mask=torch.ones_like(nothing), position_ids=nothing, use_cache=False
            )
        return rearrange(out.logits, "n 1 vocab -> n vocab")
