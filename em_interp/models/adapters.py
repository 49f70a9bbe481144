"""PEFT adapters: from a folder or the hub into a model in hand, proved, and out again without a trace."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from em_interp.errors import AdapterError
from em_interp.files.adapters import (
    CONFIG,
    LoraConfig,
    VectorConfig,
    _first_line,
    adapter_tensors,
    describe,
    listing,
    local,
    read_config,
)
from em_interp.files.base_names import refuse_other_base

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT calls deprecated parts of transformers; users cannot act on those warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # and PEFT sets it right
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")  # LoRA's biases
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")  # nothing is merged here
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # add_peft refuses and says more
        yield


def _has_weights(folder: Path) -> bool:
    return any(path.exists() for pattern in _WEIGHTS for path in folder.glob(pattern))


def hub_folder(source: str, revision: str | None = None, *, model: bool = False) -> Path:
    """An adapter on the hub as a local folder: `owner/name` or `owner/name/checkpoints/checkpoint-N`.

    model: with a whole model's weights and tokenizer too. Raises AdapterError.
    """
    from huggingface_hub import snapshot_download

    parts = source.split("/")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    prefix = f"{inner}/" if inner else ""
    patterns = [f"{prefix}{name}" for name in ("adapter_*", "steering_vector*", "*.json")]
    patterns += [f"{prefix}{name}" for name in ("*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt") if model]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / inner
    except Exception as error:  # many kinds: network, permission, unknown repository or revision
        raise AdapterError(
            f"{source}: neither a local folder nor a reachable hub repository ({_first_line(error)}). Check the name, "
            "the revision, HF_TOKEN and the network."
        ) from error


def read_adapter_config(source: str | Path, revision: str | None = None) -> tuple[Path, VectorConfig | LoraConfig]:
    """The local folder of an adapter and what its config means. Refuses a folder without weights."""
    folder = local(source)
    if not folder.exists():
        folder = hub_folder(str(source), revision)
    if folder.is_file():
        raise AdapterError(f"{source}: a file. Give the folder that holds {CONFIG} and the weights.")
    config = read_config(folder)
    if not _has_weights(folder):
        raise AdapterError(
            f"{source}: an {CONFIG} but no weights, found {listing(folder)}. Take another checkpoint or repository."
        )
    return folder, describe(folder, config)


def check_base(source: object, base: str | None, known_as: tuple[str, ...]) -> None:
    """Refuse an adapter whose recorded base is none of the names that the model in hand is known by."""
    error = AdapterError(
        f"{source}: trained on {base}, but the model in hand is {known_as[0]}. Load that base, or, if it is the "
        "same model under another name, say so: any_base=True in Python, --any-base on the command line."
    )
    refuse_other_base(base, known_as, error)


@contextmanager
def unchanged_on_error(root: nn.Module) -> Iterator[None]:
    """If the block fails, every module in `root` gets back its submodules, parameters and other attributes."""
    kept = []
    for module in root.modules():
        own = vars(module)
        # what is filled in place keeps its identity: hooks are removed through it
        inside = [(value, copy.copy(value)) for value in own.values() if type(value) in (dict, OrderedDict, list, set)]
        kept.append((own, dict(own), inside))
    trainable = [(weight, weight.requires_grad) for weight in root.parameters()]
    try:
        yield
    except BaseException:
        for own, before, inside in kept:
            own.clear()
            own.update(before)
            for value, contents in inside:
                value.clear()
                value.extend(contents) if isinstance(value, list) else value.update(contents)
        for weight, flag in trainable:
            weight.requires_grad_(flag)
        raise


def _is_a_copy(hf: nn.Module, key: str, tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor is the base's own matrix, which PEFT saves beside LoRA on embeddings, and loads over the base's.

    Raises AdapterError if it is not the base's in hand.
    """
    module, _, kind = key.removeprefix("base_model.model.").partition(".base_layer.")
    if kind not in ("weight", "bias"):  # LoRA on the several matrices of a module of experts is nested, and no copy
        return False
    own = getattr(dict(hf.named_modules()).get(module), kind, None)
    if own is None or own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype)):
        raise AdapterError(
            f"{folder}: brings its own {module}, which is not the base's: loaded, it would change the base too. Save "
            "it again with save_embedding_layers=False."
        )
    return True


def add_peft(hf: nn.Module, peft: Any, name: str, folder: Path, *, model_name: str) -> Any:
    """Inject a PEFT adapter into `hf`, frozen, and return the PeftModel (`peft` if there is one already).

    Refuses an adapter whose tensors cannot be read, hold NaN, or do not all have a place.
    """
    from peft import PeftModel, get_peft_model_state_dict

    tensors = adapter_tensors(folder)
    stored = {key for key, tensor in tensors.items() if not _is_a_copy(hf, key, tensor, folder)}
    try:
        with quiet_peft():
            if peft is None:
                peft = PeftModel.from_pretrained(hf, str(folder), adapter_name=name)
            else:
                peft.load_adapter(str(folder), adapter_name=name)
            ours = set(get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False))
    except Exception as error:
        raise AdapterError(
            f"{folder}: does not fit {model_name} ({_first_line(error)}). It belongs to another base, or to another "
            "version of PEFT."
        ) from error
    if stored != ours:
        odd = sorted(stored ^ ours)
        where = model_name if odd[0] in stored else "its weights"
        raise AdapterError(
            f"{folder}: {len(odd)} of its tensors have no counterpart, e.g. {odd[0]} (not in {where}). It belongs to "
            "another base, or its config to other weights."
        )
    return peft


def _tuner_layers(root: nn.Module) -> Iterator[tuple[str, Any, set[str]]]:
    """PEFT's layers and wrappers in `root`: (name, layer, names of the adapters on it)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in root.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module, set(module._all_available_adapter_names())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module, set(module._adapters)


def _set_peft(root: nn.Module, name: str | None) -> None:
    """Make PEFT adapter `name` the active one in `root`, frozen; None switches all of them off."""
    for _, layer, adapters in _tuner_layers(root):
        if name in adapters:
            layer.set_adapter(name, inference_mode=True)
            layer._disable_adapters = False  # enable_adapters(True) would also make the adapter trainable
        else:
            layer.enable_adapters(False)


def _active_in(peft: Any) -> str:
    """The one adapter of a PeftModel that is active. Refuses what this package cannot switch on and off."""
    for name, config in peft.peft_config.items():
        describe(f"the PeftModel's adapter {name!r}", config.to_dict())
    active = list(peft.active_adapters)
    if len(active) != 1:
        raise AdapterError(
            f"the PeftModel has {len(active)} active adapters {active}. Choose one with peft.set_adapter(name), or "
            "join them with peft.add_weighted_adapter."
        )
    if any(getattr(layer, "merged_adapters", None) for _, layer, _ in _tuner_layers(peft)):
        raise AdapterError("the PeftModel has adapters merged into its weights. Call peft.unmerge_adapter() first.")
    return str(active[0])
