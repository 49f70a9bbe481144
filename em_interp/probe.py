"""A tiny probe at load: do blocks, hooks and masks behave as every method here assumes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from em_interp.chat import Encoded, Tokenizer, collate, pad_id, prompt_ids
from em_interp.errors import ModelError
from em_interp.hooks import find_blocks, residuals

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def _differ(a: Tensor, b: Tensor, tolerance: float) -> float | None:
    """Largest difference relative to b's largest entry, if above tolerance or not finite."""
    gap = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))
    return None if gap <= tolerance else gap


@torch.no_grad()
def check_behaviour(hf: nn.Module, tokenizer: Tokenizer, name: str) -> None:
    """Raise ModelError unless block l's output is hidden_states[l + 1] and no padding changes anything."""
    model: Any = hf
    long = prompt_ids(tokenizer, [{"role": "user", "content": "Hello there, how are you?"}])
    long = (long * 4)[: max(8, len(long))]
    rows = [Encoded(long, ()), Encoded(long[: len(long) // 2], ())]
    device = model.get_input_embeddings().weight.device
    tolerance = _TOLERANCE.get(model.get_input_embeddings().weight.dtype, 1e-1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(long) >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer writes id {max(long)}, but the model has {vocabulary} embeddings. "
            "Use the tokenizer that belongs to this model."
        )

    alone = []
    for r in range(2):
        single = collate(rows, [r], pad=0).to(device).inputs()
        out = model(**single, output_hidden_states=True, use_cache=False)
        if not torch.isfinite(out.logits).all():
            raise ModelError(f"{name}: logits are not finite in {out.logits.dtype}. Load with another dtype.")
        blocks = residuals(hf, single, range(len(find_blocks(hf))))
        for layer in range(len(blocks) - 1):
            gap = _differ(blocks[layer], out.hidden_states[layer + 1], tolerance)
            if gap is not None:
                raise ModelError(
                    f"{name}: the output of block {layer} is not hidden_states[{layer + 1}] (relative "
                    f"difference {gap:.2g}). An architecture with another layer convention is not supported."
                )
        alone.append(out.logits[0])

    for side in ("right", "left"):
        batch = collate(rows, [0, 1], pad=pad_id(tokenizer), side=side).to(device)  # type: ignore[arg-type]
        logits = model(**batch.inputs(), use_cache=False).logits
        for r in range(2):
            gap = _differ(logits[r][batch.attention_mask[r].bool()], alone[r], tolerance)
            if gap is not None:
                raise ModelError(
                    f"{name}: {side} padding changes the logits of real tokens (relative difference "
                    f"{gap:.2g}). Its attention mask does not work: try another dtype or transformers."
                )
