"""The int8 ops on the GPU: quantisers of our own, cuBLASLt's int8 product (``torch._int_mm``), our own epilogue."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch
from lowbit_lightning.kernels.cuda.types import CPP_TYPES, ceil_div

_SHORT_ROW = 1024  # elements up to which one warp takes a row
_STRIDE_ROWS = 64  # tiles, strips or rows that a launch's second dimension spreads over; each then takes the next ones


@cache
def int8_text(element: torch.dtype, bias: torch.dtype = torch.float32, row_threads: int = 256) -> str:
    """src/int8.cu for one dtype of the matrix (or of the product's result), of the bias, and one way to share rows."""
    macros = {"ELEMENT": CPP_TYPES[element], "BIAS": CPP_TYPES[bias], "ROW_THREADS": row_threads}
    return source_text("int8.cu", prelude="\n".join(f"#define {name} {value}" for name, value in macros.items()))


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_rowwise``; equal to it to the bit."""
    rows, columns = x.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        row_threads = 32 if columns <= _SHORT_ROW else 256
        arguments = x, ctypes.c_int64(rows), ctypes.c_int64(columns), q, scales
        grid = ceil_div(rows, 256 // row_threads), 1, 1
        launch.run(Launch(int8_text(x.dtype, row_threads=row_threads), "quantize_rows", grid, 256, arguments))
    return q, scales


def quantize_colwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_colwise``; equal to it to the bit."""
    rows, columns = x.shape
    q = torch.empty(columns, rows, dtype=torch.int8, device=x.device)
    scales = torch.empty(columns, dtype=torch.float32, device=x.device)
    if not columns:
        return q, scales
    tops = torch.zeros(columns, dtype=torch.int32, device=x.device)  # bits of floats; their order is that of integers
    shape = x, ctypes.c_int64(rows), ctypes.c_int64(columns)
    text = int8_text(x.dtype)
    strips = min(_STRIDE_ROWS, max(1, ceil_div(rows, 256)))
    launch.run(Launch(text, "column_tops", (ceil_div(columns, 32), strips, 1), 256, (*shape, tops)))
    tiles = min(_STRIDE_ROWS, max(1, ceil_div(rows, 64)))
    launch.run(Launch(text, "quantize_columns", (ceil_div(columns, 64), tiles, 1), 256, (*shape, tops, q, scales)))
    return q, scales


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See ``reference.int8_matmul``; equal to it to the bit."""
    m, n = a.shape[0], b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    sums = _product(a, b)
    bias = None if bias is None else bias.contiguous()
    text = int8_text(out_dtype, torch.float32 if bias is None else bias.dtype)
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(sums.shape[1])
    grid = ceil_div(n, 1024), min(m, 4096), 1
    launch.run(Launch(text, "scale_sums", grid, 256, (sums, *sizes, a_scales, b_scales, bias, out)))
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32, at least [M, N]: cuBLASLt wants more than 16 rows, and K and N in multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    more_k = -k % 8 if k else 8
    if more_k or m <= 16:
        a = pad(a, (0, more_k, 0, max(0, 17 - m)))
    if more_k or n % 8:
        b = pad(b, (0, more_k, 0, -n % 8))
    return torch._int_mm(a, b.t())
