"""Block-wise quantisation on the GPU: src/quantize.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, geometry, shared_out
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.sources import MAP_NUMBERS, specialised


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    grid = BlockGrid.of(x.shape, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(grid.scales_shape, dtype=torch.float32, device=x.device)
    if x.numel():
        given = x, *_rows(grid), *_codebook(values)
        _run_blocks("quantize", x.dtype, codebook, grid, given, (codes, scales))
    return codes, scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    grid = BlockGrid.of(codes.shape, block_size)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        given = codes, scales, *_rows(grid), *_codebook(values)
        _run_blocks("dequantize", dtype, codebook, grid, given, (out,))
    return out


def _rows(grid: BlockGrid) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(grid.rows), ctypes.c_int64(grid.row_length)


def _codebook(values: Tensor | None) -> tuple[Tensor | None, ctypes.c_int]:
    return values, ctypes.c_int(0 if values is None else values.numel())


def _run_blocks(kernel: str, dtype: torch.dtype, codebook: str, grid: BlockGrid, given: tuple, made: tuple) -> None:
    text = specialised("quantize.cu", ELEMENT=dtype, MAP=MAP_NUMBERS[codebook], BLOCK=grid.block_size)
    threads, at_a_time = geometry(grid.block_size)
    count, turns = shared_out(grid.rows * grid.blocks_per_row, at_a_time)
    launch.run(Launch(text, kernel, (count, 1, 1), threads, (*given, ctypes.c_int(turns), *made)))
