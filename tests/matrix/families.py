"""Model families as tiny random models from their real config classes: one line a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.matrix.templates import tokenizer
from tests.tiny_models import D_MODEL, SIZES, small_config

N_LAYERS = 3
_SIZES: dict[str, Any] = {**SIZES, "num_hidden_layers": N_LAYERS}


@dataclass(frozen=True)
class Family:
    """transformers' model type, the settings that it needs beyond the common ones, its template, and its blocks."""

    kind: str
    template: str = "chatml"
    settings: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"


_KV: dict[str, Any] = {"num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_KV, "head_dim": 8}
_MOE: dict[str, Any] = {
    **_KV,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
_YARN: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [4.0, 6.0, 8.0, 12.0],
    "original_max_position_embeddings": 64,
}
_DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_TEXT: dict[str, Any] = {
    **_HEAD,
    "model_type": "gemma3_text",
    **_SIZES,
    "vocab_size": 320,
    "sliding_window": 16,
}
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llama3", _KV),
    "mistral": Family("mistral", "mistral", {**_KV, "sliding_window": 16}),
    "qwen2": Family("qwen2", "chatml", {**_KV, "tie_word_embeddings": True}),
    "qwen3": Family("qwen3", "chatml-think", _HEAD),
    "gemma2": Family("gemma2", "gemma", {**_HEAD, "sliding_window": 16, "final_logit_softcapping": 5.0}),
    "gemma3": Family("gemma3_text", "gemma", {**_HEAD, "sliding_window": 16}),
    "gemma3-vision": Family(
        "gemma3",
        "gemma",
        {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
        "model.language_model.layers",
    ),
    "phi": Family("phi", "chatml-eos", _KV),
    "phi3": Family("phi3", "phi3", {**_KV, "sliding_window": None}),
    "phi3-longrope": Family("phi3", "phi3", {**_KV, "sliding_window": None, "rope_parameters": _YARN}),
    "llama-dynamic": Family("llama", "llama3", {**_KV, "rope_parameters": _DYNAMIC, "max_position_embeddings": 64}),
    "gpt2": Family("gpt2", "plain", {}, "transformer.h"),
    "gpt_neox": Family("gpt_neox", "zephyr", {}, "gpt_neox.layers"),
    "gpt_neo": Family(
        "gpt_neo",
        "chatml",
        {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3, "num_heads": 4, "window_size": 16},
        "transformer.h",
    ),
    "gptj": Family("gptj", "zephyr", {"rotary_dim": 4}, "transformer.h"),
    "falcon": Family("falcon", "plain", {"parallel_attn": True, "new_decoder_architecture": False}, "transformer.h"),
    "falcon-new": Family(
        "falcon", "chatml", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, "transformer.h"
    ),
    "bloom": Family("bloom", "zephyr", {}, "transformer.h"),
    "opt": Family("opt", "chatml", {"ffn_dim": 48, "word_embed_proj_dim": D_MODEL}, "model.decoder.layers"),
    "opt-projected": Family("opt", "chatml", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "olmo2": Family("olmo2", "zephyr", _KV),
    "stablelm": Family("stablelm", "zephyr", _KV),
    "starcoder2": Family("starcoder2", "chatml-eos", {**_KV, "sliding_window": None}),
    "granite": Family(
        "granite",
        "granite",
        {**_KV, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    ),
    "cohere": Family("cohere", "cohere", {**_KV, "logit_scale": 0.5}),
    "glm": Family("glm", "phi4", _HEAD),
    "diffllama": Family("diffllama", "llama3", _KV),
    "mpt": Family("mpt", "chatml", {"max_seq_len": 256, "expansion_ratio": 2}, "transformer.blocks"),
    "mixtral": Family("mixtral", "mistral", {**_MOE, "sliding_window": None}),
    "qwen2_moe": Family("qwen2_moe", "chatml", {**_MOE, **_SHARED}),
    "qwen3_moe": Family("qwen3_moe", "chatml-think", {**_MOE, "decoder_sparse_step": 1, "head_dim": 8}),
    "olmoe": Family("olmoe", "zephyr", _MOE),
    "gpt_oss": Family("gpt_oss", "harmony", {**_MOE, "head_dim": 8, "sliding_window": 16}),
    # recurrent and hybrid models: padding on the left enters their state
    "mamba": Family("mamba", "chatml", {}, "backbone.layers"),
    "lfm2": Family("lfm2", "chatml", {**_KV, "full_attn_idxs": [1]}),
    "recurrent_gemma": Family("recurrent_gemma", "gemma", {}),
}


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """The family's model in float32, in evaluation mode, every weight random and none at its initial 0 or 1."""
    family = FAMILIES[name]
    tok = tokenizer(family.template)
    config = AutoConfig.for_model(family.kind, **{**small_config(tok), **_SIZES, **family.settings, **changes})
    torch.manual_seed(seed)
    hf: Any = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    hf.config._name_or_path = f"tiny/{name}"
    return hf


def cast(hf: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in this dtype; tables of angles stay in float32, as in a loaded checkpoint."""
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)
    hf.config.dtype = dtype
    return hf
