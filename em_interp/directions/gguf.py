"""Directions as GGUF control vectors, which llama.cpp and repeng add to the residual stream."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.directions.direction import Direction
from em_interp.errors import BadValueError, DirectionError, UnreadableFileError, UsageError
from em_interp.files.atomic import atomic_path
from em_interp.files.inputs import regular_file


def save_gguf(direction: Direction, path: str | Path, *, model_type: str) -> tuple[int, ...]:
    """Write a control vector and return the layers that it holds.

    Tensors are `direction.{l}`, one-dimensional float32, not normalised: a strength of 1 adds the direction as it is.
    The number is our layer l: llama.cpp adds `direction.{l}` to the output of its 0-based block l, repeng to that of
    the model's block l. llama.cpp has no place for number 0 and refuses a file with it, so **layer 0 is left out**.
    model_type: the architecture as transformers names it (`model.hf.config.model_type`), kept as a hint.

    Raises DirectionError where no layer is left, UsageError where the `gguf` package is absent, OutputError.

    >>> import torch
    >>> import em_interp as em
    >>> v = em.Direction(torch.ones(3, 4), layers=(0, 1, 2), kind="random")
    >>> em.save_gguf(v, "v.gguf", model_type="qwen2")
    (1, 2)
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "writing a GGUF control vector needs the gguf package: pip install 'em_interp[gguf]'."
        ) from error
    layers = tuple(layer for layer in direction.layers if layer > 0)
    if not layers:
        raise DirectionError("a control vector cannot hold layer 0, and this direction has no other layer.")
    with atomic_path(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", direction.at(layer).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return layers


def read_gguf(path: str | Path) -> tuple[str, dict[int, Float[Tensor, " d_model"]]]:
    """The architecture that a control vector is for, and its vectors by layer, as `save_gguf` writes them.

    Raises UsageError where the `gguf` package is absent, UnreadableFileError for what is no control vector,
    BadValueError for NaN.
    """
    found = regular_file(path)
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "reading a GGUF control vector needs the gguf package: pip install 'em_interp[gguf]'."
        ) from error
    try:
        reader = gguf.GGUFReader(found)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: torch.tensor(tensor.data.astype("float32")) for tensor in reader.tensors}
    except Exception as error:  # of many kinds, by what is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableFileError(found, f"not a whole GGUF file ({reason})", "write or copy it again") from error
    kind = fields.get("general.architecture")
    if kind != "controlvector" or not tensors or any(re.fullmatch(r"direction\.\d+", name) is None for name in tensors):
        raise UnreadableFileError(
            found, f"a GGUF file of {kind}, no control vector", "give what `em-interp extract --gguf` or repeng wrote"
        )
    vectors = {int(name.rpartition(".")[2]): x for name, x in tensors.items()}
    if any(x.ndim != 1 or not torch.isfinite(x).all() for x in vectors.values()):
        raise BadValueError(found, "a layer of it is no vector, or holds NaN", "write it again from the direction")
    return str(fields.get("controlvector.model_hint", "unknown")), dict(sorted(vectors.items()))
