"""Real PEFT adapter folders on tiny models, and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from em_interp.models.adapters import quiet_peft
from tests.tiny_models import make_hf

TARGETS = {
    "qwen2": ["q_proj", "down_proj"],
    "gemma2": ["v_proj", "up_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "down_proj"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc2"],
    "mixtral": ["q_proj"],
}


def shifted(peft: Any, seed: int = 0, size: float = 0.3) -> Any:
    """A PeftModel whose trainable weights moved at random, as training does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in peft.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=g).to(weight)
    return peft.eval()


def lora_folder(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """A LoRA adapter of PEFT's LoraConfig with `changes`, on `make_hf(family)`."""
    from peft import LoraConfig

    base = changes.pop("base_model_name_or_path", f"tiny-{family}")
    options = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **changes}
    return peft_folder(folder, LoraConfig(**options), family, seed, base=base)


def peft_folder(folder: Path, config: Any, family: str = "qwen2", seed: int = 0, *, base: str | None = None) -> Path:
    """An adapter of any PEFT config, on `make_hf(family)`."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    with quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = shifted(get_peft_model(make_hf(family), config), seed)
        for one in peft.peft_config.values():
            one.base_model_name_or_path = base or f"tiny-{family}"
        peft.save_pretrained(str(folder))
    return folder


def untrained(folder: Path) -> Path:
    """The same adapter with LoRA's B at zero, as before training."""
    path = folder / "adapter_model.safetensors"
    save_file({key: x * ("lora_B" not in key) for key, x in load_file(path).items()}, path)
    return folder


@torch.no_grad()
def peft_logits(folder: Path, batch: Mapping[str, Tensor], family: str = "qwen2") -> Tensor:
    """The oracle: logits of a fresh PeftModel over a fresh base."""
    from peft import PeftModel

    with quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(make_hf(family), str(folder)).eval()
    logits: Tensor = peft(**batch, use_cache=False).logits
    return logits
