"""float64, in which sums are taken, on every device: Apple's GPUs have none, so there the CPU takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can lie on a device."""
    return device.type != "mps"


def exact(x: Tensor) -> Tensor:
    """In float64: where it lies, or on the CPU where its device has none."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def widest(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device without."""
    return torch.float64 if has_float64(torch.device(device)) else torch.float32
