"""Rows that are sorted into groups, such as the tokens of each expert of a mixture of experts.

``offs [E]`` says where groups end, as for ``torch.nn.functional.grouped_mm``: group e has rows ``offs[e - 1]`` to
``offs[e] - 1`` (``offs[-1] = 0``), and may be empty. Rows after the last end belong to no group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import as_int64

Product = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", torch.dtype], Tensor]
"""A backend's ``int8_matmul``."""


def check_offs(offs: Tensor) -> None:
    """Raise TypeError for ends that are not a vector of int32 or int64."""
    if offs.dtype not in (torch.int32, torch.int64) or offs.ndim != 1:
        raise TypeError(f"offs must be an int32 or int64 vector, got {offs.dtype} of shape {tuple(offs.shape)}")


def ends_of(offs: Tensor, rows: int) -> list[int]:
    """The ends of groups of ``rows`` rows in all, on the host; waits if they are on a device.

    Raises:
        ValueError: if they don't ascend, or leave the matrix.
    """
    # torch 2.7 can't list a tensor within a transform of torch.func, but reads single numbers.
    transformed = torch._C._are_functorch_transforms_active()
    ends: list[int] = [int(end) for end in offs.cpu()] if transformed else offs.tolist()
    if any(a > b for a, b in zip([0, *ends], [*ends, rows], strict=True)):
        raise ValueError(f"offs must ascend from 0 to at most {rows}, the number of rows, got {ends}")
    return ends


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    """The first row of each group, and the one after its last."""
    return [*zip([0, *ends], ends, strict=False)]


def sums_of_groups(x: Tensor, offs: Tensor) -> Tensor:
    """Of the rows of each group of x ``[S, N]``: float32 ``[E, N]``. Waits for nothing."""
    rows = torch.arange(x.shape[0], device=x.device)
    groups = torch.searchsorted(offs.to(x.device).to(rows.dtype), rows, right=True)
    return x.new_zeros(offs.shape[0] + 1, x.shape[1], dtype=torch.float32).index_add(0, groups, x.float())[:-1]


def columns_of(q: Tensor, first: int, last: int) -> Tensor:
    """Those of one group, ``[C, last - first]``, of the group columns ``[S, C]``."""
    return q[first:last].view(q.shape[1], last - first)


# -- ops of groups, group by group, by the functions of some backend for one matrix ----------------------------------


def groups_by(
    quantize_both: Callable[[Tensor, int | None], tuple[Tensor, ...]], x: Tensor, ends: Sequence[int], seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize_groups`` by this ``quantize_both``."""
    q, columns = (torch.zeros(x.shape, dtype=torch.int8, device=x.device) for _ in range(2))
    scales, column_scales = x.new_zeros(len(x)).float(), x.new_zeros(len(ends), x.shape[1]).float()
    for e, (first, last) in enumerate(spans(ends)):
        parts = quantize_both(x[first:last], None if seed is None else as_int64(seed + e))
        q[first:last], scales[first:last], column_scales[e] = parts[0], parts[1], parts[3]
        columns[first:last] = parts[2].view(last - first, x.shape[1])
    return q, scales, columns, column_scales


def columns_by(
    quantize_colwise: Callable[[Tensor, int | None], tuple[Tensor, Tensor]],
    x: Tensor,
    ends: Sequence[int],
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    """``quantize_group_columns`` by this ``quantize_colwise``."""
    columns = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_zeros(len(ends), x.shape[1]).float()
    for e, (first, last) in enumerate(spans(ends)):
        part, scales[e] = quantize_colwise(x[first:last], None if seed is None else as_int64(seed + e))
        columns[first:last] = part.view(last - first, x.shape[1])
    return columns, scales


def matmul_by(
    product: Product,
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    ends: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``int8_grouped_matmul`` by this ``int8_matmul``."""
    out = torch.zeros(len(a), b.shape[1], dtype=out_dtype, device=a.device)
    for e, (first, last) in enumerate(spans(ends)):
        of_a, own = a_scales[first:last], None if bias is None else bias[e]
        out[first:last] = product(a[first:last], b[e], of_a, b_scales[e], own, out_dtype)
    return out


def outer_by(
    product: Product,
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    ends: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """``int8_grouped_outer`` by this ``int8_matmul``."""
    out = torch.zeros(len(ends), a.shape[1], b.shape[1], dtype=out_dtype, device=a.device)
    for e, (first, last) in enumerate(spans(ends)):
        of_a, of_b = columns_of(a, first, last), columns_of(b, first, last)
        out[e] = product(of_a, of_b, a_scales[e], b_scales[e], None, out_dtype)
    return out
