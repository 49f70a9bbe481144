"""Hooks on a model's blocks that must fire and are always removed, and passes that end early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from em_interp.errors import HookError
from em_interp.models.architectures import find_blocks, unwrap

BlockFn = Callable[[Float[Tensor, "batch token d_model"]], Float[Tensor, "batch token d_model"] | None]
"""What a hook does with a block's output: gives back another, or None to leave it."""


def hook_name(layer: int) -> str:
    """TransformerLens' name of the place that this project calls layer `layer`."""
    return f"blocks.{layer}.hook_out"


def check_layer(layer: int, n_layers: int) -> int:
    """`layer` if the model has it. Negative numbers are refused: they hide off-by-one errors."""
    if isinstance(layer, bool) or not 0 <= layer < n_layers:
        raise HookError(f"layer {layer} asked of a model with {n_layers} blocks. Use a layer from 0 to {n_layers - 1}.")
    return layer


def hidden_of(output: object) -> Float[Tensor, "batch token d_model"]:
    """The residual stream in a block's output, which is a tensor or a tuple that starts with one."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise HookError(f"a block returned {type(output).__name__}, not a [batch, token, d_model] tensor.")
    return hidden


def with_hidden(output: object, hidden: Tensor) -> object:
    """A block's or MLP's output with another hidden state in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def tagged(hook: Callable[..., object], acts: Callable[[], str] | None = None) -> Callable[..., object]:
    """Mark a torch hook as this package's, so that `has_our_hooks` finds it.

    acts: a hash of what it does to the pass, for `weights.acting_hash`, empty if it only looks (`acts=str`); without it
    what acts cannot be told.
    """
    hook.em_interp = True  # type: ignore[attr-defined]
    hook.acts = acts  # type: ignore[attr-defined]
    return hook


def has_our_hooks(root: nn.Module) -> bool:
    """Whether any hook of this package is on `root` now (transformers puts its own hooks there too)."""
    return any(getattr(h, "em_interp", False) for m in root.modules() for h in m._forward_hooks.values())


@contextmanager
def firing(counts: Mapping[str, list[int]], handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove `handles` at the end whatever happens, then complain about counters that stayed at zero."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, count in counts.items() if not count[0]]
    if silent:
        raise HookError(
            f"no forward pass reached {', '.join(silent)}. Run the model inside the context, and through the "
            "same ChatModel that the hook was put on."
        )


@contextmanager
def block_hooks(
    block_sets: Sequence[Sequence[nn.Module]],
    functions: Mapping[int, BlockFn],
    *,
    must_fire: bool = True,
    acts: Mapping[int, Callable[[], str]] | None = None,
) -> Iterator[None]:
    """Call `functions[l]` with layer l's output in every pass; what it returns replaces the output.

    `block_sets` are lists of the same model's blocks: `ChatModel.block_sets()`, or `[find_blocks(hf)]`. Each
    function must fire on at least one of them, unless `must_fire` is false. Exceptions inside pass unchanged.
    acts: by layer, as for `tagged`.
    """
    counts: dict[str, list[int]] = {}
    handles: list[RemovableHandle] = []

    def hook_for(layer, count):
        # type: (int, list[int]) -> Callable[..., object]
        function = functions[layer]

        def hook(_module, _args, output):
            # type: (nn.Module, object, object) -> object
            count[0] += 1
            new = function(hidden_of(output))
            return output if new is None else with_hidden(output, new)

        return tagged(hook, (acts or {}).get(layer))

    try:
        for layer in functions:
            count = counts.setdefault(f"layer {layer}", [0])
            for blocks in block_sets:
                check_layer(layer, len(blocks))
                handles.append(blocks[layer].register_forward_hook(hook_for(layer, count)))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    with firing(counts if must_fire else {}, handles):
        yield


def add_to_hidden(hidden: Float[Tensor, "batch token d_model"], theta: Tensor) -> Tensor:
    """hidden + theta in the residual's dtype. theta: [d_model], or [batch, d_model], one row per sequence."""
    return hidden + theta.to(hidden.device, hidden.dtype).unsqueeze(-2)


@contextmanager
def head_sees_only(hf: nn.Module, positions: Bool[Tensor, "batch token"]) -> Iterator[None]:
    """Inside, the output head gets the residuals at `positions` only, so logits are [1, n_true, vocab].

    Whatever the architecture does to logits afterwards (Gemma-2's soft cap, a logit scale) still happens.
    """
    head = unwrap(hf).get_output_embeddings()
    if head is None:
        raise HookError(f"{type(unwrap(hf)).__name__} has no output head: it is not a causal language model.")
    count = [0]
    with firing({"the output head": count}, [head.register_forward_pre_hook(partial(_picked, positions, count))]):
        yield


def _picked(
    positions: Bool[Tensor, "batch token"], count: list[int], _module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    count[0] += 1
    return (rearrange(args[0][positions.to(args[0].device)], "scored d -> 1 scored d"), *args[1:])


def scored_logits(
    hf: nn.Module, batch: Mapping[str, Tensor], positions: Bool[Tensor, "batch token"]
) -> Float[Tensor, "n_scored vocab"]:
    """Logits at the true entries of `positions`, row by row; the head is not run anywhere else."""
    with head_sees_only(hf, positions):
        logits: Tensor = hf(**batch, use_cache=False).logits
    return logits[0]


def position_ids(attention_mask: Tensor) -> Tensor:
    """0-based positions of the real tokens, for either padding side (pads get 0)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def residuals(
    hf: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[int]
) -> dict[int, Float[Tensor, "batch token d_model"]]:
    """The residual stream at some layers in one pass. Holds all tokens: for small inputs only."""
    out: dict[int, Tensor] = {}

    def keep(layer):
        # type: (int) -> BlockFn
        def function(hidden):
            # type: (Tensor) -> None
            out[layer] = hidden.detach()

        return function

    with block_hooks([find_blocks(hf)], {layer: keep(layer) for layer in layers}):
        hf(**batch, use_cache=False)
    return out


class EndPass(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


def stopping(functions: Mapping[int, BlockFn]) -> dict[int, BlockFn]:
    """The same functions, the one at the last layer ending the pass that `run_until` started."""
    last = max(functions)

    def end(hidden):
        # type: (Tensor) -> None
        functions[last](hidden)
        raise EndPass

    return {**functions, last: end}


@torch.no_grad()
def run_until(hf: nn.Module, batch: Mapping[str, Tensor], functions: Mapping[int, BlockFn]) -> None:
    """One pass in which `functions[l]` sees layer l's output, ended after the last of these layers.

    No later block runs, nor the final norm and the output head. What the functions return is not used.
    """
    with block_hooks([find_blocks(hf)], stopping(functions)), suppress(EndPass):
        hf(**batch, use_cache=False)


@torch.no_grad()
def run_bridge_until(bridge: Any, batch: Mapping[str, Tensor], functions: Mapping[int, BlockFn]) -> None:
    """`run_until` through a TransformerBridge, by TransformerLens' hook names."""
    counts = {hook_name(layer): [0] for layer in functions}

    def named(name, function):
        # type: (str, BlockFn) -> Callable[..., None]
        def read(hidden, *, hook):
            # type: (Tensor, Any) -> None
            del hook
            counts[name][0] += 1
            function(hidden)

        return read

    hooks = [(hook_name(layer), named(hook_name(layer), fn)) for layer, fn in stopping(functions).items()]
    with firing(counts, []), bridge.hooks(fwd_hooks=hooks), suppress(EndPass):
        bridge(batch["input_ids"], attention_mask=batch["attention_mask"], return_type=None)
