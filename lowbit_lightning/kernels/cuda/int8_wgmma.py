"""The scaled int8 product on Hopper (sm_90a), by its warpgroup instruction ``wgmma`` (src/int8_product_wgmma.cu).

**No GPU has run this kernel yet**: it is compiled, and the emulator executes it. So ``is_right`` compares it with
another engine on the device, once a process, before anyone may use it.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import CompileError
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.sources import specialised

Engine = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", torch.dtype], Tensor]
"""A function with the arguments and the result of ``int8_matmul``."""

TILES = ((128, 128), (128, 256), (192, 256))
"""Rows and columns of a tile. The larger it is, the fewer bytes come from L2 for a multiplication."""

STAGES, OFF = 4, "LOWBIT_LIGHTNING_WGMMA"
_LINE, _GROUP_ROWS, _GROUP = 128, 64, 128


def exists(device: torch.device) -> bool:
    """Whether the GPU has the instruction, and the environment does not forbid it (``LOWBIT_LIGHTNING_WGMMA=0``)."""
    return launch.capability(device) == (9, 0) and os.environ.get(OFF) != "0"


def wgmma_product(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    tile: tuple[int, int] = (128, 256),
) -> Tensor:
    """``int8_matmul`` in one launch. Where K is no multiple of 16, A and B are copied first."""
    (m, k), n, (tile_m, tile_n) = a.shape, b.shape[0], tile
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    text = text_of(out_dtype, torch.float32 if bias is None else bias.dtype, tile)
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(k + -k % 16)
    arguments = launch.in_chunks(a), launch.in_chunks(b), *sizes, a_scales, b_scales, bias, out
    grid = ceil_div(m, tile_m) * ceil_div(n, tile_n), 1, 1
    threads = tile_m // _GROUP_ROWS * _GROUP
    launch.run(
        Launch(text, "int8_product_wgmma", grid, threads, arguments, shared=shared_bytes(tile), own_features=True)
    )
    return out


def text_of(out_dtype: torch.dtype, bias_dtype: torch.dtype, tile: tuple[int, int]) -> str:
    """The kernel's text."""
    macros = {"TILE_M": tile[0], "TILE_N": tile[1], "STAGES": STAGES}
    return specialised("int8_product_wgmma.cu", ELEMENT=out_dtype, BIAS=bias_dtype, **macros)


def shared_bytes(tile: tuple[int, int]) -> int:
    """Of a CUDA block: the stages, and what it takes to begin at a multiple of 1024."""
    return STAGES * sum(tile) * _LINE + 1024


def engines() -> dict[str, Engine]:
    """The product with every tile, by name."""
    return {f"wgmma {m} x {n}": partial(wgmma_product, tile=(m, n)) for m, n in TILES}


@cache
def is_right(device: torch.device, other: Engine) -> bool:
    """Whether the product equals that of ``other`` to the bit, with every tile, on a small ragged product.

    Asked once a process and device. If it does not, one warning says so, and nobody uses it.
    """
    m, n, k = 200, 270, 665  # more than a tile each, and more steps than the ring has stages
    a, b = (_spread(rows, k, device) for rows in (m, n))
    a_scales, b_scales = (torch.arange(1, rows + 1, dtype=torch.float32, device=device) for rows in (m, n))
    arguments = a, b, 1 / a_scales, b_scales / 3
    try:
        expected = other(*arguments, None, torch.float32)
        wrong = [name for name, run in engines().items() if not run(*arguments, None, torch.float32).equal(expected)]
    except (CompileError, RuntimeError) as error:
        wrong = [str(error).partition("\n")[0]]
    if wrong:
        warnings.warn(
            f"the int8 product by wgmma is not used on {device}: it did not give the right result ({', '.join(wrong)})."
            " Other kernels serve, which are slower. Please report it with the output of `lowbit doctor --full`.",
            stacklevel=2,
        )
    return not wrong


def _spread(rows: int, columns: int, device: torch.device) -> Tensor:
    """Values from -128 to 127. Not random: the run's generators are not ours to draw from."""
    place = torch.arange(rows * columns, device=device)
    return ((place * 7919 + place // 251 * 31) % 256 - 128).to(torch.int8).view(rows, columns)
