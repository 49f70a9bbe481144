"""What an adapter_config.json means: the one place that decides, by a list of what is understood.

A key is understood, or known to change nothing at inference, or it is refused. Names and meanings are those of PEFT's
`LoraConfig` and of the published steering vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from em_interp.errors import AdapterError, InputFileError
from em_interp.files import inputs
from em_interp.files.inputs import regular_file

CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter's."""
MERGE = (
    "Merge it into its base with PEFT (PeftModel.from_pretrained(base, adapter).merge_and_unload()), save the result "
    "with save_pretrained, and load that folder as a model"
)
"""What messages say to do with an adapter that only PEFT understands."""

# LoraConfig's keys that change no logit at inference: names, where the factors sit (their tensors say so again, and
# are checked), and what acts in training only.
_NO_EFFECT = frozenset(
    [
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    ]
)
# What PEFT applies in a way that theta = scale * B A does not express.
_BY_PEFT = frozenset(
    [
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
    ]
)
_SIZES = frozenset(["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
# Values that are understood, of keys that have others which are not. True and 1 are told apart.
_VALUES: Mapping[str, tuple[object, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "use_rslora": (True, False),
    "use_dora": (True, False),
    "lora_bias": (True, False),
}
# Understood only where they are not used.
_UNUSED = frozenset(
    [
        "layer_replication",
        "megatron_config",
        "velora_config",
        "alora_invocation_tokens",
        "use_qalora",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "ensure_weight_tying",
    ]
)
_WHY = {
    "bias": "it trains the base's own biases, so that the base cannot be had back",
    "init_lora_weights": "this initialisation rewrites the base's weights, so that the base cannot be had back",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "kasa_config": "it rewrites the base's weights",
    "layer_replication": "it rebuilds the base's blocks",
    "task_type": "only causal language models have chat answers",
}
_REMEDIES = {
    "init_lora_weights": "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    "task_type": "Take the adapter of a causal language model",
    "alora_invocation_tokens": "Take an adapter that acts on all tokens",
}
_VECTOR_KEYS = frozenset(
    [
        "adapter_type",
        "base_model_name_or_path",
        "base_model",
        "layer_idx",
        "alpha",
        "hidden_size",
        "d_model",
        "steering_vector_path",
    ]
)


@dataclass(frozen=True)
class VectorConfig:
    """alpha * vector [width], added to the output of block `layer`; None where the weights' file says it.

    base: the model's name as the file has it. by_peft, beyond and tokens: as in `LoraConfig`; none of it applies.
    """

    base: str | None
    layer: int | None
    alpha: float | None
    width: int | None
    by_peft: ClassVar[bool] = False
    beyond: ClassVar[Mapping[str, object]] = {}
    tokens: ClassVar[tuple[int, ...]] = ()


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: its rank and alpha, those of modules that have others, and under `beyond` what PEFT applies besides.

    ranks, alphas: by regular expression over the end of a module's name, of which the first that matches counts.
    base: the model's name as the file has it. rslora: scale is alpha / sqrt(rank). by_peft: whether PEFT attaches it.
    """

    base: str | None
    rank: int
    alpha: float
    rslora: bool
    by_peft: ClassVar[bool] = True
    beyond: Mapping[str, object] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return _matching(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of one module."""
        return _matching(self.alphas, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """alpha / sqrt(r) of one module with rsLoRA, else alpha / r."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens whose embeddings the adapter replaces."""
        found: Any = self.beyond.get("trainable_token_indices", [])
        return sorted({i for ids in found.values() for i in ids} if isinstance(found, dict) else found)


_Number = TypeVar("_Number", int, float)


def _matching(patterns: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    """PEFT's rule (`peft.utils.other.get_pattern_key`)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _unused(value: object) -> bool:
    return value is None or value is False or value in ([], {}, ())


def _number(where: object, config: Mapping[str, Any], key: str, *, whole: bool) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is {value!r}. Write a number there.")
    if whole and int(value) != value:
        raise AdapterError(f"{where}: {key} is {value!r}; it must be a whole number.")
    return float(value)


def whole_number(where: object, config: Mapping[str, Any], key: str, *, least: int = 0) -> int | None:
    """An integer of at least `least`, or None if absent. Raises AdapterError (true and false are no numbers)."""
    value = _number(where, config, key, whole=True)
    if value is not None and value < least:
        raise AdapterError(f"{where}: {key} is {value:g}; it must be at least {least}.")
    return None if value is None else int(value)


def scale_number(where: object, config: Mapping[str, Any], key: str) -> float | None:
    """A finite number that is not zero, or None if absent. Raises AdapterError."""
    value = _number(where, config, key, whole=False)
    if value == 0:
        raise AdapterError(f"{where}: {key} is 0, so theta is zero: it is no finetune. Take another checkpoint.")
    return value


def one_value(where: object, key: str, *values: Any) -> Any:
    """What several places say of one thing; None where all are silent. Raises AdapterError if they disagree."""
    said = [value for value in values if value is not None]
    if any(value != said[0] for value in said):
        raise AdapterError(f"{where}: its files say {key} = {' and '.join(map(repr, said))}. Make them agree.")
    return said[0] if said else None


def _base_name(where: object, *values: object) -> str | None:
    base = one_value(where, "base_model_name_or_path", *values)
    if base is not None and not isinstance(base, str):
        raise AdapterError(f"{where}: base_model_name_or_path is {base!r}; it must be a name.")
    return base or None


def _describe_vector(where: object, config: Mapping[str, Any]) -> VectorConfig:
    odd = sorted(key for key, value in config.items() if key not in _VECTOR_KEYS and value is not None)
    if odd:
        raise AdapterError(
            f"{where}: a steering vector with {odd[0]} = {config[odd[0]]!r}, which em_interp does not understand. "
            "Delete the key if the vector is alpha * vector, added at every token."
        )
    path = config.get("steering_vector_path")
    if path not in (None, "steering_vector.pt", "steering_vector.safetensors"):
        raise AdapterError(f"{where}: its vector lies in {path!r}. Rename that file to steering_vector.pt.")
    return VectorConfig(
        _base_name(where, config.get("base_model_name_or_path"), config.get("base_model")),
        whole_number(where, config, "layer_idx"),
        scale_number(where, config, "alpha"),
        one_value(where, "the width", *(whole_number(where, config, k, least=1) for k in ("hidden_size", "d_model"))),
    )


def _refuse(where: object, key: str, value: object) -> AdapterError:
    why = _WHY.get(key, "em_interp does not understand it")
    return AdapterError(f"{where}: {key} is {value!r}: {why}. {_REMEDIES.get(key, MERGE)}.")


def _describe_lora(where: object, config: Mapping[str, Any]) -> LoraConfig:
    for key, value in config.items():
        if key in _VALUES:
            if value is not None and not any(value == known and type(value) is type(known) for known in _VALUES[key]):
                raise _refuse(where, key, value)
        elif key in _UNUSED:
            if not _unused(value):
                raise _refuse(where, key, value)
        elif key not in _NO_EFFECT | _BY_PEFT | _SIZES and value is not None:
            raise _refuse(where, key, value)
    rank = whole_number(where, config, "r", least=1)
    alpha = scale_number(where, config, "lora_alpha")
    if rank is None or alpha is None:
        raise AdapterError(f"{where}: a LoRA adapter whose config lacks {'r' if rank is None else 'lora_alpha'}.")
    beyond = {key: config[key] for key in sorted(_BY_PEFT) if not _unused(config.get(key))}
    base = _base_name(where, config.get("base_model_name_or_path"))
    ranks = {key: int(value) for key, value in _pattern(where, config, "rank_pattern", whole=True).items()}
    alphas = _pattern(where, config, "alpha_pattern", whole=False)
    return LoraConfig(base, rank, alpha, bool(config.get("use_rslora")), beyond, ranks, alphas)


def _pattern(where: object, config: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, float]:
    """A rank_pattern or alpha_pattern. Raises AdapterError for what is no table of numbers by regular expression."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise AdapterError(f"{where}: {key} is {found!r}; it must be a table of modules.")
    said = {name: _number(where, found, name, whole=whole) for name in found}
    for name, value in said.items():
        try:
            re.compile(rf"(.*\.)?({name})$")
        except re.error as error:
            raise AdapterError(f"{where}: {key} has {name!r}, which is no regular expression ({error}).") from error
        if value is None or (whole and value < 1):
            raise AdapterError(f"{where}: {key} says {value} of {name}. Write a number there.")
    return {name: value for name, value in said.items() if value is not None}


def describe(where: object, config: Mapping[str, Any]) -> VectorConfig | LoraConfig:
    """What a config means. Raises AdapterError naming a key that is not understood, its value and what to do."""
    config = {key: value.value if isinstance(value, Enum) else value for key, value in config.items()}
    kind = config.get("adapter_type")
    if kind == "steering_vector":
        return _describe_vector(where, config)
    method = config.get("peft_type")
    if kind is None and method == "LORA":
        return _describe_lora(where, config)
    raise AdapterError(
        f"{where}: an adapter of kind {kind or method!r}; LoRA (peft_type 'LORA') and steering vectors (adapter_type "
        f"'steering_vector') are understood. {MERGE}; a method that adds tokens or prompts cannot be merged."
    )


def plain_lora(where: object, config: Mapping[str, Any], *, understood: Collection[str] = ()) -> LoraConfig:
    """As `describe`, of LoRA of which theta = scale * B A, and what is `understood` besides, is all.

    Raises AdapterError.
    """
    found = describe(where, config)
    if not isinstance(found, LoraConfig):
        raise AdapterError(f"{where}: a steering vector, not LoRA.")
    if more := {key: value for key, value in found.beyond.items() if key not in understood}:
        raise AdapterError(
            f"{where}: not plain LoRA, it has {more}: theta would not be scale * B A. It can be "
            "used as a model: models.load(base, adapter=folder)."
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises AdapterError with what is wrong."""
    try:
        found = inputs.read_json(path)
    except InputFileError as error:
        raise AdapterError(f"{path}: not a readable JSON file ({error.problem}).") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def listing(folder: Path) -> str:
    """The first names in a folder, for messages."""
    return ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"


def local(source: str | Path) -> Path:
    """A local path, which need not be there. Raises AdapterError for a link to nothing and for what cannot be read."""
    path = Path(source)
    try:
        if path.is_symlink() and not path.exists():
            raise AdapterError(f"{path}: a link to {path.readlink()}, which is not there. Mend the link.")
        if path.is_dir():
            (path / CONFIG).exists()
            next(path.iterdir(), None)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}). Check its name and permissions.") from error
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder. Raises AdapterError."""
    if not local(folder).is_dir():
        raise AdapterError(f"{folder}: no such folder.")
    path = local(folder / CONFIG)
    if not path.is_file() and (folder / "config.json").is_file():
        raise AdapterError(
            f"{folder}: no {CONFIG}, but a whole model. If it is a full finetune, read it with "
            "em_interp.solutions.load.load(folder, base=model), and give that to add_adapter."
        )
    if not path.is_file():
        raise AdapterError(
            f"{folder}: no {CONFIG}, found {listing(folder)}. Give the folder of one adapter or checkpoint "
            "(checkpoint-N); some published repositories are empty."
        )
    return read_json(path)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further word'}"


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
