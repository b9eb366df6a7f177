"""The int8 quantisers on the GPU."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch
from lowbit_lightning.kernels.cuda.types import CPP_TYPES, ceil_div

_SHORT_ROW = 1024  # elements up to which one warp takes a row
_STRIDE_ROWS = 64  # tiles, strips or rows that a launch's second dimension spreads over; each then takes the next ones


@cache
def int8_text(element: torch.dtype, row_threads: int = 256, stochastic: bool = False) -> str:
    """src/int8.cu for one dtype of the matrix, one way to share rows and one to round."""
    macros = {"ELEMENT": CPP_TYPES[element], "ROW_THREADS": row_threads, "STOCHASTIC": int(stochastic)}
    return source_text("int8.cu", prelude="\n".join(f"#define {name} {value}" for name, value in macros.items()))


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_rowwise``; equal to it to the bit."""
    rows, columns = x.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        row_threads = 32 if columns <= _SHORT_ROW else 256
        arguments = x, ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_uint64(seed or 0), q, scales
        grid = ceil_div(rows, 256 // row_threads), 1, 1
        text = int8_text(x.dtype, row_threads=row_threads, stochastic=seed is not None)
        launch.run(Launch(text, "quantize_rows", grid, 256, arguments))
    return q, scales


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_colwise``; equal to it to the bit."""
    rows, columns = x.shape
    q = torch.empty(columns, rows, dtype=torch.int8, device=x.device)
    scales = torch.empty(columns, dtype=torch.float32, device=x.device)
    if not columns:
        return q, scales
    tops = torch.zeros(columns, dtype=torch.int32, device=x.device)  # bits of floats; their order is that of integers
    shape = x, ctypes.c_int64(rows), ctypes.c_int64(columns)
    text = int8_text(x.dtype, stochastic=seed is not None)
    strips = min(_STRIDE_ROWS, max(1, ceil_div(rows, 256)))
    launch.run(Launch(text, "column_tops", (ceil_div(columns, 32), strips, 1), 256, (*shape, tops)))
    tiles = min(_STRIDE_ROWS, max(1, ceil_div(rows, 64)))
    arguments = *shape, tops, ctypes.c_uint64(seed or 0), q, scales
    launch.run(Launch(text, "quantize_columns", (ceil_div(columns, 64), tiles, 1), 256, arguments))
    return q, scales


def quantize_both(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.quantize_both``; equal to it to the bit."""
    return *quantize_rowwise(x, seed), *quantize_colwise(x, seed)
