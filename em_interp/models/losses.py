"""The two losses of narrow training (P1 sec. 3), each a token-weighted mean in nats.

L_SFT: -log p(token) over response tokens only, one mean over all tokens (never a mean of batch means).
L_KL: KL(chat || finetuned) over real tokens of out-of-domain conversations, pads excluded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from em_interp.errors import TrainingError
from em_interp.models.architectures import unwrap
from em_interp.models.chat import Batch, Encoded, batches
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import scored_logits

KLScope = Literal["all", "response"]
"""Where the KL to the chat model is taken: at every real token, or where a response token is predicted."""

# Rows of logits handled at once: 2,048 x 152,064 float32 is 1.2 GB at the largest vocabulary in use.
_LOGIT_ENTRIES = 2**28


def _chunks(logits: Float[Tensor, "n vocab"]) -> Iterator[slice]:
    rows = max(1, _LOGIT_ENTRIES // logits.shape[-1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def nll_sum(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """Sum of -log softmax(logits)[target], in float32 (or the logits' float64), chunk by chunk."""
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    total = logits.new_zeros((), dtype=wide)
    for rows in _chunks(logits):
        total = total + F.cross_entropy(logits[rows].to(wide), targets[rows], reduction="sum")
    return total


@torch.no_grad()
def nll_each(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log softmax(logits)[target] row by row, in at least float32, chunk by chunk."""
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    parts = [F.cross_entropy(logits[rows].to(wide), targets[rows], reduction="none") for rows in _chunks(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=wide)


def token_budget(hf: nn.Module) -> int:
    """Tokens a scoring batch may hold so that its logits stay near 1 GB in float32 (at most 8,192)."""
    vocabulary = int(unwrap(hf).get_output_embeddings().weight.shape[0])
    return max(256, min(8192, _LOGIT_ENTRIES // vocabulary))


def kl_sum(base: Float[Tensor, "n vocab"], other: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Sum over rows of KL(softmax(base) || softmax(other)), in nats; differentiable in `other`."""
    wide = torch.float64 if torch.float64 in (base.dtype, other.dtype) else torch.float32
    total = other.new_zeros((), dtype=wide)
    for rows in _chunks(other):
        reference = F.log_softmax(base[rows].detach().to(wide), dim=-1)
        ours = F.log_softmax(other[rows].to(wide), dim=-1)
        total = total + F.kl_div(ours, reference, reduction="sum", log_target=True)
    return total


def kl_positions(batch: Batch, scope: KLScope) -> Bool[Tensor, "batch token"]:
    """Where the KL is taken: every real token, as in the reference code, or where responses are predicted."""
    if scope == "all":
        return batch.attention_mask.bool()
    if scope == "response":
        return batch.predicting()
    raise TrainingError(f"kl_scope {scope!r}: 'all' (real tokens) or 'response'.")


def batch_nll(hf: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], int]:
    """Sum of -log p over the batch's response tokens, and their number. The head runs only there."""
    targets = batch.targets()
    return nll_sum(scored_logits(hf, batch.inputs(), batch.predicting()), targets), targets.numel()


@torch.no_grad()
def response_loss(hf: nn.Module, encoded: Sequence[Encoded], *, pad: int, tokens_per_batch: int | None = None) -> float:
    """L_SFT of a model, with whatever is attached to it, in nats per response token."""
    if not sum(row.n_response for row in encoded):
        raise TrainingError("no response tokens to score: the loss set is empty or fully masked.")
    check_lengths(hf, [len(row) for row in encoded])
    refuse_dropout(hf)
    device = next(hf.parameters()).device
    budget = tokens_per_batch or token_budget(hf)
    total, count = 0.0, 0
    for batch in batches(encoded, pad=pad, tokens_per_batch=budget):
        loss, n = batch_nll(hf, batch.to(device))
        total, count = total + float(loss), count + n
    return total / count
