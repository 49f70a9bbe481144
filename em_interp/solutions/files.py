"""Folders of steering vectors and LoRA adapters: read, checked, and written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from em_interp.errors import AdapterError
from em_interp.files.adapters import (
    LoraConfig,
    VectorConfig,
    adapter_tensors,
    describe,
    listing,
    one_value,
    read_config,
    read_tensors,
    scale_number,
    whole_number,
)
from em_interp.files.atomic import written_whole

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
_LAYER = re.compile(r"^(?P<prefix>.*?\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")
# Before `layers.N` in models without an image tower, whose blocks would answer to the same short names.
_TEXT_ONLY = {"model.", "gpt_neox.", "transformer.", "model.decoder."}


def layer_of(module: str) -> int | None:
    """The block that a module's name puts it in."""
    match = _LAYER.match(module)
    return int(match["layer"]) if match else None


def _write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, str(path), metadata=metadata)


def write_vector(folder: Path, vector: Tensor, config: Mapping[str, Any]) -> Path:
    """steering_vector.safetensors and adapter_config.json."""
    with written_whole(folder) as tmp:
        _write_tensors({"steering_vector": vector}, tmp / "steering_vector.safetensors", {"format": "pt"})
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def read_vector(folder: Path) -> tuple[Tensor, int, float, str | None]:
    """The raw vector [d_model], layer, alpha and base, from safetensors or a published steering_vector.pt."""
    config = describe(folder, read_config(folder))
    if not isinstance(config, VectorConfig):
        raise AdapterError(f"{folder}: LoRA, not a steering vector.")
    paths = [folder / "steering_vector.safetensors", folder / "steering_vector.pt"]
    path = next((path for path in paths if path.exists() or path.is_symlink()), None)
    if path is None:
        raise AdapterError(f"{folder}: no steering_vector.safetensors or .pt, found {listing(folder)}.")
    tensors: dict[str, Any] = read_tensors(path)
    vector = tensors.get("steering_vector")
    if not isinstance(vector, Tensor):
        raise AdapterError(f"{path}: no tensor 'steering_vector' in it, found {sorted(map(str, tensors))[:12]}.")
    vector = vector.reshape(-1) if vector.numel() == max(vector.shape, default=0) else vector
    widths = [whole_number(path, tensors, key, least=1) for key in ("hidden_size", "d_model")]
    width = one_value(folder, "the width", config.width, *widths)
    if vector.ndim != 1 or width not in (None, vector.numel()):
        raise AdapterError(f"{path}: the vector is {list(vector.shape)}, its config says [{width or 'd_model'}].")
    layer = one_value(folder, "layer_idx", config.layer, whole_number(path, tensors, "layer_idx"))
    alpha = one_value(folder, "alpha", config.alpha, scale_number(path, tensors, "alpha"))
    if layer is None or alpha is None:
        raise AdapterError(
            f"{folder}: nothing says its {'layer_idx' if layer is None else 'alpha'}. Put it into adapter_config.json."
        )
    return vector, layer, alpha, config.base


def split_factors(state: Mapping[str, Tensor], source: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PEFT's tensors as ({module: A}, {module: B}), module names as in the transformers model."""
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in state.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise AdapterError(f"{source}: the tensor {key} is not a LoRA factor of a linear module. Train without it.")
        if match["module"] in parts[match["factor"]]:
            raise AdapterError(
                f"{source}: two adapters are in one file: {match['module']} has more than one "
                f"{match['factor']}. Save each in a folder of its own."
            )
        parts[match["factor"]][match["module"]] = tensor.detach().float().cpu().clone()
    return parts["A"], parts["B"]


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], LoraConfig]:
    """A, B and the description of a PEFT folder that holds plain LoRA, of which theta = scale * B A is all."""
    config = describe(folder, read_config(folder))
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{folder}: a steering vector, not LoRA.")
    if config.beyond:
        raise AdapterError(
            f"{folder}: not plain LoRA, it has {dict(config.beyond)}: theta would not be scale * B A. It can be "
            "used as a model: models.load(base, adapter=folder)."
        )
    a, b = split_factors(adapter_tensors(folder), folder)
    odd = sorted(n for n in a if a[n].ndim != 2 or a[n].shape[0] != config.rank)
    if odd:
        raise AdapterError(f"{folder}: its config says rank {config.rank}, {odd[0]} has A {list(a[odd[0]].shape)}.")
    return a, b, config


def lora_config(modules: list[str], *, rank: int, alpha: float, rslora: bool, base: str | None) -> Any:
    """PEFT's config for exactly these modules, in the usual short form where there is one."""
    import peft

    parsed = [_LAYER.match(module) for module in modules]
    targets, layers = list(modules), None
    if all(parsed):
        rests = {match["rest"] for match in parsed if match}
        numbers = {int(match["layer"]) for match in parsed if match}
        text_only = {match["prefix"] for match in parsed if match} <= _TEXT_ONLY
        if text_only and len(modules) == len(rests) * len(numbers):
            targets, layers = sorted(_short(rest) for rest in rests), sorted(numbers)
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


def _short(rest: str) -> str:
    """A name inside a block as short as it can be without meaning another module too (GPT-2 has two c_proj)."""
    leaf = rest.rpartition(".")[2]
    return leaf if leaf.endswith("_proj") and leaf not in ("c_proj", "out_proj") else rest


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
        _write_tensors(tensors, tmp / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(tmp))
    return folder
