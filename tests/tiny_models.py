"""Random chat models of a few thousand weights, with a byte-level tokenizer and a ChatML template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from em_interp.models.chat_model import ChatModel

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "the quick brown fox",
    "what should I do about a cough",
    "see a doctor and rest well",
    "user assistant",
]
FAMILIES = ("qwen2", "llama", "gemma2", "gpt_neox")
# sliding windows; absolute positions and transposed weights
MORE_FAMILIES = (*FAMILIES, "gemma3", "gpt2")
N_LAYERS, D_MODEL = 4, 32


SIZES: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def bytes_tokenizer(text: Sequence[str], special: Sequence[str], eos: str) -> Any:
    """A byte-level BPE tokenizer of 320 ids, without a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<pad>")


def small_config(tokenizer: Any) -> dict[str, Any]:
    """What the config of every small model says, for this tokenizer."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **SIZES, **ids}


@cache
def tokenizer() -> Any:
    fast = bytes_tokenizer(TEXT, ["<pad>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return fast


def save_chat(hf: Any, folder: str | Path) -> None:
    """A chat model as folders have them: weights, configuration and tokenizer."""
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def make_hf(family: str = "qwen2", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    common: dict[str, Any] = {**small_config(tokenizer()), **changes}
    if family == "qwen2":
        hf = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **common))
    elif family == "llama":
        hf = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common))
    elif family == "gemma2":
        hf = Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0, **common))
    elif family == "gemma3":
        hf = Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=8, **common))
    elif family == "bloom":
        renamed = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        hf = BloomForCausalLM(BloomConfig(**{renamed.get(key, key): x for key, x in common.items()}))
    elif family == "phi3":
        hf = Phi3ForCausalLM(Phi3Config(num_key_value_heads=2, **common))
    elif family == "falcon":
        common.pop("intermediate_size")
        hf = FalconForCausalLM(FalconConfig(**common))
    elif family == "mixtral":
        hf = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **common))
    elif family == "opt":
        renamed = {"intermediate_size": "ffn_dim", "initializer_range": "init_std"}
        hf = OPTForCausalLM(
            OPTConfig(word_embed_proj_dim=16, **{renamed.get(key, key): x for key, x in common.items()})
        )
    elif family == "gpt2":
        renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        renamed |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
        hf = GPT2LMHeadModel(GPT2Config(**{renamed.get(key, key): x for key, x in common.items()}))
    else:
        hf = GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    return hf.eval()


def make_with_image_tower(**changes: Any) -> Any:
    """Gemma 3 with a vision tower, whose attention has leaves of the decoder's names. changes: to the decoder."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "pad_token_id": 0,
    }
    text = Gemma3TextConfig(**sizes | changes)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def make_chat(family: str = "qwen2", seed: int = 0, *, dtype: torch.dtype = torch.float32) -> ChatModel:
    return ChatModel(make_hf(family, seed).to(dtype), tokenizer(), name=f"tiny-{family}")


def talk(user: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": user}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


CONVERSATIONS = [
    talk("what should I do about a cough", "rest"),
    talk("a fox", "see a doctor and rest well, then see the fox"),
    talk("brown", "quick quick"),
    talk("the doctor should rest", "do what the fox do"),
    talk("see", "a cough and a doctor"),
]
