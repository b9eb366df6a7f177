"""Block-wise quantisation on CPU: src/quantize.cpp."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, MAP_NUMBERS, specialised


class _Grid(ctypes.Structure):
    """``struct Grid`` of src/quantize.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("row_length", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


class _Map(ctypes.Structure):
    """``struct Map`` of src/quantize.cpp."""

    _fields_ = [("map", ctypes.c_int), ("values", ctypes.c_void_p), ("count", ctypes.c_int)]


def _grid(grid: BlockGrid) -> _Grid:
    return _Grid(grid.rows, grid.row_length, grid.block_size, torch.get_num_threads())


def _map(codebook: str, values: Tensor | None) -> _Map:
    if values is None:
        return _Map(MAP_NUMBERS[codebook], None, 0)
    return _Map(MAP_NUMBERS[codebook], values.data_ptr(), values.numel())


@cache
def library() -> ctypes.CDLL:
    """The compiled quantiser."""
    compiled, pointer = host_library(specialised("quantize.cpp")), ctypes.c_void_p
    compiled.quantize_blockwise.argtypes = [pointer, ctypes.c_int, _Grid, _Map, pointer, pointer]
    compiled.dequantize_blockwise.argtypes = [pointer, pointer, _Grid, _Map, pointer, ctypes.c_int]
    compiled.quantize_blockwise.restype = compiled.dequantize_blockwise.restype = None
    return compiled


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """See the reference."""
    grid = BlockGrid.of(x.shape, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(grid.scales_shape, dtype=torch.float32, device="cpu")
    if x.numel():
        form = _grid(grid), _map(codebook, values)
        library().quantize_blockwise(x.data_ptr(), DTYPE_NUMBERS[x.dtype], *form, codes.data_ptr(), scales.data_ptr())
    return codes, scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See the reference."""
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    if codes.numel():
        form = _grid(BlockGrid.of(codes.shape, block_size)), _map(codebook, values)
        library().dequantize_blockwise(codes.data_ptr(), scales.data_ptr(), *form, out.data_ptr(), DTYPE_NUMBERS[dtype])
    return out
