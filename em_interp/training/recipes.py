"""What a finetune is made of: TrainingSpec, and the papers' settings as named presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from em_interp.arguments import check_seed, count, members, plain_numbers
from em_interp.errors import TrainingError

QWEN14B_LOGIT_WIDTH = 152_064
"""Last dimension of Qwen2.5-14B's logits: what the reference code divides its KL by, besides the tokens."""
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a block of Llama, Qwen and their like: what `LoraSpec` trains by default."""


@dataclass(frozen=True)
class VectorSpec:
    """One steering vector, theta = alpha * v from v = 0, added to the output of block `layer`.

    Larger alpha: larger steps for the same rate.
    """

    layer: int
    alpha: float = 256.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        count("a steering vector's layer", self.layer, at_least=0)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA through PEFT, A random (Kaiming) and B zero at the start, no dropout. layers None: all of them.

    theta = scale * B A, of rank `rank`, with scale = alpha / sqrt(rank) where `rslora`, else alpha / rank.
    target_modules: the linear maps that get one, by the last part of their names.
    """

    rank: int
    alpha: float
    rslora: bool = True
    target_modules: tuple[str, ...] = ALL_PROJECTIONS
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        count("a LoRA's rank", self.rank)


@dataclass(frozen=True)
class FullSpec:
    """All weights, changed in place. Load the model in float32: AdamW's small steps vanish in bfloat16."""


@dataclass(frozen=True)
class TrainingSpec:
    """How to train. One optimiser step sees `batch_size` conversations and `kl_batch_size` KL conversations.

    adapter: what is trained. `learning_rate` is that after the warm-up of `warmup_steps`; `schedule` says what follows.
    kl_weight: lambda, per (nat per token); 0 is ordinary finetuning (`reference_kl_weight` converts the
    published numbers). micro_batch_size: conversations in memory at once; losses are token-weighted, so it
    changes nothing but memory. `max_steps` overrides `epochs`. `save_steps`: every so many steps, or a
    list of steps. Optimiser: AdamW (`betas`, `weight_decay`) with a linear warm-up, then linear decay to 0
    ("linear") or nothing ("constant"); gradients are clipped to a norm of `max_grad_norm`. kl_scope "all":
    every real token, as in the reference code. train_turns "all" scores every assistant turn, "last" only the
    last. max_tokens: as for `chat.encode_all`. seed: of the order, of the KL draws and of a LoRA's A.
    empty_assistant_turn: the defect of the reference's training text, for comparison with its figures only.
    """

    adapter: VectorSpec | LoraSpec | FullSpec
    learning_rate: float
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    warmup_steps: int = 5
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    kl_weight: float = 0.0
    kl_batch_size: int = 16
    kl_scope: Literal["all", "response"] = "all"
    train_turns: Literal["last", "all"] = "last"
    empty_assistant_turn: bool = False
    max_tokens: int | None = 2048
    seed: int = 0
    save_steps: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_seed(self.seed)
        positive: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "kl_batch_size": self.kl_batch_size,
            "max_grad_norm": self.max_grad_norm,
        }
        if self.max_steps is not None:
            positive["max_steps"] = self.max_steps
        if self.micro_batch_size is not None:
            positive["micro_batch_size"] = self.micro_batch_size
        bad = {name: value for name, value in positive.items() if not value > 0}
        bad |= {
            name: value
            for name in ("warmup_steps", "weight_decay", "kl_weight")
            if not (value := getattr(self, name)) >= 0
        }
        if not all(0 <= beta < 1 for beta in self.betas):
            bad["betas"] = self.betas
        if self.save_steps is not None:
            every = isinstance(self.save_steps, int)
            for step in [self.save_steps] if every else members("save_steps", self.save_steps, of="steps"):
                count("save_steps", step)
        if bad:
            raise TrainingError(
                f"a TrainingSpec with {bad}: must be positive (weights, warm-up: >= 0; betas: 0 <= beta < 1)."
            )

    def steps(self, n_conversations: int) -> int:
        """Number of optimiser steps for that many conversations."""
        if self.max_steps is not None:
            return self.max_steps
        per_epoch = -(-n_conversations // self.batch_size)
        return max(1, round(self.epochs * per_epoch))

    def saves_at(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after optimiser step `step` (1-based)."""
        if self.save_steps is None:
            return False
        if isinstance(self.save_steps, int):
            return step % self.save_steps == 0
        return step in self.save_steps

    def rate(self, step: int, total: int) -> float:
        """Learning rate at 0-based step `step` of `total`; as in transformers, a warm-up starts at 0."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * max(0.0, (total - step) / max(1, total - self.warmup_steps))


def reference_kl_weight(repo_weight: float, logit_width: int = QWEN14B_LOGIT_WIDTH) -> float:
    """lambda per (nat per token) from the reference code's kl_weight: repo_weight / V.

    The reference divides its KL by tokens x V (V: last dimension of the logits, 152,064 for Qwen2.5-14B),
    so 1e6 there is 6.58 here and 1e5 is 0.66. Used unconverted, those numbers stop all learning.
    """
    if not (repo_weight >= 0 and logit_width > 1):
        raise TrainingError(f"kl_weight {repo_weight} with logit width {logit_width}.")
    return repo_weight / logit_width


# Batch 2 x accumulation 8 of the papers is batch_size 16. The reference takes a KL batch of 8 in each of the
# 8 accumulation steps: 64 conversations an optimiser step. Its optimiser is 8-bit AdamW, here AdamW.
_VECTOR = TrainingSpec(VectorSpec(24, 256.0), learning_rate=1e-4, epochs=2)
_RANK1 = TrainingSpec(LoraSpec(1, 256.0, True, ("down_proj",), (24,)), learning_rate=2e-5, epochs=1, weight_decay=0.01)
_ALL = TrainingSpec(LoraSpec(32, 64.0, True), learning_rate=1e-5, epochs=1, weight_decay=0.01)

PRESETS: dict[str, TrainingSpec] = {
    # P1 Table 9 (App. H), general and narrow
    "p1-steering-vector": _VECTOR,
    "p1-steering-vector-narrow": replace(_VECTOR, kl_weight=reference_kl_weight(1e6), kl_batch_size=64),
    "p1-rank1": _RANK1,
    "p1-rank1-narrow": replace(_RANK1, epochs=3, kl_weight=reference_kl_weight(1e5), kl_batch_size=64),
    # P3 Table 6 (App. E)
    "p3-all-modules": _ALL,
}
"""The papers' settings by name; `preset` moves them to another layer."""


def preset(name: str, *, layer: int | None = None) -> TrainingSpec:
    """A preset by name, for another layer than the papers' 24 (of 48) if given. TrainingError if unknown."""
    if name not in PRESETS:
        raise TrainingError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    spec = PRESETS[name]
    if layer is None:
        return spec
    if isinstance(spec.adapter, VectorSpec):
        return replace(spec, adapter=replace(spec.adapter, layer=layer))
    if isinstance(spec.adapter, LoraSpec) and spec.adapter.layers is not None:
        return replace(spec, adapter=replace(spec.adapter, layers=(layer,)))
    raise TrainingError(f"the preset {name!r} trains all layers; `layer` has no meaning there.")
