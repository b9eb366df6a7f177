"""The int8 products of a convolution on the GPU.

The forward and the gradient by the input are one launch of src/int8_conv.cu, on tensor cores: the table is read where
rows are copied into shared memory. It multiplies zeros where a tile has no row for a tap, so the gradient by the input
of a convolution of stride 2 does four times the work of its forward. The gradient by the weight is composed of
``int8_matmul``: one for each tap, of the pixels that it reads, gathered in int8. Nothing waits for the device.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import PART, Scaled
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.int8_product import int8_matmul
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.sources import specialised

_TILE, _TILE_K, _STAGES, _THREADS = 128, 64, 3, 256


def int8_conv(a: Scaled, b: Scaled, table: Tensor, images: int, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return _windows(*a, *b, table, images, bias, out_dtype)


def int8_conv_input(a: Scaled, b: Scaled, table: Tensor, images: int, pixels: int, out_dtype: torch.dtype) -> Tensor:
    read = torch.where(table < 0, pixels, table).long()
    turned = torch.full((pixels + 1, table.shape[1]), -1, dtype=torch.int32, device=table.device)
    results = torch.arange(len(table), dtype=torch.int32, device=table.device)
    turned.scatter_(0, read, results.unsqueeze(1).expand_as(read))
    weight, scales = b
    return _windows(*a, weight.permute(2, 1, 0).contiguous(), scales, turned[:pixels], images, None, out_dtype)


def _windows(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    (results, taps), (n, _, k) = table.shape, b.shape
    out = torch.empty(images * results, n, dtype=out_dtype, device=a.device)
    if not n:
        return out
    macros = {"ELEMENT": out_dtype, "BIAS": torch.float32 if bias is None else bias.dtype}
    text = specialised("int8_conv.cu", **macros, STAGES=_STAGES)
    sizes = [ctypes.c_int64(size) for size in (results, taps, len(a) // images, images, n, k + -k % 16)]
    arguments = launch.in_chunks(a), launch.in_chunks(b), table, *sizes, a_scales, b_scales, bias, out
    grid = ceil_div(len(out), _TILE) * ceil_div(n, _TILE), 1, 1
    shared = _STAGES * 2 * _TILE * _TILE_K + 16 * _TILE
    launch.run(Launch(text, "int8_conv", grid, _THREADS, arguments, shared=shared))
    return out


def int8_conv_weight(a: Scaled, b: Scaled, table: Tensor, images: int, out_dtype: torch.dtype) -> Tensor:
    (dy, dy_scales), (x, x_scales) = a, b
    total = torch.zeros(dy.shape[0], table.shape[1], x.shape[1], dtype=torch.float32, device=dy.device)
    first = torch.arange(images, device=table.device).mul_(len(x) // images).unsqueeze(1)
    for t in range(table.shape[1]):
        column = table[:, t]
        read = (column.clamp(min=0) + first).flatten()
        pixels = torch.where((column < 0).repeat(images).unsqueeze(1), 0, x[read]).T
        for start in range(0, dy.shape[1], PART):
            of_dy, of_x = (matrix[:, start : start + PART].contiguous() for matrix in (dy, pixels))
            total[:, t] += int8_matmul(of_dy, of_x, dy_scales, x_scales, None, torch.float32)
    return total.to(out_dtype)
