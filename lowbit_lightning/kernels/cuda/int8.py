"""The int8 quantisers on the GPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.sources import specialised

_SHORT_ROW = 1024  # elements up to which one warp takes a row
_STRIDE_ROWS = 64  # tiles that a launch's second dimension spreads over; each CUDA block then takes the next ones


def _text(x: Tensor, row_threads: int, seed: int | None, nearest_rows: bool = False) -> str:
    dithered = 0 if seed is None else 2 if nearest_rows else 1
    return specialised("int8.cu", ELEMENT=x.dtype, ROW_THREADS=row_threads, DITHERED=dithered)


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        row_threads = 32 if columns <= _SHORT_ROW else 256
        arguments = x, ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_uint64(seed or 0), q, scales
        grid = ceil_div(rows, 256 // row_threads), 1, 1
        text = _text(x, row_threads, seed)
        launch.run(Launch(text, "quantize_rows", grid, 256, arguments))
    return q, scales


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    q, scales, _, _ = _quantize_tiles(x, seed, with_rows=False)
    return q, scales


def quantize_both(x: Tensor, seed: int | None, nearest_rows: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    column_q, column_scales, row_q, row_scales = _quantize_tiles(x, seed, True, nearest_rows)
    return row_q, row_scales, column_q, column_scales


def quantize_channels(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """The transposed form is turned back, a byte per element each way."""
    q, scales = quantize_colwise(x, seed)
    return q.T.contiguous(), scales


def quantize_image(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_q, row_scales, column_q, column_scales = quantize_both(x, seed)
    return row_q, row_scales, column_q.T.contiguous(), column_scales


def hadamard(x: Tensor, dim: int) -> Tensor:
    rows, columns = x.shape
    out = torch.empty(x.shape, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32, device=x.device)
    if x.numel():
        text = specialised("int8_hadamard.cu", ELEMENT=x.dtype, ROTATED=out.dtype)
        arguments = x, ctypes.c_int64(rows), ctypes.c_int64(columns), out
        if dim:
            launch.run(Launch(text, "rotate_rows", (ceil_div(rows * ceil_div(columns, 64), 8), 1, 1), 256, arguments))
        else:
            grid = ceil_div(columns, 256), min(1 << 15, ceil_div(rows, 64)), 1
            launch.run(Launch(text, "rotate_columns", grid, 256, arguments))
    return out


def _quantize_tiles(
    x: Tensor, seed: int | None, with_rows: bool, nearest_rows: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The column-wise form, then the row-wise form, which is empty unless ``with_rows``."""
    rows, columns = x.shape
    row_count = rows if with_rows else 0
    column_q = torch.empty(columns, rows, dtype=torch.int8, device=x.device)
    row_q = torch.empty(row_count, columns, dtype=torch.int8, device=x.device)
    column_scales, row_scales = (torch.zeros(n, dtype=torch.float32, device=x.device) for n in (columns, row_count))
    if not columns:
        return column_q, column_scales, row_q, row_scales
    tops = torch.zeros(columns + row_count, dtype=torch.int32, device=x.device)  # bits of floats: they order alike
    column_tops, row_tops = tops[:columns], tops[columns:]
    text = _text(x, 256, seed, nearest_rows)
    shape = x, ctypes.c_int64(rows), ctypes.c_int64(columns)
    row_form = (row_tops, row_q, row_scales) if with_rows else (None, None, None)
    down = min(_STRIDE_ROWS, max(1, ceil_div(rows, 64)))
    width = 16 // x.element_size()  # elements of a packet
    arguments = *shape, column_tops, row_form[0]
    launch.run(Launch(text, "find_tops", (ceil_div(columns, 32 * width), down, 1), 256, arguments))
    arguments = *shape, ctypes.c_uint64(seed or 0), column_tops, column_q, column_scales, *row_form
    launch.run(Launch(text, "quantize_tiles", (ceil_div(columns, 16 * width), down, 1), 256, arguments))
    return column_q, column_scales, row_q, row_scales
