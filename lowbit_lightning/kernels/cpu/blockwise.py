"""Block-wise quantisation on CPU: src/quantize.cpp."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, MAP_NUMBERS, specialised

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS: list[Any] = [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT, _INT]


@cache
def library() -> ctypes.CDLL:
    compiled = host_library(specialised("quantize.cpp"))
    for function in (compiled.quantize_blockwise, compiled.dequantize_blockwise):
        function.restype, function.argtypes = None, _ARGUMENTS
    return compiled


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(BlockGrid.of(x.shape, block_size).scales_shape, dtype=torch.float32, device="cpu")
    _run(library().quantize_blockwise, x, codes, scales, codebook, values, block_size)
    return codes, scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    _run(library().dequantize_blockwise, out, codes, scales, codebook, values, block_size)
    return out


def _run(
    function: Any, x: Tensor, codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int
) -> None:
    grid = BlockGrid.of(x.shape, block_size)
    book = (None, 0) if values is None else (values.data_ptr(), values.numel())
    if x.numel():
        tensors = x.data_ptr(), DTYPE_NUMBERS[x.dtype], codes.data_ptr(), scales.data_ptr()
        form = grid.rows, grid.row_length, block_size, MAP_NUMBERS[codebook], *book
        function(*tensors, *form, torch.get_num_threads())
