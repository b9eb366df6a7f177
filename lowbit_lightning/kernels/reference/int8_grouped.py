"""Int8 matrices whose rows are sorted into groups, in plain torch: group by group, by the functions for one matrix.

``ends``: of the groups, ascending; rows after the last one belong to none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels import groups
from lowbit_lightning.kernels.reference import int8, int8_product


def quantize_groups(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of x ``[S, C]``, and of each group the columns: ``quantize_both`` of group e with ``seed + e``.

    Returns int8 ``[S, C]`` and scales ``[S]``; int8 ``[S, C]``, whose rows of group e are its transpose ``[C, rows]``,
    and scales ``[E, C]``. Rows of no group are zeros.
    """
    return groups.groups_by(int8.quantize_both, x, ends, seed)


def quantize_group_columns(x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor]:
    """The last two results of ``quantize_groups``."""
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
    """``[S, N]`` of a ``[S, K]`` and b ``[E, N, K]``: ``int8_matmul`` of each group's rows with its matrix. Rows of no
    group are zeros."""
    return groups.matmul_by(int8_product.int8_matmul, a, b, a_scales, b_scales, ends, bias, out_dtype)


def int8_grouped_outer(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, ends: Sequence[int], out_dtype: torch.dtype
) -> Tensor:
    """``[E, N, K]`` of group columns a ``[S, N]`` and b ``[S, K]``: ``int8_matmul`` of each group's columns."""
    return groups.outer_by(int8_product.int8_matmul, a, b, a_scales, b_scales, ends, out_dtype)
