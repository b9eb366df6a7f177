"""The products of a linear layer whose rows are sorted into groups, each with a weight of its own: as ``ops`` has them
for one weight, an op for the forward and one for the int8 gradients. ``layers.moe`` uses them.

The three products of group e, with rows x and dy, are those of a linear layer. The first two are matmuls of rows, with
one weight for each group (``kernels.int8_grouped_matmul``); the third contracts a group's rows
(``kernels.int8_grouped_outer``), so x and dy are quantised along the rows of each group by itself. So a group's numbers
are those of ``int8_linear`` on its rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.dispatch import declare, is_transformed
from lowbit_lightning.kernels.groups import columns_of, ends_of, spans, sums_of_groups
from lowbit_lightning.layers.int8 import Products
from lowbit_lightning.layers.ops import unsaved
from lowbit_lightning.layers.product import HIGH, INT8, ROTATED, Kinds, form, product

Form = tuple[Tensor, Tensor]
"""int8 values, and their scales."""


def grouped_linear(
    x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None, products: Products, transposed: bool = False
) -> Tensor:
    """``x[rows of e] @ weight[e].T + bias[e]`` for each group e, as ``products`` says, in x's dtype.

    Args:
        x: float32, float16 or bfloat16 ``[S, K]``.
        weight: float ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``.
        offs: int32 or int64 ``[E]``, the groups' ends (``kernels.int8_grouped``). One on a GPU is copied to the host.
        bias: float ``[E, N]`` or None.

    Returns:
        ``[S, N]``; rows of no group are zeros.

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit.
    """
    length = weight.shape[1 if transposed else -1] if weight.ndim == 3 else None
    if x.ndim != 2 or x.shape[1] != length or len(offs) != len(weight):
        raise ValueError(
            f"x [S, K], weight {'[E, K, N]' if transposed else '[E, N, K]'} and offs [E] do not fit: "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(offs.shape)}"
        )
    if is_transformed():
        return _by_products(x, weight.mT if transposed else weight, bias, offs, products.kinds)
    trains = weight.requires_grad and torch.is_grad_enabled()
    save_int8 = trains and products.grad_weight != "high" and products.save_inputs == "int8"
    settings = *products.kinds, save_int8, products.gradient_rounding == "stochastic"
    y, *_ = int8_grouped_linear(x, weight, bias, offs, transposed, *settings)
    return y


# -- int8 forms ------------------------------------------------------------------------------------------------------


def _columns(x: Tensor, offs: Tensor, kind: int, seed: int | None = None) -> Form:
    """The group columns of x ``[S, C]``, rotated along the rows of each group where ``kind`` says so."""
    return kernels.quantize_group_columns(_rotated(x, offs) if kind == ROTATED else x, offs, seed)


def _rotated(x: Tensor, offs: Tensor) -> Tensor:
    return torch.cat([kernels.hadamard(x[a:b], 0) for a, b in spans([*ends_of(offs, len(x)), len(x)])])


def _forms(x: Tensor, offs: Tensor, rows: int, columns: int, seed: int | None = None) -> tuple[Form, Form]:
    """The int8 rows of x, and its group columns; in one op where neither is rotated."""
    if rows == columns == INT8:
        q, scales, *rest = kernels.quantize_groups(x, offs, seed)
        return (q, scales), (rest[0], rest[1])
    return form(x, 1, rows, seed), _columns(x, offs, columns, seed)


def _form_of_weights(weight: Tensor, dim: int, kind: int) -> Form:
    """Of ``[E, R, C]``, for products that contract ``dim``: ``[E, R, C]`` for 2, ``[E, C, R]`` for 1."""
    groups, rows, columns = weight.shape
    flat = weight.reshape(groups * rows, columns)
    if dim == 2:
        q, scales = form(flat, 1, kind)
        return q.view(weight.shape), scales.view(groups, rows)
    q, scales = _columns(flat, torch.arange(rows, groups * rows + 1, rows), kind)
    return q.view(groups, columns, rows), scales


# -- the forward -----------------------------------------------------------------------------------------------------


def _int8_grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offs: Tensor,
    transposed: bool,
    forward: int,
    grad_input: int,
    grad_weight: int,
    save_int8: bool,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``grouped_linear``, and ``ops.int8_linear`` for what it returns besides: here the group columns of x, int8
    ``[S, K]``, and their scales ``[E, K]``, or empty tensors."""
    saved = x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    if x.numel() == 0 or weight.numel() == 0 or forward == HIGH:
        if save_int8:
            saved = _columns(x, offs, grad_weight)
        return _high(x, weight.mT if transposed else weight, bias, offs), *saved
    if save_int8:
        (xq, x_scales), saved = _forms(x, offs, forward, grad_weight)
    else:
        xq, x_scales = form(x, 1, forward)
    wq, w_scales = _form_of_weights(weight, 1 if transposed else 2, forward)
    return kernels.int8_grouped_matmul(xq, wq, x_scales, w_scales, offs, bias, x.dtype), *saved


def _int8_grouped_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor, transposed: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, save_int8, _ = settings
    shape, scales = (x.shape, (len(weight), x.shape[1])) if save_int8 else ((0,), (0,))
    saved = torch.empty(shape, dtype=torch.int8, device=x.device), x.new_empty(scales, dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1]), *saved


def _high(x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor) -> Tensor:
    """In x's dtype, of ``weight [E, N, K]``."""
    y = x.new_zeros(len(x), weight.shape[1])
    for e, (first, last) in enumerate(spans(ends_of(offs, len(x)))):
        own = None if bias is None else bias[e].to(x.dtype)
        y[first:last] = nn.functional.linear(x[first:last], weight[e].to(x.dtype), own)
    return y


# -- the gradients ---------------------------------------------------------------------------------------------------


def _int8_grouped_linear_backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    xq: Tensor | None,
    x_scales: Tensor | None,
    offs: Tensor,
    transposed: bool,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    grad_input: int,
    grad_weight: int,
    stochastic: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients by the input, ``[S, K]``, and by the weights, of ``dy [S, N]``; arguments as in
    ``ops.int8_linear_backward``. A kind that is ``HIGH`` gives its gradient in dy's dtype, from ``weight`` or ``x``."""
    dx, dw = dy.new_empty(0, dtype=x_dtype), dy.new_empty(0, dtype=weight_dtype)
    other = x if xq is None else xq
    if dy.numel() == 0 or (weight is not None and weight.numel() == 0) or (other is not None and other.numel() == 0):
        return _zeros(dy, weight, other, offs, transposed, x_dtype, weight_dtype)
    seed = int(torch.randint(2**63 - 1, ())) if stochastic else None
    int8_x, int8_weight = weight is not None and grad_input != HIGH, other is not None and grad_weight != HIGH
    if int8_x and int8_weight:
        (rows, row_scales), (columns, column_scales) = _forms(dy, offs, grad_input, grad_weight, seed)
    elif int8_x:
        rows, row_scales = form(dy, 1, grad_input, seed)
    elif int8_weight:
        columns, column_scales = _columns(dy, offs, grad_weight, seed)
    if int8_x:
        assert weight is not None
        wq, w_scales = _form_of_weights(weight, 2 if transposed else 1, grad_input)
        dx = kernels.int8_grouped_matmul(rows, wq, row_scales, w_scales, offs, None, x_dtype)
    elif weight is not None:
        dx = _high(dy, weight if transposed else weight.mT, None, offs).to(x_dtype)
    if int8_weight:
        if xq is None or x_scales is None:
            assert x is not None
            xq, x_scales = _columns(x, offs, grad_weight)
        a, b = ((columns, column_scales), (xq, x_scales))[:: -1 if transposed else 1]
        dw = kernels.int8_grouped_outer(a[0], b[0], a[1], b[1], offs, weight_dtype)
    elif x is not None:
        a_rows, b_rows = (dy, x.to(dy.dtype))[:: -1 if transposed else 1]
        ends = ends_of(offs, len(x))
        dw = torch.stack([a_rows[i:j].T @ b_rows[i:j] for i, j in spans(ends)]).to(weight_dtype)
    return dx, dw


def _zeros(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    offs: Tensor,
    transposed: bool,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The results where there is nothing to sum; their shapes otherwise."""
    dx = (0,) if weight is None else (dy.shape[0], weight.shape[1 if transposed else 2])
    sizes = () if x is None else (dy.shape[1], x.shape[1])[:: -1 if transposed else 1]
    dw = (0,) if x is None else (offs.shape[0], *sizes)
    return dy.new_zeros(dx, dtype=x_dtype), dy.new_zeros(dw, dtype=weight_dtype)


def _zeros_of(dy: Tensor, weight: Any, x: Any, xq: Any, scales: Any, offs: Tensor, *settings: Any) -> Any:
    return _zeros(dy, weight, x if xq is None else xq, offs, *settings[:3])


int8_grouped_linear_backward = declare(
    "int8_grouped_linear_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor? xq, Tensor? x_scales, Tensor offs, "
    "bool transposed, ScalarType x_dtype, ScalarType weight_dtype, int grad_input, int grad_weight, bool stochastic) "
    "-> (Tensor, Tensor)",
    fake=_zeros_of,
    implementation=_int8_grouped_linear_backward,
)


# -- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, offs, ctx.transposed, *ctx.kinds, save_int8, ctx.stochastic = inputs
    _, xq, x_scales = output
    ctx.mark_non_differentiable(xq, x_scales)
    ctx.set_materialize_grads(False)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    saved = (None, xq, x_scales) if save_int8 else (x, None, None)
    ctx.save_for_backward(offs, weight if needs_x else None, *(saved if needs_weight else (None, None, None)))
    ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    offs, weight, x, xq, x_scales = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    forward, grad_input, grad_weight = ctx.kinds
    dx = dw = db = None
    if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated in turn
        if needs_x:
            by_outputs = weight if ctx.transposed else weight.mT
            dx = _by_products(dy, by_outputs, None, offs, (grad_input, forward, grad_weight)).to(ctx.x_dtype)
        if needs_weight:
            inputs = _inputs(x, xq, x_scales, offs, grad_weight)
            dw = _outer_by_products(dy, inputs, offs, (grad_weight, forward, grad_input)).to(ctx.weight_dtype)
            dw = dw.mT if ctx.transposed else dw
    elif needs_x or needs_weight:
        settings = ctx.transposed, ctx.x_dtype, ctx.weight_dtype, grad_input, grad_weight, ctx.stochastic
        found = int8_grouped_linear_backward(dy, weight, x, xq, x_scales, offs, *settings)
        dx, dw = found[0] if needs_x else None, found[1] if needs_weight else None
    if needs_bias:
        db = sums_of_groups(dy, offs).to(ctx.bias_dtype)
    return dx, dw, db, *(None,) * 7


# -- by ``product``, which every transform can differentiate ---------------------------------------------------------


def _by_products(x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor, kinds: Kinds) -> Tensor:
    """``grouped_linear`` of ``weight [E, N, K]``."""
    ends = ends_of(offs, len(x))
    parts = [product(x[a:b], weight[e], kinds) for e, (a, b) in enumerate(spans(ends))]
    if bias is not None:
        parts = [y + own.to(y.dtype) for y, own in zip(parts, bias, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[1])])


def _outer_by_products(dy: Tensor, x: list[Tensor], offs: Tensor, kinds: Kinds) -> Tensor:
    """``[E, N, K]`` of each group's rows."""
    rows = zip(spans(ends_of(offs, len(dy))), x, strict=True)
    return torch.stack([product(dy[a:b].T, own.T.to(dy.dtype), kinds) for (a, b), own in rows])


def _inputs(x: Tensor | None, xq: Tensor, x_scales: Tensor, offs: Tensor, kind: int) -> list[Tensor]:
    """The rows of each group, as they were saved."""
    if x is not None:
        return [x[a:b] for a, b in spans(ends_of(offs, len(x)))]
    found = []
    for (a, b), scales in zip(spans(ends_of(offs, len(xq))), x_scales, strict=True):
        values = columns_of(xq, a, b).float() * scales[:, None]
        found.append(unsaved((kernels.hadamard(values, 1) if kind == ROTATED else values).T))
    return found


int8_grouped_linear = declare(
    "int8_grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor offs, bool transposed, int forward, "
    "int grad_input, int grad_weight, bool save_int8, bool stochastic) -> (Tensor, Tensor, Tensor)",
    fake=_int8_grouped_linear_fake,
    implementation=_int8_grouped_linear,
    setup_context=_setup_context,
    backward=_backward,
)
