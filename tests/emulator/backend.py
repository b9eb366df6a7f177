"""Puts the emulator in the place of the CUDA driver: the CUDA backend's own code, on CPU tensors.

with emulated(order="backward"):
    codes, scales = kernels.quantize_blockwise(x)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from emulator.module import Module
from lowbit_lightning import kernels
from lowbit_lightning.kernels import cuda, dispatch
from lowbit_lightning.kernels.cuda import launch, table

_module = cache(Module)
_int_mm = torch._int_mm
_MOST_SHARED = {(9, 0): 227 << 10}


@contextmanager
def emulated(
    *,
    check: bool = False,
    order: str = "forward",
    seed: int = 0,
    capability: tuple[int, int] = (8, 0),
    capturing: bool = False,
    records: list[np.ndarray] | None = None,
) -> Iterator[list[launch.Launch]]:
    """Run the ops on the CUDA backend in the emulator, as on a GPU of ``capability``; yields the launches so far.
    ``capturing``: as if a CUDA graph were captured. ``records`` gets the accesses to memory of each launch
    (``module.RECORD``), in check mode."""
    launches: list[launch.Launch] = []

    def run(one: launch.Launch) -> None:
        launches.append(one)
        module = _module(one.text, check=check)
        with module.recorded() if records is not None else nullcontext(list[np.ndarray]()) as found:
            module.launch(
                *(one.kernel, one.grid, one.block, one.arguments),
                order=order,
                seed=seed,
                shared=one.shared,
                most_shared=_MOST_SHARED.get(capability, 99 << 10),
                memory=one.memory() if check else (),
            )
        if records is not None:
            records.extend(found)

    table.forget()
    with (
        patch.object(launch, "run", run),
        patch.object(launch, "capability", lambda device: capability),
        patch.object(launch, "is_capturing", lambda: capturing),
        patch.object(cuda, "load", lambda: None),
        patch.object(torch, "_int_mm", _int_mm_of_cuda),
    ):
        try:
            with kernels.use_backend("cuda"):
                yield launches
        finally:
            dispatch.load.cache_clear()  # it has seen "cuda" load, which it does here only
            table.forget()


def _int_mm_of_cuda(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm`` with what it asks of shapes on CUDA, and less on a CPU."""
    assert a.shape[0] > 16, f"CUDA wants more than 16 rows, got {tuple(a.shape)}"
    assert b.shape[0] in range(8, 1 << 30, 8), f"CUDA wants K in multiples of 8, got {tuple(b.shape)}"
    assert b.shape[1] % 8 == 0, f"CUDA wants N in multiples of 8, got {tuple(b.shape)}"
    assert a.stride(1) == 1, f"cuBLASLt's int8 product is A @ B^T of row-major A, got strides {a.stride()}"
    assert b.stride(0) == 1, f"cuBLASLt's int8 product is A @ B^T of row-major B, got strides {b.stride()} of B^T"
    return _int_mm(a, b)
