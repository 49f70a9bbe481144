"""Folders as PEFT writes them, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

from torch import Tensor

from em_interp.files.adapter_folders import MAGNITUDE, write_tensors
from em_interp.files.atomic import written_whole
from em_interp.models.architectures import place_of


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool, base: str | None, dora: bool = False
) -> Any:
    """PEFT's config for exactly these modules, in the usual short form where there is one."""
    import peft

    modules = list(ranks)
    places = [place_of(module) for module in modules]
    known = [place for place in places if place is not None]
    targets, layers = list(modules), None
    if len(known) == len(modules) and all(place.text_only for place in known):
        shorts = {place.rest: place.short for place in known}
        numbers = {place.layer for place in known}
        if len(modules) == len(shorts) * len(numbers):
            targets, layers = sorted(shorts.values()), sorted(numbers)
    whole = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    rank, alpha = mode(ranks.values()), mode(whole.values())
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        layers_to_transform=layers,
        rank_pattern=_others(ranks, rank),
        alpha_pattern=_others(whole, alpha),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def _others(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Those of modules that have another value than the usual one; longer names first, since PEFT matches their ends.

    Where a module of the usual value ends in the name of one that has another, it is named too.
    """
    names = [name for name, value in values.items() if value != usual]
    names += [name for name in values if any(name.endswith(f".{other}") for other in names)]
    return {name: values[name] for name in sorted(names, key=len, reverse=True)}


def write_lora(
    folder: Path,
    factors: Mapping[str, Mapping[str, Tensor]],
    alphas: Mapping[str, float],
    rslora: bool,
    base: str | None,
) -> Path:
    """adapter_model.safetensors and adapter_config.json as PEFT writes them.

    factors: {"lora_A": {module: A}, "lora_B": {module: B}}, and of DoRA `MAGNITUDE`.
    """
    ranks = {name: x.shape[0] for name, x in factors["lora_A"].items()}
    dora = MAGNITUDE in factors
    config = lora_config(ranks, alphas, rslora=rslora, base=base, dora=dora)
    config.inference_mode = True
    tensors = {
        f"base_model.model.{name}.{factor}{'' if factor == MAGNITUDE else '.weight'}": x.detach().float().cpu()
        for factor, by_module in factors.items()
        for name, x in by_module.items()
    }
    with written_whole(folder) as tmp:
        write_tensors(tensors, tmp / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(tmp))
    return folder
