"""Tiny probes at load: do weights, blocks, hooks, masks and adapters behave as every method here assumes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.errors import EmInterpError, ModelError, TextLimitError
from em_interp.models.architectures import check_architecture, find_blocks, text_limit, unwrap
from em_interp.models.chat import Batch, Encoded, Side, collate, pad_id, prompt_ids
from em_interp.models.hooks import residuals
from em_interp.models.templates import Tokenizer

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def tolerance_of(hf: Any) -> float:
    """What rounding may change in the logits, relative to the largest one, when the same is computed in another way."""
    return _TOLERANCE.get(hf.get_input_embeddings().weight.dtype, 1e-1)


def _differ(a: Tensor, b: Tensor, tolerance: float) -> float | None:
    """Largest difference relative to b's largest entry, if above tolerance or not finite."""
    gap = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))
    return None if gap <= tolerance else gap


def refuse_difference(
    a: Tensor, b: Tensor, tolerance: float, what: str, kind: type[EmInterpError] = ModelError
) -> None:
    """Raise `kind`, beginning with `what`, if two sets of logits differ by more than rounding."""
    gap = _differ(a, b, tolerance)
    if gap is not None:
        raise kind(f"{what}: they differ by {gap:.2g} of the largest logit on a short padded batch.")


def _rows(hf: Any, tokenizer: Tokenizer, name: str) -> list[Encoded]:
    """Two short prompts of different lengths."""
    long = prompt_ids(tokenizer, [{"role": "user", "content": "Hello there, how are you?"}])
    length = max(8, len(long))
    long = (long * 4)[: min(length, text_limit(hf) or length)]
    vocabulary = hf.get_input_embeddings().weight.shape[0]
    if max(long) >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer writes id {max(long)}, but the model has {vocabulary} embeddings. Use the "
            "tokenizer that belongs to this model."
        )
    return [Encoded(long, ()), Encoded(long[: len(long) // 2], ())]


def probe_batch(hf: Any, tokenizer: Tokenizer, name: str, side: Side = "left", also: Sequence[int] = ()) -> Batch:
    """Two short prompts of different lengths, padded, where the model's input goes. also: ids to put into the first."""
    long, short = _rows(hf, tokenizer, name)
    rows = [Encoded((*also, *long.ids), ()), short]
    return collate(rows, [0, 1], pad=pad_id(tokenizer), side=side).to(hf.get_input_embeddings().weight.device)


@torch.no_grad()
def logits_of(forward: Callable[..., Any], batch: Mapping[str, Tensor]) -> Float[Tensor, "real vocab"]:
    """float32 logits at the real tokens of a batch, from a transformers model, a PeftModel or a bridge."""
    if hasattr(forward, "original_model"):  # a bridge makes positions from the mask
        found = forward(batch["input_ids"], attention_mask=batch["attention_mask"])
    else:
        found = forward(**batch, use_cache=False).logits
    logits: Tensor = found[batch["attention_mask"].bool().to(found.device)].float()
    return logits


def check_weights(hf: nn.Module, name: str) -> None:
    """Raise ModelError if a weight is NaN or infinite, or a whole matrix of a block is zero (a file cut or filled)."""
    remedy = "The file is damaged, or the run that wrote it diverged: fetch it again, or take another checkpoint."
    for key, weight in hf.named_parameters():
        if not weight.is_meta and weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name}: {key} holds NaN or infinite values. {remedy}")
    for layer, block in enumerate(find_blocks(hf)):
        for key, weight in block.named_parameters():
            if not weight.is_meta and weight.ndim >= 2 and "bias" not in key and not bool(weight.any()):
                raise ModelError(f"{name}: {key} of block {layer} is zero throughout. {remedy}")


@torch.no_grad()
def check_behaviour(hf: nn.Module, tokenizer: Tokenizer, name: str, d_model: int) -> None:
    """Raise ModelError unless a model has all that its family's entry in `architectures` says, block l's output is
    hidden_states[l + 1], and no padding changes anything.
    """
    model: Any = hf
    check_architecture(hf)
    check_weights(hf, name)
    rows = _rows(hf, tokenizer, name)
    device, tolerance = model.get_input_embeddings().weight.device, tolerance_of(model)
    alone = []
    for r in range(2):
        single = collate(rows, [r], pad=0).to(device).inputs()
        try:
            out = model(**single, output_hidden_states=True, use_cache=False)
        except RuntimeError as error:  # no kernel for this dtype: experts in float64, for one
            raise ModelError(
                f"{name}: no pass in {model.dtype} ({(str(error).splitlines() or [''])[0]}). Load with another dtype, "
                "or set another attention or experts implementation."
            ) from error
        if not torch.isfinite(out.logits).all():
            raise ModelError(f"{name}: logits are not finite in {out.logits.dtype}. Load with another dtype.")
        blocks = residuals(hf, single, range(len(find_blocks(hf))))
        if blocks[0].shape[-1] != d_model:
            raise ModelError(
                f"{name}: its config says hidden_size {d_model}, its blocks write {blocks[0].shape[-1]} numbers a "
                "token. An architecture with such a residual stream is not supported."
            )
        for layer in range(len(blocks) - 1):
            gap = _differ(blocks[layer], out.hidden_states[layer + 1], tolerance)
            if gap is not None:
                raise ModelError(
                    f"{name}: the output of block {layer} is not hidden_states[{layer + 1}] (relative difference "
                    f"{gap:.2g}). An architecture with another layer convention is not supported."
                )
        alone.append(out.logits[0])

    sides: tuple[Side, ...] = ("right", "left")
    for side in sides:
        batch = probe_batch(model, tokenizer, name, side)
        logits = model(**batch.inputs(), use_cache=False).logits
        for r in range(2):
            gap = _differ(logits[r][batch.attention_mask[r].bool()], alone[r], tolerance)
            if gap is not None:
                raise ModelError(
                    f"{name}: {side} padding changes the logits of real tokens (relative difference {gap:.2g}). Its "
                    "attention mask does not work: try another dtype or transformers."
                )


def check_lengths(hf: nn.Module, lengths: Sequence[int], *, what: str = "conversation", room: int = 0) -> None:
    """Raise TextLimitError if a text (a number of tokens each) is longer than the model was made for.

    room: tokens that must fit after it.
    """
    limit = text_limit(hf)
    if limit is None:
        return
    for number, length in enumerate(lengths):
        if length + room > limit:
            size = f"{length} tokens{' before its answer' if room else ''}"
            raise TextLimitError(
                f"{what} {number} has {size}, and {type(unwrap(hf)).__name__} reads {limit}: it was not made for more. "
                "Shorten it or leave it out."
            )


def rooms_for(hf: nn.Module, lengths: Sequence[int], max_new_tokens: int) -> list[int]:
    """How many tokens can follow prompts of these lengths. Raises TextLimitError for a prompt that leaves no room."""
    limit = text_limit(hf)
    if limit is None:
        return [max_new_tokens] * len(lengths)
    check_lengths(hf, lengths, what="question", room=1)
    return [min(max_new_tokens, limit - length) for length in lengths]


def refuse_dropout(hf: nn.Module) -> None:
    """Raise ModelError if dropout, layer drop or router noise is active in the model or in an adapter on it."""

    def active(module):
        # type: (nn.Module) -> bool
        rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        rates += [rate for name, rate in vars(module).items() if "drop" in name or "jitter" in name]
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)

    live = [name for name, module in hf.named_modules() if module.training and active(module)]
    if live:
        raise ModelError(
            f"dropout is active in {len(live)} modules, e.g. {live[0]}: every pass would give another result. Call "
            "model.hf.eval() first."
        )
