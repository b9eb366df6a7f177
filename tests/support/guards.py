"""Tensors between pages that nobody may touch: an access outside one ends the process."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor filled with NaN or the largest integer; it lies at one end of its pages, chosen at random."""
    count, size = 1, dtype.itemsize
    for length in shape:
        count *= length
    inner = max(PAGE, -(-count * size // PAGE) * PAGE)
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + PAGE + inner):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + random.choice((0, inner - count * size))
    if not count:
        return torch.zeros(shape, dtype=dtype)
    fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(tuple(shape)).fill_(fill)


def protect(x: Tensor) -> Tensor:
    """A copy between guards."""
    return guarded(x.shape, x.dtype).copy_(x)


@contextmanager
def guards() -> Iterator[None]:
    """What ops allocate lies between guards, too."""

    def empty(*shape: Any, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        return guarded(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape, dtype)

    with patch.object(torch, "empty", empty):
        yield
