"""Folders of steering vectors and LoRA adapters: what is in them, read and checked."""

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
    plain_lora,
    read_config,
    read_tensors,
    scale_number,
    whole_number,
)
from em_interp.files.atomic import written_whole

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of DoRA's m, which is a vector and not a layer's weight."""
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file."""
    from safetensors.torch import save_file

    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, str(path), metadata=metadata)


def write_vector(folder: Path, vector: Tensor, config: Mapping[str, Any]) -> Path:
    """steering_vector.safetensors and adapter_config.json."""
    with written_whole(folder) as tmp:
        write_tensors({"steering_vector": vector}, tmp / "steering_vector.safetensors", {"format": "pt"})
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


def split_magnitudes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's m by module, of PEFT's tensors."""
    found = {}
    for key, tensor in state.items():
        module, _, rest = key.removeprefix("base_model.model.").partition(f".{MAGNITUDE}")
        if key.endswith(f"{MAGNITUDE}{rest}") and rest in ("", ".weight", ".default.weight"):
            found[module] = tensor.detach().float().cpu().flatten()
    return found


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], LoraConfig]:
    """A, B and the description of a PEFT folder that holds plain LoRA, of which theta = scale * B A is all."""
    config = plain_lora(folder, read_config(folder))
    a, b = split_factors(adapter_tensors(folder), folder)
    odd = sorted(n for n in a if a[n].ndim != 2 or a[n].shape[0] != config.rank_of(n))
    if odd:
        said = config.rank_of(odd[0])
        raise AdapterError(f"{folder}: its config says rank {said}, {odd[0]} has A {list(a[odd[0]].shape)}.")
    return a, b, config
