"""Products of groups of rows (``groups``), each with a weight of its own in low bits: the experts of a mixture.

A group's product is that of ``lowbit_matmul`` on its rows: few rows read the packed weight once, many have it decoded
panel by panel. An expert without rows is not read, and never are all weights decoded at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS
from lowbit_lightning.kernels.checks import check_devices, check_dtype
from lowbit_lightning.kernels.dispatch import declare, is_transformed, unwatched
from lowbit_lightning.kernels.formats import Format
from lowbit_lightning.kernels.groups import check_offs, ends_of, spans, sums_of_groups
from lowbit_lightning.kernels.lowbit import check_form, run_backward, run_product
from lowbit_lightning.kernels.lowbit import lowbit_dequantize as dequantize


def lowbit_grouped_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    form: str | Format,
    row_length: int,
    transposed: bool = False,
) -> Tensor:
    """``x[rows of e] @ weight[e].T (+ bias[e])`` for each group e, differentiable in x and bias.

    Args:
        x: float32, float16 or bfloat16 ``[S, K]``.
        packed, scales: of weights ``[E, N, K]``; of ``[E, K, N]`` if ``transposed``, and the product is then
            ``x[rows of e] @ weight[e]``.
        offs: int32 or int64 ``[E]``, ascending ends of the groups, at most S. One on a GPU is copied to the host.
        bias: float ``[E, N]`` or None.
        form: the format. ``row_length``: the last size of the weights, along which codes are packed.

    Returns:
        ``[S, N]`` in x's dtype, computed as ``lowbit_matmul`` says. Rows of no group are zeros.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    way = _run if unwatched(x, packed, scales, offs, bias) else _by_torch if is_transformed() else _matmul
    return way(x, packed, scales, offs, bias, str(form), row_length, transposed)


def _by_torch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    form: str,
    row_length: int,
    transposed: bool,
) -> Tensor:
    """For transforms of ``torch.func`` and forward-mode AD: each weight is dequantised whole."""
    parts, ends = [], ends_of(offs, len(x))
    for e, (first, last) in enumerate(spans(ends)):
        weight = dequantize(packed[e], scales[e], form, row_length, x.dtype)
        own = None if bias is None else bias[e].to(x.dtype)
        parts.append(torch.nn.functional.linear(x[first:last], weight.T if transposed else weight, own))
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], parts[0].shape[1])])


def _outputs(packed: Tensor, row_length: int, transposed: bool) -> int:
    return row_length if transposed else packed.shape[1]


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    form: str,
    row_length: int,
    transposed: bool,
) -> None:
    check_dtype("x's dtype", x.dtype)
    check_offs(offs)
    if x.ndim != 2 or packed.ndim != 3 or packed.shape[0] != offs.shape[0]:
        shapes = f"{tuple(x.shape)}, {tuple(packed.shape)} and {tuple(offs.shape)}"
        raise ValueError(f"x must be [S, K], packed [E, rows, bytes] and offs [E], got {shapes}")
    check_form(packed, scales, form, row_length)
    if x.shape[1] != (packed.shape[1] if transposed else row_length):
        length = packed.shape[1] if transposed else row_length
        raise ValueError(f"x must have the weights' {length} inputs as columns, got {tuple(x.shape)}")
    groups = packed.shape[0], _outputs(packed, row_length, transposed)
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != groups):
        raise ValueError(f"bias must be float of shape {list(groups)}, got {bias.dtype} of {tuple(bias.shape)}")
    check_devices("x", x.device, packed=packed, scales=scales, bias=bias)


def _run(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    form: str,
    row_length: int,
    transposed: bool,
) -> Tensor:
    _check(x, packed, scales, offs, bias, form, row_length, transposed)
    ends = ends_of(offs, len(x))
    y = x.new_zeros(len(x), _outputs(packed, row_length, transposed))
    for e, (first, last) in enumerate(spans(ends)):
        if first == last:
            continue
        own = None if bias is None else bias[e]
        if not transposed:
            y[first:last] = run_product(x[first:last], packed[e], scales[e], own, form)
            continue
        product = run_backward(x[first:last], packed[e], scales[e], form, row_length)
        y[first:last] = product if own is None else product + own.to(x.dtype)
    return y


def _like(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    _check(x, packed, *rest)
    *_, row_length, transposed = rest
    return x.new_empty(x.shape[0], _outputs(packed, row_length, transposed))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, packed, scales, offs, bias, ctx.form, ctx.row_length, ctx.transposed = inputs
    ctx.save_for_backward(packed, scales, offs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x is a product with the same weights, turned over."""
    packed, scales, offs = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = _matmul(dy, packed, scales, offs, None, ctx.form, ctx.row_length, not ctx.transposed)
    if ctx.needs_input_grad[4]:
        db = sums_of_groups(dy, offs).to(ctx.bias_dtype)
    return dx, None, None, None, db, None, None, None


_matmul = declare(
    "lowbit_grouped_matmul(Tensor x, Tensor packed, Tensor scales, Tensor offs, Tensor? bias, str form, "
    "SymInt row_length, bool transposed) -> Tensor",
    fake=_like,
    implementation=_run,
    setup_context=_save,
    backward=_gradients,
)
