"""Host memory of int8 temporaries, kept for the next op of the same size.

The forms that a product reads are dropped when it has run, and a layer makes several of them in each step. Their memory
is new to the process each time, since ``malloc.return_large_tensors`` gives large tensors back to the system, and the
kernel clears a new page when it is first written. That takes as long as quantising. (A GPU's allocator keeps memory
itself.)

The backend of the CPU asks for such memory here (``empty``), and who drops a temporary says so (``give_back``). What is
never given back, such as what a layer saves for its backward, is an ordinary tensor.
"""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes: the size from which ``malloc.return_large_tensors`` has the memory of a tensor returned."""
MOST = 128 * 2**20
"""Bytes that are kept at most; those that were given back first go first."""

_kept: list[Tensor] = []
_lock = Lock()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the host, in memory that was given back if there is some of just this size."""
    size = math.prod(shape) * dtype.itemsize
    if size >= SMALLEST:
        with _lock:
            for i in reversed(range(len(_kept))):  # what was used last may still be in a cache
                if _kept[i].nbytes == size:
                    return _kept.pop(i).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device="cpu")


def give_back(*tensors: Tensor | None) -> None:
    """Let ``empty`` use the memory of these; nobody may read them any more. Those on other devices are only dropped."""
    for x in tensors:
        if x is None or x.device.type != "cpu" or x.nbytes < SMALLEST or x.nbytes != x.untyped_storage().nbytes():
            continue
        with _lock:
            _kept.append(x.detach().view(-1).view(torch.uint8))
            while sum(memory.nbytes for memory in _kept) > MOST:
                del _kept[0]
