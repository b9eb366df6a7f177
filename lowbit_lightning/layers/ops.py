"""The two ops of ``Int8Linear``: its forward, and the int8 gradients of its backward.

Opaque to torch.compile and to autograd, which sees one op in each direction. ``product`` serves what these two don't:
higher derivatives and ``torch.func``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.dispatch import declare
from lowbit_lightning.layers.product import HIGH, ROTATED, form, form_of_weight, forms, product, seeds_of


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: int,
    grad_input: int,
    grad_weight: int,
    save_int8: bool,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x @ weight.T + bias`` of ``x [M, K]``, ``weight [N, K]``, ``bias [N]``, in x's dtype.

    Args:
        forward, grad_input, grad_weight: how the products run (``product.HIGH``, ``INT8`` or ``ROTATED``); of the last
            two only the form of what is saved depends here.
        save_int8: give the backward x's int8 columns instead of x. An op can save only what it takes or returns, so
            they are its other two results: int8 ``[K, M]`` and scales ``[K]``, or else empty.
        rounding: of the incoming gradient: ``product.NEAREST``, ``DITHERED`` or ``STOCHASTIC``.
    """
    saved = x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    if x.numel() == 0 or weight.numel() == 0:
        if save_int8:
            saved = x.new_zeros(x.shape[::-1], dtype=torch.int8), x.new_zeros(x.shape[1], dtype=torch.float32)
        return _high(x, weight, bias), *saved
    if forward == HIGH:
        return _high(x, weight, bias), *(form(x, 0, grad_weight) if save_int8 else saved)
    if save_int8:
        xq, x_scales, *columns = forms(x, forward, grad_weight)
        saved = columns[0], columns[1]
    else:
        xq, x_scales = form(x, 1, forward)
    wq, w_scales = form_of_weight(weight, forward)
    y = kernels.int8_matmul(xq, wq, x_scales, w_scales, bias, x.dtype)
    return y, *saved


def _int8_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: int,
    grad_input: int,
    grad_weight: int,
    save_int8: bool,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, length = (x.shape[::-1], x.shape[1]) if save_int8 else (0, 0)
    saved = x.new_empty(shape, dtype=torch.int8), x.new_empty(length, dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0]), *saved


def _high(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


# -- the gradients ---------------------------------------------------------------------------------------------------


def _int8_linear_backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    xq: Tensor | None,
    x_scales: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    grad_input: int,
    grad_weight: int,
    rounding: int,
) -> tuple[Tensor, Tensor]:
    """``dy @ weight [M, K]`` and ``dy.T @ x [N, K]`` in int8, of ``dy [M, N]``; dy's two forms come from one op.

    Without ``weight [N, K]`` the first result is empty; without ``x [M, K]`` and its columns ``xq [K, M]``,
    ``x_scales [K]`` (one of the two is enough) the second. ``grad_input``, ``grad_weight``: ``INT8`` or ``ROTATED``
    (the latter as xq, where it is given). ``rounding``: of dy, ``NEAREST``, ``DITHERED`` or ``STOCHASTIC``.
    """
    dx, dw = dy.new_empty(0, dtype=x_dtype), dy.new_empty(0, dtype=weight_dtype)
    other = x if xq is None else xq
    if dy.numel() == 0 or (weight is not None and weight.numel() == 0) or (other is not None and other.numel() == 0):
        return _zeros(dy, weight, x, xq, x_dtype, weight_dtype)
    seeds = seeds_of(rounding)
    if weight is not None and other is not None:
        rows, row_scales, columns, column_scales = forms(dy, grad_input, grad_weight, seeds)
    elif weight is not None:
        rows, row_scales = form(dy, 1, grad_input, seeds[0])
    else:
        columns, column_scales = form(dy, 0, grad_weight, seeds[1])
    if weight is not None:
        wq, w_scales = form_of_weight(weight.T, grad_input)
        dx = kernels.int8_matmul(rows, wq, row_scales, w_scales, None, x_dtype)
    if other is not None:
        if xq is None or x_scales is None:
            xq, x_scales = form(other, 0, grad_weight)
        dw = kernels.int8_matmul(columns, xq, column_scales, x_scales, None, weight_dtype)
    return dx, dw


def _zeros(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    xq: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The results if there is nothing to sum; otherwise tensors of their shapes."""
    dx = (0,) if weight is None else (dy.shape[0], weight.shape[1])
    dw = (dy.shape[1], x.shape[1]) if x is not None else (0,) if xq is None else (dy.shape[1], xq.shape[0])
    return dy.new_zeros(dx, dtype=x_dtype), dy.new_zeros(dw, dtype=weight_dtype)


int8_linear_backward = declare(
    "int8_linear_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor? xq, Tensor? x_scales, ScalarType x_dtype, "
    "ScalarType weight_dtype, int grad_input, int grad_weight, int rounding) -> (Tensor, Tensor)",
    fake=lambda dy, weight, x, xq, _, *settings: _zeros(dy, weight, x, xq, *settings[:2]),
    implementation=_int8_linear_backward,
)


# -- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.kinds, save_int8, ctx.rounding = inputs
    _, xq, x_scales = output
    ctx.mark_non_differentiable(xq, x_scales)
    ctx.set_materialize_grads(False)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    saved = (None, xq, x_scales) if save_int8 else (x, None, None)
    ctx.save_for_backward(weight if needs_x else None, *(saved if needs_weight else (None, None, None)))
    ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    weight, x, xq, x_scales = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    forward, grad_input, grad_weight = ctx.kinds
    dx = dw = db = None
    if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated in turn
        if needs_x:
            dx = product(dy, weight.T, (grad_input, forward, grad_weight)).to(ctx.x_dtype)
        if needs_weight:
            if x is None:
                values = xq.float() * x_scales[:, None]
                x = unsaved((kernels.hadamard(values, 1) if grad_weight == ROTATED else values).T)
            dw = product(dy.T, x.T, (grad_weight, forward, grad_input)).to(ctx.weight_dtype)
    else:
        int8_x, int8_weight = needs_x and grad_input != HIGH, needs_weight and grad_weight != HIGH
        if int8_x or int8_weight:
            operands = weight if int8_x else None, *((x, xq, x_scales) if int8_weight else (None, None, None))
            dtypes = ctx.x_dtype, ctx.weight_dtype
            dx, dw = int8_linear_backward(dy, *operands, *dtypes, grad_input, grad_weight, ctx.rounding)
        if not int8_x:
            dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype) if needs_x else None
        if not int8_weight:
            dw = (dy.T @ x.to(dy.dtype)).to(ctx.weight_dtype) if needs_weight else None
    if needs_bias:
        db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db, *(None,) * 5


def unsaved(values: Tensor) -> Tensor:
    """An input of which only the int8 form was kept, as ``values``: a derivative that would flow on into it raises."""
    return _Unsaved.apply(values.requires_grad_())  # type: ignore[no-untyped-call]


class _Unsaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # type: ignore[override]
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "a second derivative runs through the gradient of an int8 layer's weight into the layer's input, which "
            "save_inputs='int8' keeps only in int8: use save_inputs='high' to differentiate gradients of weights"
        )


int8_linear = declare(
    "int8_linear(Tensor x, Tensor weight, Tensor? bias, int forward, int grad_input, int grad_weight, "
    "bool save_int8, int rounding) -> (Tensor, Tensor, Tensor)",
    fake=_int8_linear_fake,
    implementation=_int8_linear,
    setup_context=_setup_context,
    backward=_backward,
)
