"""Reading models and adapters from folders and the hub, with every refusal explained."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from em_interp.errors import ChatTemplateError, ModelError, UsageError
from em_interp.files.adapters import (
    CONFIG,
    _first_line,
    describe,
    listing,
    local,
    read_json,
)
from em_interp.files.base_names import generic_name
from em_interp.files.inputs import regular_file
from em_interp.models.adapters import _has_weights
from em_interp.models.chat_model import ChatModel
from em_interp.models.ranks import ranks

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


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

    folder = _model_folder(source)
    device_map = ranks().device(device_map)
    if isinstance(device_map, str):
        check_device(device_map)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        found = listing(folder)
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


def check_device(name: str) -> None:
    """Raise UsageError for a device map that is neither the name of a device here nor one of transformers' words."""
    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(
            f"device_map is {name!r:.40}: there is no such device here ({reason}). Give cpu, a device that "
            "`em-interp doctor` lists, or auto."
        ) from error


def _model_folder(source: str | Path) -> Path:
    """A model's folder, where it is one; a hub name as a path that is not there. Raises ModelError."""
    folder = local(source)
    if str(source).startswith((".", "/", "~")) and not folder.exists():
        raise ModelError(f"{source}: there is no such folder. Check the path; a name on the hub is OWNER/NAME.")
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
    return folder


def load_on_disk(source: str | Path, *, revision: str | None = None) -> Any:
    """The transformers model of a folder or hub name, its weights left in their files (`weights.own_tensor` reads one).

    Weights that transformers converts at load, such as fused experts, are written to a temporary folder. Raises
    ModelError as `load_weights`; no tokenizer is needed.
    """
    from transformers import AutoModelForCausalLM

    _model_folder(source)
    folder = tempfile.TemporaryDirectory(prefix="em_interp_")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    quiet = logging.getLogger("accelerate.big_modeling")
    before = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        hf, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype="auto",
            device_map={"": "disk"},
            offload_folder=folder.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:
        folder.cleanup()
        raise ModelError(
            f"{source}: cannot be loaded ({_first_line(error)}). Give a folder with config and weights, or a hub name."
        ) from error
    finally:
        quiet.setLevel(before)
    weakref.finalize(hf, folder.cleanup)
    _refuse_incomplete(source, report)
    return hf


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


def adapter_name(source: str | Path, hf: nn.Module) -> str:
    """What to call an adapter of a model: its folder, with the run's where that says nothing (`checkpoint-500`)."""
    folder = Path(source).resolve() if Path(source).exists() else Path(source)
    *above, last = [part for part in folder.parts if part != "checkpoints"]
    if generic_name(last) and above:
        last = f"{Path(above[-1]).name}-{last}"
    name = last.replace(".", "-")
    # PEFT strips ".NAME" wherever it stands in a tensor's key
    taken = {part for module, _ in hf.named_modules() for part in module.split(".")} | {"weight", "bias", "lora_"}
    return f"finetune-{name}" if any(part.startswith(name) for part in taken) else name


def load(
    name_or_path: str | Path,
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | Mapping[str, int | str] | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    any_base: bool = False,
    name: str | None = None,
    check: bool = True,
) -> ChatModel:
    """A ChatModel from a local folder or a hub name, with one adapter or several (`{name: source}`).

    A single adapter is named after its folder (`adapter_name`) and is active, of several the first. An adapter's folder
    or repository may be given alone: its base is read from its config, or is `base` where that names none, a folder of
    another machine, or a quantised copy. dtype "auto" is the checkpoint's own. `name`: what solutions trained on the
    model record as their base (default: the base's name). Raises ModelError with what is missing, ChatTemplateError
    where the tokenizer has no chat template.
    """

    recorded = base_of_adapter(name_or_path, revision)
    if recorded is not None:
        if adapter is not None:
            raise UsageError(f"{name_or_path} is itself an adapter. Give its base model's name, and it as `adapter`.")
        source = usable_base(name_or_path, recorded) if base is None else base
        any_base = any_base or base is not None
        name_or_path, adapter, adapter_revision, revision = source, name_or_path, revision, None
    elif base is not None:
        raise UsageError(f"{name_or_path} is a model, not an adapter: there is no base to give.")
    hf, tokenizer = load_weights(name_or_path, dtype=dtype, device_map=device_map, revision=revision)
    model = ChatModel(hf, tokenizer, name=name or str(name_or_path), check=check)
    if adapter is not None:
        named = adapter if isinstance(adapter, Mapping) else {adapter_name(adapter, model.hf): adapter}
        for position, (key, source) in enumerate(named.items()):
            model.add_adapter(key, source, revision=adapter_revision, any_base=any_base, activate=position == 0)
    return model
