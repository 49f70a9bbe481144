"""Reading models and adapters from folders and the hub, with every refusal explained."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from em_interp.errors import ChatTemplateError, ModelError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT calls deprecated parts of transformers; users cannot act on those warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # and PEFT sets it right
        yield


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ModelError with what is wrong."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def _listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"


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
        raise ModelError(
            f"{source}: neither a local folder nor a reachable hub repository ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name, the revision, HF_TOKEN and the network."
        ) from error


def read_adapter_config(source: str | Path, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The local folder of an adapter and its adapter_config.json. Refuses a folder without weights."""
    folder = Path(source)
    if not folder.exists():
        folder = _hub_folder(str(source), revision)
    config_path = folder / "adapter_config.json"
    if not folder.is_dir() or not config_path.is_file():
        found = _listing(folder) if folder.is_dir() else "a file"
        raise ModelError(
            f"{source}: no adapter_config.json, found {found}. Give the folder of one checkpoint "
            "(checkpoint-N); "
            "some published repositories are empty."
        )
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise ModelError(
            f"{source}: an adapter_config.json but no weights, found {_listing(folder)}. "
            "Take another checkpoint or repository."
        )
    return folder, read_json(config_path)


def base_of_adapter(source: str | Path, revision: str | None) -> str | None:
    """The base model's name if `source` is an adapter's folder or hub repository, else None."""
    folder = Path(source)
    config_path = folder / "adapter_config.json"
    if not folder.exists():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # no such file or no such place: `load_weights` explains
            config_path = Path(hf_hub_download(str(source), "adapter_config.json", revision=revision))
            folder = config_path.parent
    if not config_path.is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(config_path).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{source}: an adapter that does not name its base. Call load(base, adapter=...) instead.")
    return str(base)


def load_weights(
    source: str | Path,
    *,
    dtype: torch.dtype | str,
    device_map: str | Mapping[str, int | str] | None,
    revision: str | None,
) -> tuple[nn.Module, Any]:
    """The transformers model (SDPA attention where the architecture has it) and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{source}: no config.json, found {_listing(folder)}. Give a folder written by save_pretrained."
            )
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            raise ModelError(f"{source}: a config.json but no weights, found {_listing(folder)}.")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        if device_map is not None:
            options["device_map"] = device_map
        hf = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, **options)
    except Exception as error:
        raise ModelError(
            f"{source}: cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). Give a "
            "folder with "
            "config, weights and tokenizer, or a hub name; an adapter goes into `adapter=`."
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            f"{source}: its tokenizer has no chat template. Use the chat (instruct) model, or add a "
            "chat_template.jinja to the folder."
        )
    return hf, tokenizer


def short_name(name: str) -> str:
    """The last part of a model's name: 'unsloth/Qwen2.5-14B' and 'Qwen/Qwen2.5-14B' are one base."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def check_base(folder: Path, config: Mapping[str, Any], known_as: tuple[str, str]) -> None:
    """Refuse an adapter whose recorded base is none of the names that the model in hand is known by."""
    base = str(config.get("base_model_name_or_path") or "")
    if base and short_name(base) not in {short_name(known) for known in known_as}:
        raise ModelError(
            f"{folder}: trained on {base}, but the model in hand is {known_as[0]}. Load that base, or pass "
            "any_base=True if it is the same model under another name."
        )


def add_peft(hf: nn.Module, peft: Any, name: str, folder: Path, config: Mapping[str, Any], *, model_name: str) -> Any:
    """Inject a PEFT adapter into `hf`, frozen, and return the PeftModel (`peft` if there is one already).

    Refuses an adapter whose tensors do not all have a place.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    base = str(config.get("base_model_name_or_path") or "")
    try:
        with quiet_peft():
            if peft is None:
                peft = PeftModel.from_pretrained(hf, str(folder), adapter_name=name)
            else:
                peft.load_adapter(str(folder), adapter_name=name)
    except Exception as error:
        raise ModelError(
            f"{folder}: does not fit {model_name} ({type(error).__name__}: {str(error).splitlines()[0]}). It "
            "belongs to "
            f"another base{f' ({base})' if base else ''}; reload the model before going on."
        ) from error
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        with safe_open(str(weights), "pt") as file:
            stored = set(file.keys())
        ours = set(get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False))
        if stored != ours:
            odd = sorted(stored ^ ours)
            raise ModelError(
                f"{folder}: {len(odd)} of its tensors have no counterpart in {model_name}, e.g. {odd[0]}. It "
                "belongs to another base; reload the model before going on."
            )
    return peft


def unbridge(bridge: Any) -> nn.Module:
    """A plain transformers model (SDPA attention) over the tensors of a TransformerBridge's model."""
    from accelerate import init_empty_weights

    wrapped = bridge.original_model
    config = copy.deepcopy(wrapped.config)
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        plain: nn.Module = type(wrapped)(config)
    tensors = {
        key.replace("._original_component", ""): value
        for key, value in wrapped.named_parameters(remove_duplicate=False)
    }
    for key, _ in list(plain.named_parameters(remove_duplicate=False)):
        if key not in tensors:
            raise ModelError(
                f"the bridge over {type(wrapped).__name__} keeps {key} in another place than transformers "
                "does. "
                "Load the model with em_interp.models.load and use its .bridge."
            )
        owner, _, leaf = key.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, tensors[key])
    return plain.to(next(iter(tensors.values())).device).eval()


def boot_bridge(root: nn.Module, tokenizer: Any, name: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge on `root`, which it rewires in place.

    TransformerLens reloads and edits the tokenizer (missing special tokens), so it gets one of its own. It picks its
    adapter by the class that a checkpoint's config names; a model built in memory names none.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    config: Any = root.config
    config.architectures = config.architectures or [type(root).__name__]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer.save_pretrained(folder)
        own = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(name, hf_model=root, tokenizer=own, dtype=dtype)
