"""Adapter features as real folders: PEFT itself makes them, every trained weight random and non-zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.matrix.families import D_MODEL

LAYER, ALPHA = 1, 3.0
"""Where the steering-vector folders act, and their alpha."""


class NotMade(Exception):
    """PEFT itself cannot make such an adapter for this family: there is no cell."""


def _linear(hf: Any) -> list[str]:
    """Names of the linear modules of the text model's blocks."""
    head = hf.get_output_embeddings()
    return [
        name
        for name, module in hf.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".1." in name and "vision" not in name
    ]


def _leaf(hf: Any, *, last: bool = False) -> str:
    """The leaf name of the first (or last) linear module of a block: the same in all blocks."""
    names = _linear(hf)
    if not names:
        raise NotMade("no linear module in its blocks")
    return names[-1 if last else 0].rpartition(".")[2]


def _lora(**settings: Any) -> Callable[[Any], Any]:
    def config(hf: Any) -> Any:
        given = {key: value(hf) if callable(value) else value for key, value in settings.items()}
        given = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **given}
        return LoraConfig(task_type="CAUSAL_LM", **given)

    return config


def _other(kind: Any, **settings: Any) -> Callable[[Any], Any]:
    def config(hf: Any) -> Any:
        given = {key: value(hf) if callable(value) else value for key, value in settings.items()}
        return kind(task_type="CAUSAL_LM", **given)

    return config


def _embedding(hf: Any) -> str:
    wanted = hf.get_input_embeddings()
    return next(name for name, module in hf.named_modules() if module is wanted).rpartition(".")[2]


def _head(hf: Any) -> str:
    wanted = hf.get_output_embeddings()
    return next(name for name, module in hf.named_modules() if module is wanted)


def _expert_weights(hf: Any) -> list[str]:
    """Leaf names of three-dimensional expert weights, from the parameter's name."""
    found = {".".join(name.split(".")[-2:]) for name, p in hf.named_parameters() if p.ndim == 3 and "experts" in name}
    if not found:
        raise NotMade("no expert weights")
    return sorted(found)[:1]


def _both_ends(hf: Any) -> list[str]:
    return [_leaf(hf), _head(hf)]


_TOKENS = [5, 40, 41]

FEATURES: dict[str, Callable[[Any], Any]] = {
    "lora": _lora(),
    "lora-one-module": _lora(r=1, target_modules=lambda hf: [_leaf(hf, last=True)], layers_to_transform=[LAYER]),
    "lora-rslora": _lora(use_rslora=True),
    "lora-dropout": _lora(lora_dropout=0.5),
    "lora-negative-alpha": _lora(lora_alpha=-6),
    "lora-rank-pattern": _lora(rank_pattern=lambda hf: {_leaf(hf): 3}),
    "lora-alpha-pattern": _lora(alpha_pattern=lambda hf: {_leaf(hf): 20}),
    "lora-layers": _lora(target_modules=lambda hf: [_leaf(hf)], layers_to_transform=[0, 2]),
    "lora-regex": _lora(target_modules=lambda hf: rf".*\.1\..*{_leaf(hf, last=True)}"),
    "lora-exclude": _lora(exclude_modules=lambda hf: [_leaf(hf)]),
    "lora-fan-in-fan-out": _lora(fan_in_fan_out=lambda hf: isinstance(hf.get_submodule(_linear(hf)[0]), Conv1D)),
    "lora-bias-only": _lora(bias="lora_only"),
    "lora-bias-all": _lora(bias="all"),
    "lora-b-bias": _lora(lora_bias=True),
    "lora-dora": _lora(use_dora=True),
    "lora-pissa": _lora(init_lora_weights="pissa"),
    "lora-olora": _lora(init_lora_weights="olora"),
    "lora-gaussian": _lora(init_lora_weights="gaussian"),
    "lora-orthogonal": _lora(init_lora_weights="orthogonal"),
    "lora-modules-to-save": _lora(modules_to_save=lambda hf: [_head(hf).rpartition(".")[2]]),
    "lora-tokens": _lora(trainable_token_indices=_TOKENS),
    "lora-embedding": _lora(target_modules=lambda hf: [_leaf(hf), _embedding(hf)]),
    "lora-head": _lora(target_modules=_both_ends),
    "lora-experts": _lora(target_parameters=_expert_weights, target_modules=lambda hf: [_leaf(hf)]),
    "lora-activated": _lora(alora_invocation_tokens=lambda hf: [40, 41]),
    "lora-replicated-layers": _lora(layer_replication=[[0, 2], [1, 3]], target_modules=lambda hf: [_leaf(hf)]),
    "adalora": _other(AdaLoraConfig, init_r=3, target_r=2, total_step=10, target_modules=lambda hf: [_leaf(hf)]),
    "loha": _other(LoHaConfig, r=2, alpha=4, target_modules=lambda hf: [_leaf(hf)]),
    "lokr": _other(LoKrConfig, r=2, alpha=4, target_modules=lambda hf: [_leaf(hf)]),
    "ia3": _other(
        IA3Config,
        target_modules=lambda hf: [_leaf(hf), _leaf(hf, last=True)],
        feedforward_modules=lambda hf: [_leaf(hf, last=True)],
    ),
    "oft": _other(OFTConfig, r=0, oft_block_size=4, target_modules=lambda hf: [_leaf(hf)]),
    "boft": _other(BOFTConfig, boft_block_size=4, target_modules=lambda hf: [_leaf(hf)]),
    "hra": _other(HRAConfig, r=2, target_modules=lambda hf: [_leaf(hf)]),
    "vera": _other(VeraConfig, r=2, target_modules=lambda hf: [_leaf(hf)]),
    "vblora": _other(VBLoRAConfig, r=2, num_vectors=4, vector_length=8, target_modules=lambda hf: [_leaf(hf)]),
    "fourier": _other(FourierFTConfig, n_frequency=20, target_modules=lambda hf: [_leaf(hf)]),
    "ln-tuning": _other(LNTuningConfig, target_modules=lambda hf: [_norm(hf)]),
    "trainable-tokens": _other(
        TrainableTokensConfig, token_indices=_TOKENS, target_modules=lambda hf: [_embedding(hf)]
    ),
    "prompt-tuning": _other(PromptTuningConfig, num_virtual_tokens=3),
    "prefix-tuning": _other(PrefixTuningConfig, num_virtual_tokens=3),
    "p-tuning": _other(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8),
}
VECTORS = ("vector", "vector-published")
"""Steering-vector folders: the package's format, and the one that the papers published."""
ALL = ("none", *FEATURES, *VECTORS, "two-active")
MEANT = ("lora", "lora-one-module", "lora-rslora", "lora-negative-alpha", "lora-layers", "lora-regex", "lora-exclude")
"""Features whose theta is scale * B A of linear modules, so that a solution can be read from them."""
PATTERNED = ("lora-rank-pattern", "lora-alpha-pattern")
"""The same, with a rank or a scale of each module's own."""


def _norm(hf: Any) -> str:
    names = [n for n, m in hf.named_modules() if "norm" in type(m).__name__.lower() and ".1." in n]
    if not names:
        raise NotMade("no norm in its blocks")
    return names[0].rpartition(".")[2]


@torch.no_grad()
def _shake(peft: Any, seed: int) -> None:
    """Random values in everything that the adapter saves."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in peft.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter += scale * noise


def make(feature: str, hf: Any, folder: Path, *, seed: int = 0, base: str) -> Path:
    """The folder of an adapter with this feature, made for `hf`, which is changed. Raises NotMade."""
    if feature in VECTORS:
        return _vector(feature, folder, seed, base)
    try:
        peft = get_peft_model(hf, FEATURES[feature](hf))
        _shake(peft, seed + 1)
        ids = torch.arange(30, 40).unsqueeze(0)
        peft.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        peft.save_pretrained(str(folder))
    except NotMade:
        raise
    except Exception as error:
        raise NotMade(f"PEFT: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    config = folder / "adapter_config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "base_model_name_or_path": base}))
    return folder


def vector_of(seed: int = 0) -> torch.Tensor:
    """What the steering-vector folders hold."""
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def _vector(feature: str, folder: Path, seed: int, base: str) -> Path:
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"adapter_type": "steering_vector", "base_model_name_or_path": base}
    if feature == "vector":
        save_file({"steering_vector": vector_of(seed)}, str(folder / "steering_vector.safetensors"))
        config |= {"layer_idx": LAYER, "alpha": ALPHA, "hidden_size": D_MODEL}
    else:
        stored = {"steering_vector": vector_of(seed), "layer_idx": LAYER, "alpha": ALPHA}
        torch.save(stored, folder / "steering_vector.pt")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
