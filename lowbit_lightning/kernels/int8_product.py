"""The scaled product of int8 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.checks import check_bias, check_devices, check_dtype, check_scales
from lowbit_lightning.kernels.dispatch import contiguous, declare, run

LONGEST_INT8_SUM = (2**31 - 1) // 128**2
"""Products of two int8, -128 included, that an int32 holds in the worst case: 131,071."""


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``, summed in int32.

    Args:
        a, b: int8 ``[M, K]`` and ``[N, K]``.
        a_scales, b_scales: float32 ``[M]`` and ``[N]``.
        bias: float ``[N]`` or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[M, N]`` of ``out_dtype``. Above K = 131,071, where int32 could overflow, partial sums are added in float32.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"a and b must be int8, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    check_scales("a_scales", a_scales, a.shape[0])
    check_scales("b_scales", b_scales, b.shape[0])
    check_bias(bias, b.shape[0])
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales, bias=bias)
    check_dtype("out_dtype", out_dtype)
    return _matmul(a, b, a_scales, b_scales, bias, out_dtype)


def _int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    a, b, a_scales, b_scales, bias = contiguous(a, b, a_scales, b_scales, bias)
    if a.shape[1] <= LONGEST_INT8_SUM:
        return run("int8_matmul", a.device, a, b, a_scales, b_scales, bias, out_dtype)
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for cut in zip(a.split(LONGEST_INT8_SUM, 1), b.split(LONGEST_INT8_SUM, 1), strict=True):
        parts = [part.contiguous() for part in cut]
        total += run("int8_matmul", a.device, *parts, a_scales, b_scales, None, torch.float32)
    return (total if bias is None else total + bias.float()).to(out_dtype)


_matmul = declare(
    "int8_matmul(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType out_dtype) -> Tensor",
    fake=lambda a, b, *_: a.new_empty(a.shape[0], b.shape[0], dtype=_[-1]),
    implementation=_int8_matmul,
)
