"""Int8 matrices with a scale for each row or column, and their product."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS, as_int64
from lowbit_lightning.kernels.backends import run
from lowbit_lightning.kernels.register import register

LONGEST_INT8_SUM = (2**31 - 1) // 127**2
"""Products of two int8 in [-127, 127] that an int32 holds in the worst case: 133,144."""


def quantize_rowwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` (absmax / 127) of a matrix, one scale for a row.

    Args:
        x: float32, float16 or bfloat16 ``[R, C]``.
        seed: None rounds to nearest, ties to even. An int of 64 bits rounds at random and without bias; the same seed
        gives the same result on every backend.

    Raises:
        TypeError: if x is no such matrix, or seed no int.
    """
    return torch.ops.lowbit_lightning.quantize_rowwise(*_matrix_and_seed(x, seed))


def quantize_colwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """``quantize_rowwise`` of ``x.T``: int8 ``[C, R]``, contiguous, and float32 scales ``[C]``, of a float matrix
    ``[R, C]``. An element's random bits are those that ``quantize_rowwise(x, seed)`` gives it."""
    return torch.ops.lowbit_lightning.quantize_colwise(*_matrix_and_seed(x, seed))


def quantize_both(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(*quantize_rowwise(x, seed), *quantize_colwise(x, seed))`` in one op that reads x less often."""
    return torch.ops.lowbit_lightning.quantize_both(*_matrix_and_seed(x, seed))


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
        ``[M, N]`` of ``out_dtype``. Above K = 133,144, where int32 could overflow, partial sums are added in float32.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"a and b must be int8, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, scales, length in (("a_scales", a_scales, a.shape[0]), ("b_scales", b_scales, b.shape[0])):
        if scales.dtype != torch.float32 or tuple(scales.shape) != (length,):
            raise ValueError(
                f"{name} must be float32 of shape ({length},), got {scales.dtype} of {tuple(scales.shape)}"
            )
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (b.shape[0],)):
        raise ValueError(
            f"bias must be a float vector of shape ({b.shape[0]},), got {bias.dtype} of {tuple(bias.shape)}"
        )
    for name, other in (("b", b), ("a_scales", a_scales), ("b_scales", b_scales), ("bias", bias)):
        if other is not None and other.device != a.device:
            raise ValueError(f"{name} is on {other.device} but a on {a.device}; move one of them")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be torch.float32, torch.float16 or torch.bfloat16, got {out_dtype}")
    return torch.ops.lowbit_lightning.int8_matmul(a, b, a_scales, b_scales, bias, out_dtype)


def _matrix_and_seed(x: Tensor, seed: int | None) -> tuple[Tensor, int | None]:
    if x.dtype not in FLOATS or x.ndim != 2:
        raise TypeError(f"x must be a float32, float16 or bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if seed is not None and not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int, or None to round to nearest, got {type(seed).__name__}")
    return x, None if seed is None else as_int64(seed)


def _quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return run("quantize_rowwise", x.device, x.contiguous(), seed)


def _quantize_rowwise_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


def _quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return run("quantize_colwise", x.device, x.contiguous(), seed)


def _quantize_colwise_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    return _quantize_rowwise_fake(x.T, seed)


def _quantize_both(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("quantize_both", x.device, x.contiguous(), seed)


def _quantize_both_fake(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_quantize_rowwise_fake(x, seed), *_quantize_rowwise_fake(x.T, seed)


def _int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    a, b, a_scales, b_scales = a.contiguous(), b.contiguous(), a_scales.contiguous(), b_scales.contiguous()
    if a.shape[1] <= LONGEST_INT8_SUM:
        return run("int8_matmul", a.device, a, b, a_scales, b_scales, bias, out_dtype)
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for a_part, b_part in zip(a.split(LONGEST_INT8_SUM, 1), b.split(LONGEST_INT8_SUM, 1), strict=True):
        parts = a_part.contiguous(), b_part.contiguous()
        total += run("int8_matmul", a.device, *parts, a_scales, b_scales, None, torch.float32)
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _int8_matmul_fake(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


register("quantize_rowwise", "(Tensor x, SymInt? seed) -> (Tensor, Tensor)", _quantize_rowwise, _quantize_rowwise_fake)
register("quantize_colwise", "(Tensor x, SymInt? seed) -> (Tensor, Tensor)", _quantize_colwise, _quantize_colwise_fake)
register(
    "quantize_both", "(Tensor x, SymInt? seed) -> (Tensor, Tensor, Tensor, Tensor)", _quantize_both, _quantize_both_fake
)
register(
    "int8_matmul",
    "(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _int8_matmul,
    _int8_matmul_fake,
)
