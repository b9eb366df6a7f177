"""Int8 matrices whose rows are sorted into groups (``groups``), such as the tokens of each expert of a mixture of
experts. ``offs [E]`` says where groups end.

A product that contracts the rows (a gradient by the weights) needs them as columns, of each group by itself: the *group
columns* of a matrix ``[S, C]``. They take as much memory as the matrix, and have its shape: rows ``offs[e - 1]`` to
``offs[e] - 1`` hold group e transposed, ``[C, rows of e]``, contiguous. A weight ``[E, N, K]`` is such a matrix too, of
E groups of N rows.

Kernels need the ends on the host: an ``offs`` on a GPU is copied from it, which waits. On a CPU each op is one call of
C++; on a GPU it launches kernels group by group, so CUDA graphs can't capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS, as_int64
from lowbit_lightning.kernels.checks import check_devices, check_dtype
from lowbit_lightning.kernels.dispatch import contiguous, declare, run
from lowbit_lightning.kernels.groups import check_offs, columns_of, ends_of, spans
from lowbit_lightning.kernels.int8_product import LONGEST_INT8_SUM, int8_matmul


def quantize_groups(x: Tensor, offs: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The int8 rows of a matrix, and its group columns, in one op.

    Args:
        x: float32, float16 or bfloat16 ``[S, C]``.
        offs: int32 or int64 ``[E]``, ascending ends, at most S.
        seed: None rounds to nearest; an int dithers group e, as ``quantize_both`` with the seed ``seed + e``.

    Returns:
        int8 ``[S, C]`` and float32 scales ``[S]``; the group columns, int8 ``[S, C]``, and float32 scales ``[E, C]``.
        Rows of no group are zeros.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    return _both(x, offs, None if seed is None else as_int64(seed))


def quantize_group_columns(x: Tensor, offs: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """The last two results of ``quantize_groups``."""
    return _columns(x, offs, None if seed is None else as_int64(seed))


def int8_grouped_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``int8_matmul`` of each group of rows with a matrix of its own.

    Args:
        a: int8 ``[S, K]``; ``a_scales``: float32 ``[S]``.
        b: int8 ``[E, N, K]``; ``b_scales``: float32 ``[E, N]``. K is at most 131,071.
        offs: int32 or int64 ``[E]``, ascending ends, at most S.
        bias: float ``[E, N]`` or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[S, N]`` of ``out_dtype``. Rows of no group are zeros.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    return _matmul(a, b, a_scales, b_scales, offs, bias, out_dtype)


def int8_grouped_outer(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``int8_matmul`` of the columns of each group: the sums run over its rows.

    Args:
        a, b: int8 ``[S, N]`` and ``[S, K]``, group columns; ``a_scales``, ``b_scales``: float32 ``[E, N]``, ``[E, K]``.
        offs: int32 or int64 ``[E]``, ascending ends, at most S.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[E, N, K]`` of ``out_dtype``; zeros for an empty group.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    return _outer(a, b, a_scales, b_scales, offs, out_dtype)


# -- checks: in the ops and their fakes ------------------------------------------------------------------------------


def _check_float(x: Tensor, offs: Tensor) -> None:
    if x.dtype not in FLOATS or x.ndim != 2:
        raise TypeError(f"x must be a float32, float16 or bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    check_offs(offs)


def _check_int8(name: str, x: Tensor, shape: tuple[int, ...], scales: Tensor, of_scales: tuple[int, ...]) -> None:
    if x.dtype != torch.int8 or x.shape != shape:
        raise ValueError(f"{name} must be int8 of shape {list(shape)}, got {x.dtype} of {tuple(x.shape)}")
    if scales.dtype != torch.float32 or scales.shape != of_scales:
        raise ValueError(
            f"{name}_scales must be float32 of shape {list(of_scales)}, got {scales.dtype} of {tuple(scales.shape)}"
        )


def _check_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_offs(offs)
    if a.ndim != 2 or b.ndim != 3:
        raise ValueError(f"a and b must be [S, K] and [E, N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    (rows, k), (groups, n) = a.shape, (len(offs), b.shape[1])
    _check_int8("a", a, (rows, k), a_scales, (rows,))
    _check_int8("b", b, (groups, n, k), b_scales, (groups, n))
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (groups, n)):
        raise ValueError(f"bias must be float of shape {[groups, n]}, got {bias.dtype} of {tuple(bias.shape)}")
    if k > LONGEST_INT8_SUM:
        raise ValueError(f"a must have at most {LONGEST_INT8_SUM} columns, whose products an int32 holds, got {k}")
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales, bias=bias)
    check_dtype("out_dtype", out_dtype)


def _check_outer(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> None:
    check_offs(offs)
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"a and b must be [S, N] and [S, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    (rows, n), k, groups = a.shape, b.shape[1], len(offs)
    _check_int8("a", a, (rows, n), a_scales, (groups, n))
    _check_int8("b", b, (rows, k), b_scales, (groups, k))
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales)
    check_dtype("out_dtype", out_dtype)


# -- what the ops do -------------------------------------------------------------------------------------------------


def _run_both(x: Tensor, offs: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_float(x, offs)
    return run("quantize_groups", x.device, x.contiguous(), ends_of(offs, len(x)), seed)


def _run_columns(x: Tensor, offs: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    _check_float(x, offs)
    return run("quantize_group_columns", x.device, x.contiguous(), ends_of(offs, len(x)), seed)


def _like_both(x: Tensor, offs: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)
    return *rows, *_like_columns(x, offs, seed)


def _like_columns(x: Tensor, offs: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    _check_float(x, offs)
    scales = x.new_empty(offs.shape[0], x.shape[1], dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scales


def _run_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_matmul(a, b, a_scales, b_scales, offs, bias, out_dtype)
    *operands, bias = contiguous(a, b, a_scales, b_scales, bias)
    return run("int8_grouped_matmul", a.device, *operands, ends_of(offs, len(a)), bias, out_dtype)


def _like_matmul(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    _check_matmul(a, b, *rest)
    return a.new_empty(a.shape[0], b.shape[1], dtype=rest[-1])


def _run_outer(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    _check_outer(a, b, a_scales, b_scales, offs, out_dtype)
    a, b, a_scales, b_scales = contiguous(a, b, a_scales, b_scales)
    ends = ends_of(offs, len(a))
    if len(a) <= LONGEST_INT8_SUM:
        return run("int8_grouped_outer", a.device, a, b, a_scales, b_scales, ends, out_dtype)
    scales = zip(a_scales, b_scales, strict=True)
    parts = [(columns_of(a, *rows), columns_of(b, *rows)) for rows in spans(ends)]  # sums that are cut
    return torch.stack([int8_matmul(*p, *s, None, out_dtype) for p, s in zip(parts, scales, strict=True)])


def _like_outer(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    _check_outer(a, b, *rest)
    *_, offs, out_dtype = rest
    return a.new_empty(offs.shape[0], a.shape[1], b.shape[1], dtype=out_dtype)


_both = declare(
    "quantize_groups(Tensor x, Tensor offs, SymInt? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_like_both,
    implementation=_run_both,
)
_columns = declare(
    "quantize_group_columns(Tensor x, Tensor offs, SymInt? seed) -> (Tensor, Tensor)",
    fake=_like_columns,
    implementation=_run_columns,
)
_matmul = declare(
    "int8_grouped_matmul(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor offs, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    fake=_like_matmul,
    implementation=_run_matmul,
)
_outer = declare(
    "int8_grouped_outer(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor offs, ScalarType out_dtype) "
    "-> Tensor",
    fake=_like_outer,
    implementation=_run_outer,
)
