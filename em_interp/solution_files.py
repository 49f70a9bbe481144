"""Folders of steering vectors and LoRA adapters: read, checked, and written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_interp.errors import SolutionError
from em_interp.files import written_whole

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
_LAYER = re.compile(r"^(?P<prefix>.*?\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")
# Before `layers.N` in models without an image tower, whose blocks would answer to the same short names.
_TEXT_ONLY = {"model.", "gpt_neox.", "transformer.", "model.decoder."}
# Anything beyond plain LoRA would make theta something else than scale * B A.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def layer_of(module: str) -> int | None:
    """The block that a module's name puts it in."""
    match = _LAYER.match(module)
    return int(match["layer"]) if match else None


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder."""
    if not folder.is_dir():
        raise SolutionError(f"{folder}: no such folder.")
    path = folder / "adapter_config.json"
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise SolutionError(
            f"{folder}: no adapter_config.json, found {names}. Give the folder of one adapter or "
            "checkpoint; some "
            "published repositories are empty."
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SolutionError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise SolutionError(f"{path}: expected a JSON object.")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path), device="cpu"))
    except Exception as error:
        raise SolutionError(f"{path}: not a readable safetensors file ({error}). Fetch it again.") from error


def _write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, str(path), metadata=metadata)


def write_vector(folder: Path, vector: Tensor, config: Mapping[str, Any]) -> Path:
    """steering_vector.safetensors and adapter_config.json."""
    with written_whole(folder) as tmp:
        _write_tensors({"steering_vector": vector}, tmp / "steering_vector.safetensors", {"format": "pt"})
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def read_vector(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """The raw vector [d_model] and its config, from safetensors or from a published steering_vector.pt."""
    config = read_config(folder)
    if config.get("adapter_type") != "steering_vector":
        raise SolutionError(f"{folder}: not a steering vector (adapter_type {config.get('adapter_type')!r}).")
    if (folder / "steering_vector.safetensors").is_file():
        tensors: dict[str, Any] = dict(read_tensors(folder / "steering_vector.safetensors"))
    elif (folder / "steering_vector.pt").is_file():
        path = folder / "steering_vector.pt"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (safe, typed)
        except Exception as error:
            raise SolutionError(f"{path}: cannot be read safely ({type(error).__name__}: {error}).") from error
        stored: dict[str, Any] = {key: tensors[key] for key in ("layer_idx", "alpha") if key in tensors}
        config = {**config, **stored}
    else:
        raise SolutionError(f"{folder}: no steering_vector.safetensors or .pt in it.")
    vector = tensors.get("steering_vector")
    if not isinstance(vector, Tensor):
        raise SolutionError(f"{folder}: no tensor 'steering_vector' in it, found {sorted(tensors)}.")
    width = config.get("hidden_size")
    if width is not None and vector.shape != (width,):
        raise SolutionError(f"{folder}: the vector is {tuple(vector.shape)}, its config says {width}.")
    return vector, config


def split_factors(state: Mapping[str, Tensor], source: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PEFT's tensors as ({module: A}, {module: B}), module names as in the transformers model."""
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in state.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise SolutionError(f"{source}: the tensor {key} is not a LoRA factor of a linear module.")
        parts[match["factor"]][match["module"]] = tensor.detach().float().cpu().clone()
    return parts["A"], parts["B"]


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """A, B and the config of a PEFT folder that holds plain LoRA."""
    config = read_config(folder)
    if config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise SolutionError(f"{folder}: not a LoRA adapter (peft_type {config.get('peft_type')!r}).")
    odd = {k: config[k] for k, plain in _PLAIN.items() if config.get(k, plain) not in (plain, None)}
    if odd:
        raise SolutionError(f"{folder}: not plain LoRA, it has {odd}. theta would not be scale * B A.")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise SolutionError(f"{folder}: no adapter_model.safetensors. Take a checkpoint that has weights.")
    a, b = split_factors(read_tensors(path), path)
    return a, b, config


def lora_config(modules: list[str], *, rank: int, alpha: float, rslora: bool, base: str | None) -> Any:
    """PEFT's config for exactly these modules, in the usual short form where there is one."""
    from peft import LoraConfig

    parsed = [_LAYER.match(module) for module in modules]
    targets, layers = list(modules), None
    if all(parsed):
        rests = {match["rest"] for match in parsed if match}
        numbers = {int(match["layer"]) for match in parsed if match}
        text_only = {match["prefix"] for match in parsed if match} <= _TEXT_ONLY
        if text_only and len(modules) == len(rests) * len(numbers):
            targets, layers = sorted(_short(rest) for rest in rests), sorted(numbers)
    whole = int(alpha) if float(alpha).is_integer() else alpha
    return LoraConfig(
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
