"""Direction files: safetensors with one tensor `layer.{l}` a layer, and what they say of themselves, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from em_interp.errors import BadValueError, MissingDataError, ShapeError, UnreadableFileError
from em_interp.files.atomic import atomic_path
from em_interp.files.inputs import regular_file

FORMAT_VERSION: Final = 1
"""Of a direction's file; others are refused."""
HOOK_POINT: Final = "blocks.{layer}.hook_out"
"""TransformerLens' name of the place, as the file says it."""
LAYER_CONVENTION: Final = "layer l (0-based) is the output of decoder block l"
"""What the file says of its layers' numbers."""
METADATA_KEY: Final = "em_interp"
"""Of the metadata of a direction's file: it holds a JSON object."""
_REQUIRED: Final = (
    *("format_version", "kind", "model", "model_revision", "hook_point", "layer_convention", "token_scope"),
    *("operation", "n_positive", "n_negative", "norms", "sources", "created_by"),
)


def write_direction(path: Path, rows: Mapping[int, Float[Tensor, " d_model"]], metadata: Mapping[str, Any]) -> None:
    """Write rows by layer, whole or not at all. Raises OutputError."""
    tensors = {f"layer.{layer}": row.clone() for layer, row in rows.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(metadata)})


def read_direction(path: Path) -> tuple[dict[str, Any], list[tuple[int, Float[Tensor, " d_model"]]]]:
    """What a direction file says of itself, and its rows, each with its layer, in order.

    Raises UnreadableFileError, MissingDataError or ShapeError.
    """
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(
            path, f"not a whole safetensors file ({error})", "copy or download it again"
        ) from error
    if raw is None:
        raise MissingDataError(
            path,
            "it carries no em_interp metadata, so its layers, hook point and model are unknown",
            "make it with Direction.save, which records them",
        )
    try:
        metadata = json.loads(raw)
    except json.JSONDecodeError as error:
        raise UnreadableFileError(
            path, f"its metadata is not JSON ({error})", "save it again with Direction.save"
        ) from error
    missing = [key for key in _REQUIRED if key not in metadata] if isinstance(metadata, dict) else list(_REQUIRED)
    if missing:
        raise MissingDataError(path, f"its metadata lacks {', '.join(missing)}", "save it again with Direction.save")
    for key, expected in (
        ("format_version", FORMAT_VERSION),
        ("hook_point", HOOK_POINT),
        ("layer_convention", LAYER_CONVENTION),
    ):
        if metadata[key] != expected:
            raise UnreadableFileError(
                path,
                f"its {key} is {metadata[key]!r}, and this version of em_interp reads {expected!r}",
                "convert it, or install the em_interp version that wrote it",
            )
    unknown = [name for name in tensors if not (name.startswith("layer.") and name.removeprefix("layer.").isdigit())]
    if unknown or not tensors:
        raise UnreadableFileError(
            path,
            f"tensors are named {sorted(tensors)}, not layer.0, layer.1, ...",
            "save it again with Direction.save",
        )
    widths = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ShapeError(
            path, f"layers have shapes {sorted(widths)}, not one shape [d_model]", "save it again with Direction.save"
        )
    rows = [(int(name.removeprefix("layer.")), row) for name, row in tensors.items()]
    return metadata, sorted(rows, key=lambda of: of[0])


def check_norms(path: Path, norms: Mapping[int, float], recorded: Mapping[str, float]) -> None:
    """Raise BadValueError where a row's norm is not what the file says it was."""
    for layer, norm in norms.items():
        said = recorded.get(str(layer))
        if said is None or abs(said - norm) > 1e-4 * max(1.0, norm):
            raise BadValueError(
                path,
                f"layer {layer} has norm {norm:.6g} but its metadata says {said}",
                "the file was altered after it was saved; copy or extract it again",
            )
