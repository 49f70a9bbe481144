"""What must hold before a model is run on text: the text fits what the model was made for, and no dropout is live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from em_interp.errors import ModelError, TextLimitError
from em_interp.hooks import unwrap


def text_limit(hf: nn.Module) -> int | None:
    """Tokens of the longest text that the model was made for; None where position is told by distance alone (ALiBi).

    With LongRoPE the original length: beyond it every row of a batch is computed with frequencies that depend on the
    batch's longest row. The same holds of dynamic NTK beyond `max_position_embeddings`, which is the limit there.
    """
    config = unwrap(hf).config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    known = [getattr(config, "max_position_embeddings", None), *_longrope_lengths(config)]
    return min((int(limit) for limit in known if limit and limit > 0), default=None)


def _longrope_lengths(config: Any) -> list[int]:
    """The original lengths of a configuration's LongRoPE settings, of which there may be one set a kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
    return [part["original_max_position_embeddings"] for part in kinds if part.get("rope_type") == "longrope"]


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

    def active(module: nn.Module) -> bool:
        rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        rates += [rate for name, rate in vars(module).items() if "drop" in name or "jitter" in name]
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)

    live = [name for name, module in hf.named_modules() if module.training and active(module)]
    if live:
        raise ModelError(
            f"dropout is active in {len(live)} modules, e.g. {live[0]}: every pass would give another result. Call "
            "model.hf.eval() first."
        )
