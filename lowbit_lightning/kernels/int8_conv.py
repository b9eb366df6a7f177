"""The scaled int8 products of a convolution, whose geometry is a table.

A convolution multiplies, for each pixel of its result (a *result*) and each *tap* of its kernel, a pixel of the image,
its channels side by side, by a row of the weight. ``table [M, T]`` says which pixel of the image that is, or -1 outside
of it. All strides, paddings, dilations and numbers of dimensions are tables. All images of a batch share one.

No patch is written out. In the forward and in the gradient by the input, each *pixel* has a scale, so the exact int32
sum of a tap, over the channels, is scaled before taps are added up in float32. The gradient by the weight contracts the
pixels: both operands have a scale for each *channel*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.checks import check_bias, check_devices, check_dtype, check_scales
from lowbit_lightning.kernels.dispatch import contiguous, declare, run

MOST_CHANNELS = 2**16
"""An int32 holds the sum of this many products, even if all are products of -128."""


def int8_conv(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``out[m, n] = b_scales[n] * sum over t of a_scales[p] * (a[p] . b[n, t]) (+ bias[n])``, ``p = table[m, t]``.

    Args:
        a: int8 ``[images * R, K]``, the pixels; ``a_scales``: float32 ``[images * R]``.
        b: int8 ``[N, T, K]``, the weight; ``b_scales``: float32 ``[N]``.
        table: int32 ``[M, T]`` of numbers from -1 to R - 1; no tap reads a pixel twice.
        images: of the batch, at least 1.
        bias: float ``[N]`` or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[images * M, N]`` of ``out_dtype``.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    _check_table(table, images)
    _check("a", a, (images * _per_image("a", a, 0, images), None), a_scales, "a_scales", 0)
    _check("b", b, (None, table.shape[1], a.shape[1]), b_scales, "b_scales", 0)
    check_bias(bias, b.shape[0])
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales, table=table, bias=bias)
    _check_rest(out_dtype, a.shape[1])
    return _conv(a, b, a_scales, b_scales, table, images, bias, out_dtype)


def int8_conv_input(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    pixels: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient by the input: ``out[p, n] = b_scales[n] * sum over t of a_scales[m] * (a[m] . b[:, t, n])``, over
    the m with ``table[m, t] == p``.

    Args:
        a: int8 ``[images * M, K]``, the incoming gradient; ``a_scales``: float32 ``[images * M]``.
        b: int8 ``[K, T, N]``, the weight; ``b_scales``: float32 ``[N]``.
        table, images, out_dtype: as for ``int8_conv``; ``pixels``: R, of an image.

    Returns:
        ``[images * R, N]`` of ``out_dtype``.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    _check_table(table, images)
    _check("a", a, (images * table.shape[0], None), a_scales, "a_scales", 0)
    _check("b", b, (a.shape[1], table.shape[1], None), b_scales, "b_scales", 2)
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales, table=table)
    _check_rest(out_dtype, a.shape[1])
    return _conv_input(a, b, a_scales, b_scales, table, images, pixels, out_dtype)


def int8_conv_weight(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient by the weight: ``out[n, t, k] = a_scales[n] * b_scales[k] * sum over m of a[n, m] b[p, k]``, with
    ``p = table[m, t]``.

    Args:
        a: int8 ``[N, images * M]``, the transposed incoming gradient; ``a_scales``: float32 ``[N]``.
        b: int8 ``[images * R, K]``, the pixels; ``b_scales``: float32 ``[K]``.
        table, images, out_dtype: as for ``int8_conv``.

    Returns:
        ``[N, T, K]`` of ``out_dtype``. Sums over more than 65,536 results are added in float32.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    _check_table(table, images)
    _check("a", a, (None, images * table.shape[0]), a_scales, "a_scales", 0)
    _check("b", b, (images * _per_image("b", b, 0, images), None), b_scales, "b_scales", 1)
    check_devices("a", a.device, b=b, a_scales=a_scales, b_scales=b_scales, table=table)
    _check_rest(out_dtype, 0)
    return _conv_weight(a, b, a_scales, b_scales, table, images, out_dtype)


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_table(table: Tensor, images: int) -> None:
    if table.dtype != torch.int32 or table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"table must be int32 [M, T], not empty, got {table.dtype} of {tuple(table.shape)}")
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")


def _per_image(name: str, x: Tensor, dim: int, images: int) -> int:
    if x.ndim != 2 or x.shape[dim] % images or not x.shape[dim]:
        raise ValueError(f"{name} must be a matrix with the pixels of {images} images as rows, got {tuple(x.shape)}")
    return x.shape[dim] // images


def _check(name: str, x: Tensor, shape: tuple[int | None, ...], scales: Tensor, scales_name: str, dim: int) -> None:
    if x.dtype != torch.int8:
        raise TypeError(f"{name} must be int8, got {x.dtype}")
    if x.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be of shape [{wanted}], got {tuple(x.shape)}")
    check_scales(scales_name, scales, x.shape[dim])


def _check_rest(out_dtype: torch.dtype, channels: int) -> None:
    if channels > MOST_CHANNELS:
        raise ValueError(f"a must have at most {MOST_CHANNELS} channels, got {channels}")
    check_dtype("out_dtype", out_dtype)


def _on_backend(op: str) -> Callable[..., Tensor]:
    def implementation(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, *rest: Any) -> Tensor:
        a, b, a_scales, b_scales, *others = contiguous(a, b, a_scales, b_scales, *rest)
        return run(op, a.device, (a, a_scales), (b, b_scales), *others)

    return implementation


_conv = declare(
    "int8_conv(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor table, SymInt images, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    fake=lambda a, b, _, __, table, images, ___, dtype: a.new_empty(images * table.shape[0], b.shape[0], dtype=dtype),
    implementation=_on_backend("int8_conv"),
)
_conv_input = declare(
    "int8_conv_input(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor table, SymInt images, SymInt pixels, "
    "ScalarType out_dtype) -> Tensor",
    fake=lambda a, b, _, __, ___, images, pixels, dtype: a.new_empty(images * pixels, b.shape[2], dtype=dtype),
    implementation=_on_backend("int8_conv_input"),
)
_conv_weight = declare(
    "int8_conv_weight(Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor table, SymInt images, "
    "ScalarType out_dtype) -> Tensor",
    fake=lambda a, b, _, __, table, ___, dtype: a.new_empty(a.shape[0], table.shape[1], b.shape[1], dtype=dtype),
    implementation=_on_backend("int8_conv_weight"),
)
