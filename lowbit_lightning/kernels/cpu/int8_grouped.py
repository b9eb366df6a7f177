"""Grouped int8 matrices on CPU: one call of src/int8_quantize.cpp or src/int8.cpp for all groups."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels.cpu import int8, int8_product
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS


def quantize_groups(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    rows = _memory(x.shape, torch.int8, x, ends), _memory(x.shape[:1], torch.float32, x, ends)
    columns = _empty_columns(x, ends)
    _quantize(x, ends, seed, *rows, *columns)
    return *rows, *columns


def quantize_group_columns(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor]:
    """See the reference."""
    columns = _empty_columns(x, ends)
    _quantize(x, ends, seed, None, None, *columns)
    return columns


def int8_grouped_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    ends: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See the reference."""
    out = _memory((len(a), b.shape[1]), out_dtype, a, ends)
    _multiply(a, b, (b.shape[1], b.shape[2]), (a_scales, b_scales), ends, bias, out, outer=False)
    return out


def int8_grouped_outer(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, ends: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    """See the reference."""
    out = torch.empty(len(ends), a.shape[1], b.shape[1], dtype=out_dtype, device="cpu")
    _multiply(a, b, (a.shape[1], b.shape[1]), (a_scales, b_scales), ends, None, out, outer=True)
    return out


def _memory(shape: Sequence[int], dtype: torch.dtype, x: Tensor, ends: Sequence[int]) -> Tensor:
    """For rows of x; those of no group are zeros."""
    new = torch.empty if ends and ends[-1] == len(x) else torch.zeros
    return new(shape, dtype=dtype, device="cpu")


def _empty_columns(x: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    scales = torch.empty(len(ends), x.shape[1], dtype=torch.float32, device="cpu")
    return _memory(x.shape, torch.int8, x, ends), scales


def _quantize(x: Tensor, ends: Sequence[int], seed: int | None, *forms: Tensor | None) -> None:
    word = None if seed is None else ctypes.byref(ctypes.c_int64(seed))
    pointers = [None if form is None else form.data_ptr() for form in forms]
    sizes = (ctypes.c_int64 * len(ends))(*ends), len(ends), x.shape[1]
    int8.library().lb_int8_quantize_groups(
        x.data_ptr(), DTYPE_NUMBERS[x.dtype], *sizes, word, *pointers, torch.get_num_threads(), int8.MANY
    )


def _multiply(
    a: Tensor,
    b: Tensor,
    sizes: tuple[int, int],
    scales: tuple[Tensor, Tensor],
    ends: Sequence[int],
    bias: Tensor | None,
    out: Tensor,
    outer: bool,
) -> None:
    """``sizes``: N and K."""
    library = int8_product.library()
    groups = (ctypes.c_int64 * len(ends))(*ends), len(ends), *sizes, outer
    workspace = torch.empty(library.lb_int8_grouped_workspace(*groups), dtype=torch.uint8, device="cpu")
    bias = None if bias is None else bias.float().contiguous()
    library.lb_int8_grouped(
        *(a.data_ptr(), b.data_ptr(), *groups, *(x.data_ptr() for x in scales)),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), DTYPE_NUMBERS[out.dtype], workspace.data_ptr()),
        *(torch.get_num_threads(), int8_product.MANY),
    )
