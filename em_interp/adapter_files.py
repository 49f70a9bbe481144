"""Reading models and adapters from folders and the hub, with every refusal explained."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from em_interp.adapter_config import (
    CONFIG,
    LoraConfig,
    VectorConfig,
    describe,
    listing,
    local,
    read_config,
    read_json,
    same_base,
)
from em_interp.errors import AdapterError, ChatTemplateError, InputFileError, ModelError
from em_interp.inputs import regular_file

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


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


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further word'}"


def _has_weights(folder: Path) -> bool:
    return any(path.exists() for pattern in _WEIGHTS for path in folder.glob(pattern))


def _hub_folder(source: str, revision: str | None) -> Path:
    """An adapter on the hub as a local folder: `owner/name` or `owner/name/checkpoints/checkpoint-N`."""
    from huggingface_hub import snapshot_download

    parts = source.split("/")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    prefix = f"{inner}/" if inner else ""
    patterns = [f"{prefix}{name}" for name in ("adapter_*", "steering_vector*", "*.json")]
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
        folder = _hub_folder(str(source), revision)
    if folder.is_file():
        raise AdapterError(f"{source}: a file. Give the folder that holds {CONFIG} and the weights.")
    config = read_config(folder)
    if not _has_weights(folder):
        raise AdapterError(
            f"{source}: an {CONFIG} but no weights, found {listing(folder)}. Take another checkpoint or repository."
        )
    return folder, describe(folder, config)


def base_of_adapter(source: str | Path, revision: str | None) -> str | None:
    """The base model's name if `source` is an adapter's folder or hub repository ('' if unnamed), else None."""
    folder = local(source)
    config_path = folder / CONFIG
    if not folder.exists():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # no such file or no such place: `load_weights` explains
            config_path = Path(hf_hub_download(str(source), CONFIG, revision=revision))
            folder = config_path.parent
    if not config_path.is_file() or (folder / "config.json").is_file():
        return None
    return describe(source, read_json(config_path)).base or ""


def usable_base(source: str | Path, base: str) -> str:
    """The recorded base of an adapter where it can be loaded as it stands. Raises ModelError for what cannot."""
    remedy = f"load({str(source)!r}, base=...), or --base on the command line"
    if not base:
        raise ModelError(f"{source}: an adapter that does not name its base. Give it: {remedy}.")
    if base.lower().endswith(("-bnb-4bit", "-bnb-8bit")):
        raise ModelError(
            f"{source}: trained on {base}, a quantised copy, whose activations differ from the model's. Give the model "
            f"itself: {remedy}."
        )
    if (base.startswith((".", "/")) or base.count("/") > 1) and not Path(base).is_dir():
        raise ModelError(f"{source}: trained on {base}, which is no folder here. Give the base: {remedy}.")
    return base


def load_weights(
    source: str | Path,
    *,
    dtype: torch.dtype | str,
    device_map: str | Mapping[str, int | str] | None,
    revision: str | None,
) -> tuple[nn.Module, Any]:
    """The transformers model (SDPA attention where the architecture has it) and tokenizer.

    Raises ModelError, also where the checkpoint lacks weights, has others than the model, or of other shapes, and what
    `inputs.regular_file` raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local(source)
    if folder.is_dir():
        found = listing(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{source}: no config.json, found {found}. Give a folder written by save_pretrained.")
        if not _has_weights(folder):
            raise ModelError(f"{source}: a config.json but no weights, found {found}.")
        if (folder / CONFIG).is_file():
            raise ModelError(
                f"{source}: holds a model and an adapter ({CONFIG}): it does not say which is meant. Put the adapter's "
                "files into a folder of their own."
            )
        for path in folder.iterdir():
            if path.exists() and not path.is_dir():
                regular_file(path)
        if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
            raise ModelError(
                f"{source}: no tokenizer, found {found}. Save it there too: tokenizer.save_pretrained(folder)."
            )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        if device_map is not None:
            options["device_map"] = device_map
        hf, report = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise ModelError(
            f"{source}: cannot be loaded ({_first_line(error)}). Give a folder with config, weights and tokenizer, or "
            "a hub name; an adapter goes into `adapter=`."
        ) from error
    _refuse_incomplete(source, report)
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"{source}: its tokenizer has no chat template. Use the chat (instruct) model, or add a "
            "chat_template.jinja to the folder."
        )
    return hf, tokenizer


def _refuse_incomplete(source: object, report: Mapping[str, Any]) -> None:
    """Refuse what transformers only reports: weights drawn at random, and weights left aside."""
    for kind, said in (
        ("mismatched_keys", "have other shapes than the model's"),
        ("missing_keys", "are missing, and would be drawn at random"),
        ("unexpected_keys", "have no place in the model"),
        ("error_msgs", "could not be read"),
    ):
        if report.get(kind):
            odd = sorted(map(str, report[kind]))
            raise ModelError(
                f"{source}: {len(odd)} of its weights {said}, e.g. {odd[0]}. The folder is incomplete, or its "
                "config.json belongs to other weights: fetch or save it again."
            )


def check_base(source: object, base: str | None, known_as: tuple[str, ...]) -> None:
    """Refuse an adapter whose recorded base is none of the names that the model in hand is known by."""
    if base and not same_base(base, *known_as):
        raise AdapterError(
            f"{source}: trained on {base}, but the model in hand is {known_as[0]}. Load that base, or, if it is the "
            "same model under another name, say so: any_base=True in Python, --any-base on the command line."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a .bin or .pt one without running its code. Raises AdapterError."""
    from safetensors.torch import load_file

    local(path)
    try:
        if not regular_file(path).stat().st_size:
            raise AdapterError(f"{path}: empty (0 bytes). Fetch it again.")
        if path.suffix == ".safetensors":
            found: Any = load_file(str(path), device="cpu")
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (safe, typed)
    except AdapterError:
        raise
    except InputFileError as error:
        raise AdapterError(str(error)) from error
    except Exception as error:
        kind = "safetensors" if path.suffix == ".safetensors" else "weights"
        raise AdapterError(
            f"{path}: not a readable {kind} file ({_first_line(error)}). It was cut or is of another format: fetch it "
            "again."
        ) from error
    if isinstance(found, Tensor):  # a vector saved by itself
        return {"steering_vector": found}
    if not isinstance(found, Mapping):
        raise AdapterError(f"{path}: expected tensors by name, found {type(found).__name__}.")
    return dict(found)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """A PEFT folder's tensors by their stored names. Raises AdapterError for none, unreadable or not finite ones."""
    paths = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    there = [path for path in paths if path.exists() or path.is_symlink()]
    if not there:
        raise AdapterError(f"{folder}: no adapter_model.safetensors, found {listing(folder)}. Take another checkpoint.")
    tensors = read_tensors(there[0])  # PEFT takes the first too
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{there[0]}: {key} holds NaN or infinite values. The run that made it diverged.")
    return tensors


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
