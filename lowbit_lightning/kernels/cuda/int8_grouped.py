"""Grouped int8 matrices on the GPU: the kernels for one matrix, launched group by group.

A launch takes the host a few microseconds, so groups of some hundred rows keep the GPU busy; one launch for all groups
would serve smaller ones better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels import groups
from lowbit_lightning.kernels.cuda import int8, int8_product


def quantize_groups(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    return groups.groups_by(int8.quantize_both, x, ends, seed)


def quantize_group_columns(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor]:
    """See the reference."""
    return groups.columns_by(int8.quantize_colwise, x, ends, seed)


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
    return groups.matmul_by(int8_product.int8_matmul, a, b, a_scales, b_scales, ends, bias, out_dtype)


def int8_grouped_outer(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, ends: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    """See the reference."""
    return groups.outer_by(int8_product.int8_matmul, a, b, a_scales, b_scales, ends, out_dtype)
