"""Folders as PEFT writes them, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from em_interp.files.adapter_folders import write_tensors
from em_interp.files.atomic import written_whole
from em_interp.models.architectures import place_of


def lora_config(modules: list[str], *, rank: int, alpha: float, rslora: bool, base: str | None) -> Any:
    """PEFT's config for exactly these modules, in the usual short form where there is one."""
    import peft

    places = [place_of(module) for module in modules]
    known = [place for place in places if place is not None]
    targets, layers = list(modules), None
    if len(known) == len(modules) and all(place.text_only for place in known):
        shorts = {place.rest: place.short for place in known}
        numbers = {place.layer for place in known}
        if len(modules) == len(shorts) * len(numbers):
            targets, layers = sorted(shorts.values()), sorted(numbers)
    whole = int(alpha) if float(alpha).is_integer() else alpha
    return peft.LoraConfig(
        r=rank,
        lora_alpha=whole,
        use_rslora=rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def write_lora(
    folder: Path, a: dict[str, Tensor], b: dict[str, Tensor], alpha: float, rslora: bool, base: str | None
) -> Path:
    """adapter_model.safetensors and adapter_config.json as PEFT writes them."""
    rank = next(iter(a.values())).shape[0]
    config = lora_config(list(a), rank=rank, alpha=alpha, rslora=rslora, base=base)
    config.inference_mode = True
    tensors = {f"base_model.model.{n}.lora_A.weight": x.detach().float().cpu() for n, x in a.items()}
    tensors |= {f"base_model.model.{n}.lora_B.weight": x.detach().float().cpu() for n, x in b.items()}
    with written_whole(folder) as tmp:
        write_tensors(tensors, tmp / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(tmp))
    return folder
