"""A batch without values: read from the command line, and named in errors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

Batch = Any
"""A tensor, a tuple of positional arguments, or a dict of keyword arguments; only shapes and dtypes matter."""


def parse_batch(text: str) -> Batch:
    """``"8x1024:int64"`` -> a tensor on the meta device; ``"8x1024:int64,8x16"`` -> a tuple of them;
    ``"input_ids=8x1024:int64,labels=8x1024:int64"`` -> a dict. The dtype is float32 if none is named.

    Raises:
        ValueError: for anything else, and for a single dimension without a dtype: ``8,128`` is two vectors.
    """
    parts = [part.strip() for part in text.split(",")]
    named = [part.partition("=")[::2] for part in parts if "=" in part]
    if named and len(named) == len(parts):
        return {name.strip(): _tensor(shape.strip(), text) for name, shape in named}
    tensors = tuple(_tensor(part, text) for part in parts)
    return tensors if len(tensors) > 1 else tensors[0]


def _tensor(part: str, text: str) -> Tensor:
    shape, _, kind = part.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or not isinstance(dtype, torch.dtype):
        raise ValueError(
            "batch must be shapes with dtypes, as 8x1024:int64,8x16:float32, or name=8x1024:int64 for each argument of "
            f"the model; got {part!r}"
        )
    if shape == part and "x" not in shape:
        raise ValueError(
            f"batch={text!r} has {part!r}, one dimension without a dtype: commas separate tensors, and x separates the "
            f"dimensions of one, as in 8x128:int64; a vector names its dtype, as in {part}:float32"
        )
    return torch.empty([int(n) for n in shape.split("x")], dtype=dtype, device="meta")


def described(batch: Batch) -> str:
    """``int64 [8, 1024]`` for each of its tensors."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, dict):
        return ", ".join(f"{name}={described(value)}" for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return ", ".join(described(value) for value in batch)
    return type(batch).__name__
