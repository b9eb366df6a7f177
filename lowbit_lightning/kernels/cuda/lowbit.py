"""Low-bit weights on the GPU: src/lowbit_quantize.cu, src/lowbit_decode.cu; lowbit_product.py has the products."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda import launch, lowbit_product
from lowbit_lightning.kernels.cuda.int8 import quantize_rowwise
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div, geometry
from lowbit_lightning.kernels.cuda.lowbit_form import form_argument, text_of
from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.kernels.sources import specialised
from lowbit_lightning.kernels.structs import fit_rule

_DECODED = 128  # units of 8 elements that a warp decodes, as in src/lowbit_decode.cu
_MOST_BLOCKS = 1 << 16  # CUDA blocks of a quantiser, each of which takes further rows


def lowbit_quantize(weight: Tensor, form: str, fit: str) -> tuple[Tensor, Tensor]:
    (*leading, length), rows, f = weight.shape, prod(weight.shape[:-1]), weight_format(form)
    if f.kind == "int8":
        codes, row_scales = quantize_rowwise(weight.view(rows, length), None)
        return codes.view(torch.uint8).view(weight.shape), row_scales.view(*leading, 1)
    packed = torch.empty(*leading, f.packed_width(length), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*leading, f.scales_width(length), dtype=f.scales_dtype, device=weight.device)
    if not weight.numel():
        return packed, scales.zero_()
    work = torch.empty(rows, 2, f.blocks_per_row(length), dtype=torch.float32, device=weight.device)
    text = text_of("lowbit_quantize.cu", form, ELEMENT=weight.dtype)
    arguments = weight, ctypes.c_int64(rows), fit_rule(form, length, fit), work, packed, scales
    grid, block = (min(rows, _MOST_BLOCKS), 1, 1), geometry(f.block_size)[0]
    launch.run(Launch(text, "quantize_weight", grid, block, arguments))
    return packed, scales


def lowbit_gemv(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    rows = x.view(-1, x.shape[-1])
    return lowbit_product.few_rows(rows, packed, scales, bias, form).view(*x.shape[:-1], -1)


def lowbit_matmul(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    return lowbit_product.forward(x, packed, scales, bias, form)


def lowbit_matmul_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    return lowbit_product.backward(dy, packed, scales, form, row_length)


def lowbit_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    return _decode(packed, scales, None, packed.shape[:-1], form, row_length, dtype)


def lowbit_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    """An index out of range stops the kernel, as it does torch's."""
    return _decode(packed, scales, indices, indices.shape, form, row_length, dtype)


def _decode(
    packed: Tensor, scales: Tensor, indices: Tensor | None, leading: Any, form: str, length: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(*leading, length, dtype=dtype, device=packed.device)
    if out.numel():
        count, index_bytes = prod(leading), 0 if indices is None else indices.element_size()
        rows = ctypes.c_int64(prod(packed.shape[:-1]))
        which = indices, ctypes.c_int32(index_bytes), ctypes.c_int64(count)
        arguments = packed, scales, rows, *which, form_argument(form, length), out
        grid = ceil_div(count * ceil_div(length, 8 * _DECODED), 8), 1, 1  # eight warps to a CUDA block
        launch.run(Launch(text_of("lowbit_decode.cu", form, ELEMENT=dtype), "decode", grid, 256, arguments))
    return out


def split_outliers(x: Tensor, packed: Tensor, scales: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """Without outliers the product is zero: how many there are stays on the device."""
    (m, k), n = x.shape, packed.shape[0]
    text = specialised("lowbit_outliers.cu", ELEMENT=x.dtype)
    flags = torch.zeros(k, dtype=torch.int32, device=x.device)
    columns = torch.empty(k + 1, dtype=torch.int32, device=x.device)  # and their number
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    sizes, length = (ctypes.c_int64(m), ctypes.c_int64(n)), ctypes.c_int64(k)
    grid = ceil_div(k, 32 * (16 // x.element_size())), min(ceil_div(m, 64), 64), 1
    launch.run(Launch(text, "flag_columns", grid, 256, (x, sizes[0], length, ctypes.c_float(threshold), flags)))
    launch.run(Launch(text, "list_columns", (1, 1, 1), 1024, (flags, length, columns[:k], columns[k:])))
    arguments = x, packed, scales, columns[:k], columns[k:], *sizes, length, out
    launch.run(Launch(text, "multiply_columns", (ceil_div(n, 64), ceil_div(m, 64), 1), 256, arguments))
    return x.masked_fill(flags.bool(), 0.0), out
