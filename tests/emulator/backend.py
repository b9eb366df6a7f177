"""Puts the emulator in the place of the CUDA driver: the CUDA backend's own code, on CPU tensors.

with emulated(order="backward"):
    codes, scales = cuda.quantize_blockwise(x, "dynamic_signed", None, 256)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from emulator.module import Module
from lowbit_lightning.kernels.cuda import launch, table

_module = cache(Module)


@contextmanager
def emulated(*, check: bool = False, order: str = "forward", seed: int = 0) -> Iterator[list[launch.Launch]]:
    """Run the CUDA backend in the emulator; yields the launches made so far."""
    launches: list[launch.Launch] = []

    def run(one: launch.Launch) -> None:
        launches.append(one)
        _module(one.text, check=check).launch(
            one.kernel, one.grid, one.block, one.arguments, order=order, seed=seed, memory=one.memory
        )

    table._tables.clear()
    with patch.object(launch, "run", run):
        yield launches
    table._tables.clear()
