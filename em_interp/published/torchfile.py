"""Reading the torch and safetensors files that the papers' authors released, without running anything in them."""

from __future__ import annotations

import pickle  # noqa: TID251  (for the exception that the safe loader raises)
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from em_interp.errors import BadValueError, UnreadableFileError, UnsafeFileError
from em_interp.files.inputs import regular_file


def load_torch(path: Path) -> Any:
    """`torch.load(weights_only=True)` with typed errors.

    Raises `MissingDataError`, `UnreadableFileError` (truncated or not a torch file) or `UnsafeFileError` (the
    pickle names code; it is not run).
    """
    try:
        return torch.load(regular_file(path), map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL", "REDUCE")):
            raise UnsafeFileError(
                path,
                "its pickle names code beyond plain tensors, which could run on your machine; it was not loaded",
                "get the file from its original source, or save just the tensors again",
            ) from error
        raise _unreadable(path, error) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        raise _unreadable(path, error) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file as a dictionary, with typed errors."""
    try:
        return load_file(regular_file(path))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def check_finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32. Raises `BadValueError` for NaN, infinite or non-floating values."""
    if not tensor.is_floating_point():
        raise BadValueError(path, f"{name} holds {tensor.dtype}, not floating-point numbers", "download it again")
    wide = tensor.to(torch.float32)
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        raise BadValueError(
            path,
            f"{name} has {bad} NaN or infinite values of {wide.numel()}",
            "download the file again; if it stays so, the source is damaged, so leave the file out",
        )
    return wide


def _unreadable(path: Path, error: BaseException) -> UnreadableFileError:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return UnreadableFileError(
        path, f"it is truncated or not the expected file format ({first})", "download or copy it again"
    )
