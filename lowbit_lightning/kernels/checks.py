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
    if scales.dtype != torch.float32 or scales.shape != (length,):
        raise ValueError(f"{name} must be float32 of shape ({length},), got {scales.dtype} of {tuple(scales.shape)}")


def check_bias(bias: Tensor | None, length: int) -> None:
    """Raise ValueError unless it is None or a float vector ``[length]``."""
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (length,)):
        raise ValueError(f"bias must be a float vector of shape ({length},), got {bias.dtype} of {tuple(bias.shape)}")


def check_devices(first: str, device: torch.device, **others: Tensor | None) -> None:
    """Raise ValueError unless the others are None or on the device of the argument ``first``."""
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name} is on {other.device} but {first} on {device}; move one of them")
