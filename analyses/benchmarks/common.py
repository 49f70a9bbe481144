"""What the benchmarks share: random models and conversations, and what a process took."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from em_interp.files.manifest import peak_memory_mb
from em_interp.models.chat_model import ChatModel


def _word_tokenizer(n_words: int) -> Any:
    """One token a word, so that lengths are exact; ChatML."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(n_words))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast


def random_model(width: int, n_layers: int, n_words: int, seed: int) -> ChatModel:
    """A randomly initialised Qwen2 with heads of 64."""
    torch.manual_seed(seed)
    tokenizer = _word_tokenizer(n_words)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return ChatModel(Qwen2ForCausalLM(config), tokenizer, name=f"random Qwen2 {width} x {n_layers}")


def random_chats(n: int, median: float, sigma: float, n_words: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of log-normal length (in words), a quarter of it the question."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(math.log(median), sigma, n), 8, 4096).astype(int)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, n_words, max(1, count)))

    return [
        [
            {"role": "user", "content": words(length // 4)},
            {"role": "assistant", "content": words(length - length // 4)},
        ]
        for length in lengths
    ]


def installed(package: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def process_peak_mb() -> float:
    """Largest resident size of this process so far, in MB, not counting the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would give the parent's where that was larger
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024 / 1e6
    return peak_memory_mb()
