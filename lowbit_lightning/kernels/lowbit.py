"""Low-bit weights: quantise, dequantise, multiply, look up. ``formats/weights.py`` describes the formats.

A weight ``[..., K]`` is kept as two tensors, ``packed`` uint8 ``[..., packed_width(K)]`` and ``scales``
``[..., scales_width(K)]``, whose rows belong together. Every function takes the format as a ``Format`` or its name.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS
from lowbit_lightning.kernels.checks import check_bias, check_devices, check_dtype
from lowbit_lightning.kernels.dispatch import declare, is_transformed, run, unwatched
from lowbit_lightning.kernels.formats import Format, check_fit, weight_format

FEW_ROWS = 8
"""Products of up to so many rows of x run as ``lowbit_gemv``, which reads the weight once."""


def lowbit_quantize(weight: Tensor, form: str | Format, fit: str | None = None) -> tuple[Tensor, Tensor]:
    """``packed`` and ``scales`` of a weight.

    Args:
        weight: float32, float16 or bfloat16 ``[..., K]``, at least one-dimensional. Blocks lie inside rows of K.
        form: the format.
        fit: ``"absmax"`` (of int8, nf4 and fp4 the default) or ``"lsq"`` (of int4, int3 and int2): see
            ``formats/weights.py``.

    Non-finite values make their block NaN, or their row where the format keeps scales in 8 bits.

    Raises:
        TypeError: if the weight has another dtype.
        ValueError: if it is 0-dimensional, or the format or fit is unknown.
    """
    return _quantize(weight, str(form), fit)


def lowbit_dequantize(
    packed: Tensor, scales: Tensor, form: str | Format, row_length: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight ``[..., K]`` in ``dtype``: float32, float16 or bfloat16. ``row_length`` is K.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    return _dequantize(packed, scales, str(form), row_length, dtype)


def lowbit_matmul(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str | Format) -> Tensor:
    """``x @ weight.T (+ bias)``, differentiable in x and bias. Neither direction keeps a dequantised copy.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        packed, scales: of a weight ``[N, K]``.
        bias: float ``[N]`` or None.
        form: the format.

    Returns:
        ``[..., N]`` in x's dtype, summed in float32. For float32 x no operand is rounded (above 8 rows a GPU
        multiplies as ``torch.backends.cuda.matmul`` says). For bfloat16 x, and on a GPU for float16 x, products may be
        those of x's dtype: the weight is then rounded as if dequantised to it, or less. Beyond float16's range it is
        infinite there if x has more than 32 rows, and in the gradient of x.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    if unwatched(x, packed, scales, bias):
        return run_product(x, packed, scales, bias, str(form))
    if is_transformed():
        return _by_torch(x, packed, scales, bias, str(form))
    return _matmul(x, packed, scales, bias, str(form))


def lowbit_embedding(
    indices: Tensor,
    packed: Tensor,
    scales: Tensor,
    form: str | Format,
    row_length: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows ``indices`` of a table ``[rows, K]``, dequantised to ``dtype``: ``[*indices.shape, K]``.

    Args:
        indices: int32 or int64, from 0 to rows - 1. On a GPU that is the caller's duty; elsewhere it is checked.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
        IndexError: for an index out of range.
    """
    return _embedding(packed, scales, indices, str(form), row_length, dtype)


def int8_outlier_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """``x @ weight.T (+ bias)`` in int8, but for the columns of x that have an outlier (LLM.int8(): Dettmers et al.,
    2022). Differentiable in x and bias.

    A column with a magnitude of at least ``threshold`` is multiplied in x's dtype, with dequantised weights; the rest
    of x is quantised row by row, so that one large channel doesn't take the resolution of the others. Nothing passes
    through float16. Up to 8 rows x is not quantised at all, which is as fast and exact.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        packed, scales: of an ``"int8"`` weight ``[N, K]``.
        bias: float ``[N]`` or None.
        threshold: not negative; 0 quantises every column.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    if is_transformed():
        return _by_torch(x, packed, scales, bias, "int8")
    return _outliers(x, packed, scales, bias, float(threshold))


def _by_torch(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """For transforms of ``torch.func`` and forward-mode AD: the weight is dequantised whole, x is not quantised."""
    weight = _dequantize(packed, scales, form, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


# -- checks: in the ops and their fakes, so that torch.compile meets only the ops -------------------------------------


def _check_weight(weight: Tensor, form: str, fit: str | None) -> tuple[Format, str]:
    f = weight_format(form)
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}; convert it by .float()")
    if weight.ndim == 0:
        raise ValueError("weight must have at least one dimension, got a 0-dimensional tensor")
    return f, check_fit(f, fit)


@cache
def _layout(form: str, row_length: int) -> tuple[int, int, torch.dtype]:
    """The widths of ``packed`` and ``scales``, and the dtype of ``scales``."""
    f = weight_format(form)
    return f.packed_width(row_length), f.scales_width(row_length), f.scales_dtype


def check_form(packed: Tensor, scales: Tensor, form: str, row_length: int) -> None:
    width, scales_width, dtype = _layout(form, int(row_length))  # a symbol of torch.compile gets its value here
    if packed.dtype != torch.uint8 or scales.dtype != dtype:
        raise TypeError(
            f"packed and scales of {form} must be torch.uint8 and {dtype}, got {packed.dtype} and {scales.dtype}"
        )
    shape = packed.shape
    if not shape or shape[-1] != width or scales.shape != (*shape[:-1], scales_width):
        raise ValueError(
            f"packed and scales of {form} with rows of {row_length} must be [..., {width}] and [..., {scales_width}],"
            f" got {tuple(packed.shape)} and {tuple(scales.shape)}"
        )


def _check_rows(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> None:
    check_form(packed, scales, form, row_length)
    check_dtype("dtype", dtype)
    if packed.ndim != 2:
        raise ValueError(f"packed must be [rows, bytes], got shape {tuple(packed.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    check_devices("packed", packed.device, scales=scales, indices=indices)


def _check_product(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> None:
    check_dtype("x's dtype", x.dtype)
    if x.ndim == 0 or packed.ndim != 2:
        raise ValueError(f"x must be [..., K] and packed [N, bytes], got {tuple(x.shape)} and {tuple(packed.shape)}")
    check_form(packed, scales, form, x.shape[-1])
    check_bias(bias, packed.shape[0])
    if not x.device == packed.device == scales.device == (x if bias is None else bias).device:
        check_devices("x", x.device, packed=packed, scales=scales, bias=bias)


# -- what the ops do, and what their results look like ---------------------------------------------------------------


def _run_quantize(weight: Tensor, form: str, fit: str | None) -> tuple[Tensor, Tensor]:
    f, chosen = _check_weight(weight, form, fit)
    return run("lowbit_quantize", weight.device, weight.contiguous(), str(f), chosen)


def _like_quantize(weight: Tensor, form: str, fit: str | None) -> tuple[Tensor, Tensor]:
    f, _ = _check_weight(weight, form, fit)
    *leading, length = weight.shape
    packed = weight.new_empty(*leading, f.packed_width(length), dtype=torch.uint8)
    return packed, weight.new_empty(*leading, f.scales_width(length), dtype=f.scales_dtype)


def _run_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    check_form(packed, scales, form, row_length)
    check_dtype("dtype", dtype)
    return run("lowbit_dequantize", packed.device, packed.contiguous(), scales.contiguous(), form, row_length, dtype)


def _like_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    check_form(packed, scales, form, row_length)
    check_dtype("dtype", dtype)
    return packed.new_empty(*packed.shape[:-1], row_length, dtype=dtype)


def _run_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    _check_rows(packed, scales, indices, form, row_length, dtype)
    operands = packed.contiguous(), scales.contiguous(), indices.contiguous()
    return run("lowbit_embedding", packed.device, *operands, form, row_length, dtype)


def _like_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    _check_rows(packed, scales, indices, form, row_length, dtype)
    return packed.new_empty(*indices.shape, row_length, dtype=dtype)


def run_product(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    _check_product(x, packed, scales, bias, form)
    (*leading, length), outputs = x.shape, packed.shape[0]
    rows = prod(leading)
    if not (rows and outputs and length):
        y = x.new_zeros(*leading, outputs)
        return y if bias is None else y + bias.to(x.dtype)
    packed, scales, bias = packed.contiguous(), scales.contiguous(), None if bias is None else bias.contiguous()
    if rows <= FEW_ROWS:
        return run("lowbit_gemv", x.device, x.contiguous(), packed, scales, bias, form)
    y = run("lowbit_matmul", x.device, x.reshape(rows, length).contiguous(), packed, scales, bias, form)
    return y.view(*leading, outputs)


def _like_product(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    _check_product(x, packed, scales, bias, form)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def run_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    (*leading, outputs), rows = dy.shape, prod(dy.shape[:-1])
    if not (rows and outputs and row_length):
        return dy.new_zeros(*leading, row_length)
    operands = dy.reshape(rows, outputs).contiguous(), packed.contiguous(), scales.contiguous()
    return run("lowbit_matmul_backward", dy.device, *operands, form, row_length).view(*leading, row_length)


def _like_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], row_length)


def _check_outliers(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> None:
    _check_product(x, packed, scales, bias, "int8")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 (no outliers) or positive, got {threshold}")


def _run_outliers(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    _check_outliers(x, packed, scales, bias, threshold)
    (*leading, length), outputs = x.shape, packed.shape[0]
    if prod(leading) <= FEW_ROWS or not (outputs and length):
        return run_product(x, packed, scales, bias, "int8")
    rows, outliers = x.reshape(prod(leading), length).contiguous(), None
    packed, scales, bias = packed.contiguous(), scales.contiguous(), None if bias is None else bias.contiguous()
    if threshold:
        rows, outliers = run("split_outliers", x.device, rows, packed, scales, threshold)
    codes, row_scales = run("quantize_rowwise", x.device, rows, None)
    operands = codes, packed.view(torch.int8), row_scales, scales.flatten()
    if outliers is None:
        y = run("int8_matmul", x.device, *operands, bias, x.dtype)
    else:
        y = (run("int8_matmul", x.device, *operands, bias, torch.float32) + outliers).to(x.dtype)
    return y.view(*leading, outputs)


def _run_split(x: Tensor, packed: Tensor, scales: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    _check_outliers(x, packed, scales, None, threshold)
    operands = x.contiguous(), packed.contiguous(), scales.contiguous()
    rest, product = run("split_outliers", x.device, *operands, threshold)
    return (
        (rest, product) if product is not None else (x.clone(), x.new_zeros(len(x), len(packed), dtype=torch.float32))
    )


def _like_outliers(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    _check_outliers(x, packed, scales, bias, threshold)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, scales, bias, form = inputs
    ctx.save_for_backward(packed, scales)
    ctx.form = form if isinstance(form, str) else "int8"  # the other op has its threshold there
    ctx.row_length, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0] and torch.is_grad_enabled():  # create_graph=True: dx is to be differentiated in turn
        dx = dy @ _dequantize(packed, scales, ctx.form, ctx.row_length, dy.dtype)
    elif ctx.needs_input_grad[0]:
        dx = _matmul_backward(dy, packed, scales, ctx.form, ctx.row_length)
    db = dy.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, None


_quantize = declare(
    "lowbit_quantize(Tensor weight, str form, str? fit) -> (Tensor, Tensor)",
    fake=_like_quantize,
    implementation=_run_quantize,
)
_dequantize = declare(
    "lowbit_dequantize(Tensor packed, Tensor scales, str form, SymInt row_length, ScalarType dtype) -> Tensor",
    fake=_like_dequantize,
    implementation=_run_dequantize,
)
_embedding = declare(
    "lowbit_embedding(Tensor packed, Tensor scales, Tensor indices, str form, SymInt row_length, ScalarType dtype)"
    " -> Tensor",
    fake=_like_embedding,
    implementation=_run_embedding,
)
_matmul_backward = declare(
    "lowbit_matmul_backward(Tensor dy, Tensor packed, Tensor scales, str form, SymInt row_length) -> Tensor",
    fake=_like_backward,
    implementation=run_backward,
)
_gemv = declare(  # the way that lowbit_matmul takes for few rows, by itself
    "lowbit_gemv(Tensor x, Tensor packed, Tensor scales, Tensor? bias, str form) -> Tensor", fake=_like_product
)
_matmul = declare(
    "lowbit_matmul(Tensor x, Tensor packed, Tensor scales, Tensor? bias, str form) -> Tensor",
    fake=_like_product,
    implementation=run_product,
    setup_context=_save,
    backward=_gradients,
)
_split = declare(  # the first step of int8_outlier_matmul, by itself
    "split_outliers(Tensor x, Tensor packed, Tensor scales, float threshold) -> (Tensor, Tensor)",
    fake=lambda x, packed, *_: (
        torch.empty_like(x),
        x.new_empty(x.shape[0], packed.shape[0], dtype=torch.float32),
    ),
    implementation=_run_split,
)
_outliers = declare(
    "int8_outlier_matmul(Tensor x, Tensor packed, Tensor scales, Tensor? bias, float threshold) -> Tensor",
    fake=_like_outliers,
    implementation=_run_outliers,
    setup_context=_save,
    backward=_gradients,
)
