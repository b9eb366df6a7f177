"""Checks of arguments that several ops share. Each raises an error that names the argument and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless it is float32, float16 or bfloat16."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")


def check_scales(name: str, scales: Tensor, length: int) -> None:
    """Raise ValueError unless they are float32 ``[length]``."""
    if scales.dtype != torch.float32 or tuple(scales.shape) != (length,):
        raise ValueError(f"{name} must be float32 of shape ({length},), got {scales.dtype} of {tuple(scales.shape)}")


def check_bias(bias: Tensor | None, length: int) -> None:
    """Raise ValueError unless it is None or a float vector ``[length]``."""
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (length,)):
        raise ValueError(f"bias must be a float vector of shape ({length},), got {bias.dtype} of {tuple(bias.shape)}")


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all of them that are not None are on the device of the first."""
    (place, first), *others = tensors.items()
    for name, other in others:
        if other is not None and first is not None and other.device != first.device:
            raise ValueError(f"{name} is on {other.device} but {place} on {first.device}; move one of them")
