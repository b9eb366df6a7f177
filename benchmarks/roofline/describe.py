"""How a kernel is described: what a lane of it has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16"}


@dataclass(frozen=True)
class Phase:
    """A loop, or with ``whole`` all of a kernel: what a lane loads and stores in one turn (bytes of global memory), its
    tensor products, its sums and products of floats, and the ``elements`` that this is for. Of an unrolled loop a turn
    does a multiple of it."""

    kernel: str
    elements: float
    loads: int
    stores: int = 0
    tensor: int = 0
    arithmetic: int = 0
    whole: bool = False
    unrolled: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Work:
    """A kernel.

    ``run``: the op on a small input, which the emulator watches. ``traffic``: bytes to and from memory for an element;
    ``unit``: what an element is. ``operations``: of the tensor units for an element. ``shared``: bytes of dynamic
    shared memory.
    """

    name: str
    text: str
    phases: tuple[Phase, ...]
    run: Callable[[], object]
    traffic: float
    unit: str
    threads: int = 256
    operations: float = 0.0
    shared: int = 0


def random(rows: int, columns: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
