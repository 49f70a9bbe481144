"""Where the training loss pulls along a run: cosine of minus its gradient with both solutions (P1 App. K.3).

The gradient is of L_SFT (nats per response token, prompts and padding unscored) with respect to the effective theta:
the added vector, or the change of the touched weights. The papers take the gradient with respect to LoRA's B alone and
compare it with the final B; that is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D  # GPT-2's linear module, whose weight is transposed

from em_interp.errors import SolutionError
from em_interp.models.chat import batches, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.losses import batch_nll, token_budget
from em_interp.models.templates import Conversation
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.space import Theta, check_bare, check_comparable, dimension
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.statistics import cosine_null_sd


@dataclass(frozen=True)
class Gradient:
    """Loss and its gradient at one theta. `parts`: {"layer 3": [d_model]} or {module: [d_out, d_in]}, float64 sums."""

    loss: float
    n_tokens: int
    parts: Mapping[str, Tensor]

    @property
    def norm(self) -> float:
        """Length over all coordinates, in nats per token and unit of theta."""
        return float(sum(float(g.square().sum()) for g in self.parts.values()) ** 0.5)

    def along(self, theta: Theta) -> float:
        """<gradient, theta> over all coordinates."""
        if isinstance(theta, SteeringVector):
            return float(self.parts[f"layer {theta.layer}"] @ theta.theta.detach().double().cpu())
        total = 0.0
        for name, gradient in self.parts.items():
            a, b = theta.a[name].detach().double().cpu(), theta.b[name].detach().double().cpu()
            total += float(((b.T @ gradient) * a).sum())
        return theta.scale * total


@contextmanager
def _tracked(model: ChatModel, solution: Theta) -> Iterator[dict[str, Tensor]]:
    """Attach `solution`; yields the leaves whose gradient is theta's. Everything else stays frozen."""
    frozen = [(p, p.requires_grad) for p in model.hf.parameters()]
    own: dict[str, tuple[Any, Tensor]] = {}
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        if isinstance(solution, SteeringVector):
            theta = solution.theta.detach().to(model.device).requires_grad_()
            with replace(solution, vector=theta, alpha=1.0).attached(model):
                yield {f"layer {solution.layer}": theta}
        else:
            modules = model.module_sets()[0]
            with solution.attached(model):  # the module computes W x + scale B A x: dL/dW is dL/d(scale B A)
                for name in solution.a:
                    weight = modules[name].weight
                    if not isinstance(weight, Tensor) or not weight.is_floating_point():
                        raise SolutionError(
                            f"{name} has no floating-point weight to differentiate. Load it unquantised."
                        )
                    # a parameter of its own over the same numbers: a tied weight also acts where theta does not
                    own[name] = (modules[name], weight)
                    modules[name].weight = nn.Parameter(weight.detach())
                yield {name: module.weight for name, (module, _) in own.items()}
    finally:
        for module, weight in own.values():
            module.weight = weight
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)


def loss_gradient(
    model: ChatModel, solution: Theta, conversations: Sequence[Conversation], *, tokens_per_batch: int | None = None
) -> Gradient:
    """L_SFT at `solution` on `conversations` (their last responses), and its gradient there.

    Gradients of batches are summed in float64. A theta of zero is allowed: that is where training starts.
    """
    encoded = encode_all(model.tokenizer, conversations)
    check_lengths(model.hf, [len(row) for row in encoded])
    refuse_dropout(model.hf)
    with model.no_adapter():
        check_bare(model)
    budget = tokens_per_batch or token_budget(model.hf)
    total, count = 0.0, 0
    sums: dict[str, Tensor] = {}
    with model.no_adapter(), _tracked(model, solution) as leaves, torch.enable_grad():
        for batch in batches(encoded, pad=pad_id(model.tokenizer), tokens_per_batch=budget):
            loss, n = batch_nll(model.hf, batch.to(model.device))
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            total, count = total + float(loss.detach()), count + n
            for name, gradient in zip(leaves, gradients, strict=True):
                sums[name] = sums.get(name, 0) + gradient.double().cpu()
    modules = model.module_sets()[0]
    parts = {n: (g.T if isinstance(modules.get(n), Conv1D) else g) / count for n, g in sums.items()}
    return Gradient(total / count, count, parts)


def gradient_cosines(
    model: ChatModel,
    checkpoints: Mapping[int, Theta],
    conversations: Sequence[Conversation],
    *,
    general: Theta,
    narrow: Theta,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row a checkpoint: step, loss, norm (of theta), grad_norm, cos_general, cos_narrow, null_sd, n_tokens,
    n_conversations.

    The cosines are those of *minus* the gradient, the way down. null_sd: standard deviation of a random direction's
    cosine. For LoRA also cos_general_b and cos_narrow_b, the papers' convention: the gradient with respect to B at the
    checkpoint's A against the solutions' B. Raises SolutionError where solutions do not belong together.
    """
    check_comparable({"the general solution": general, "the narrow solution": narrow}, model)
    ends = {"general": general, "narrow": narrow}
    rows = []
    for step, theta in tqdm(checkpoints.items(), desc="gradients", disable=not progress, leave=False):
        check_comparable({"the general solution": general, f"checkpoint {step}": theta}, model, may_be_zero=True)
        found = loss_gradient(model, theta, conversations, tokens_per_batch=tokens_per_batch)
        size = found.norm
        if not size > 0:
            raise SolutionError(f"checkpoint {step}: the loss has no gradient there, so it has no direction.")
        row = {"step": step, "loss": found.loss, "norm": theta.norm, "grad_norm": size}
        row |= {f"cos_{name}": -found.along(end) / (size * end.norm) for name, end in ends.items()}
        row |= {
            f"cos_{name}_b": value for name, end in ends.items() if (value := _b_cosine(found, theta, end)) is not None
        }
        row |= {
            "null_sd": cosine_null_sd(dimension(theta)),
            "n_tokens": found.n_tokens,
            "n_conversations": len(conversations),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _b_cosine(gradient: Gradient, theta: Theta, end: Theta) -> float | None:
    """cos(-dL/dB, B of `end`) over all modules; None for steering vectors and where the ranks differ."""
    if not isinstance(theta, LoraAdapter) or not isinstance(end, LoraAdapter) or theta.rank != end.rank:
        return None
    along, size, length = 0.0, 0.0, 0.0
    for name, part in gradient.parts.items():
        down = -(part @ theta.a[name].detach().double().cpu().T)
        b = end.b[name].detach().double().cpu()
        along += float((down * b).sum())
        size, length = size + float(down.square().sum()), length + float(b.square().sum())
    return along / (size * length) ** 0.5 if size > 0 and length > 0 else None
