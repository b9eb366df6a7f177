"""The two ops of ``Int8Conv*``: the forward, and the int8 gradients of the backward, as ``ops`` has them for
``Int8Linear``. ``conv_product`` serves higher derivatives and ``torch.func``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.dispatch import declare
from lowbit_lightning.layers import conv_product
from lowbit_lightning.layers.conv_product import high, pixels_of
from lowbit_lightning.layers.ops import unsaved
from lowbit_lightning.layers.product import INT8, forms, seeds_of
from lowbit_lightning.layers.windows import Windows


def _geometry(x_size: Sequence[int], weight_size: Sequence[int], *geometry: Sequence[int]) -> Windows:
    return Windows(tuple(x_size[2:]), tuple(weight_size[2:]), *map(tuple, geometry))  # type: ignore[arg-type]


def _images(pixels: Tensor, images: int, size: Sequence[int], channels_last: bool) -> Tensor:
    """``[N, C, *size]`` of ``[pixels, C]``."""
    x = pixels.unflatten(0, (images, *size)).movedim(-1, 1)
    return x if channels_last else x.contiguous()


def _int8_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    forward: bool,
    grad_input: bool,
    grad_weight: bool,
    save_int8: bool,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution of x ``[N, C, *size]`` by ``weight [O, C, *kernel]``, plus ``bias [O]``, in x's dtype.

    Args:
        channels_last: the memory format of the result.
        forward, grad_input, grad_weight: which products run in int8; the last two only matter to autograd.
        save_int8: give the backward x's int8 channels instead of x: the other two results, int8 ``[pixels, C]`` and
            scales ``[C]``, or else empty.
        rounding: of the incoming gradient: ``product.NEAREST``, ``DITHERED`` or ``STOCHASTIC``.
    """
    windows = _geometry(x.shape, weight.shape, stride, padding, dilation)
    saved = x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    pixels = pixels_of(x)
    if x.numel() == 0 or weight.numel() == 0 or not forward:
        y = high("y", x, weight, torch.Size(), (windows.stride, windows.padding, windows.dilation))
        y = y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(stride))
        y = y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else y.contiguous()
        return y, *(kernels.quantize_channels(pixels) if save_int8 else saved)
    if save_int8:
        xq, x_scales, *channels = kernels.quantize_image(pixels)
        saved = channels[0], channels[1]
    else:
        xq, x_scales = kernels.quantize_rowwise(pixels)
    wq, w_scales = kernels.quantize_rowwise(weight.movedim(1, -1).flatten(1))
    table = windows.table(x.device)
    taps = wq.unflatten(1, (table.shape[1], -1))
    y = kernels.int8_conv(xq, taps, x_scales, w_scales, table, x.shape[0], bias, x.dtype)
    return _images(y, x.shape[0], windows.results, channels_last), *saved


def _int8_convolution_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *geometry, channels_last, _, _, _, save_int8, _ = settings
    windows = _geometry(x.shape, weight.shape, *geometry)
    y = x.new_empty(x.shape[0], *windows.results, weight.shape[0]).movedim(-1, 1)
    pixels, channels = (x.numel() // x.shape[1], x.shape[1]) if save_int8 else (0, 0)
    shape = (pixels, channels) if save_int8 else (0,)
    saved = x.new_empty(shape, dtype=torch.int8), x.new_empty(channels, dtype=torch.float32)
    return y if channels_last else y.contiguous(), *saved


# -- the gradients ---------------------------------------------------------------------------------------------------


def _int8_convolution_backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    xq: Tensor | None,
    x_scales: Tensor | None,
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    weight_last: bool,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rounding: int,
) -> tuple[Tensor, Tensor]:
    """The gradients by the input and by the weight, in int8, of ``dy [N, O, *results]``.

    Without ``weight`` the first result is empty; without x and its channels ``xq``, ``x_scales`` (either will do) the
    second. ``channels_last``, ``weight_last``: their memory formats. ``rounding``: of dy, as for ``int8_linear``.
    """
    wants_x, wants_weight = weight is not None, x is not None or xq is not None
    dx, dw = dy.new_empty(0, dtype=x_dtype), dy.new_empty(0, dtype=weight_dtype)
    if dy.numel() == 0 or 0 in x_size or 0 in weight_size:
        dx = _empty(dy, wants_x, x_size, channels_last, x_dtype).zero_()
        return dx, _empty(dy, wants_weight, weight_size, weight_last, weight_dtype).zero_()
    windows, images = _geometry(x_size, weight_size, stride, padding, dilation), x_size[0]
    table = windows.table(dy.device)
    rows, seeds = pixels_of(dy), seeds_of(rounding)
    if wants_x and wants_weight:
        row_q, row_scales, column_q, column_scales = forms(rows, INT8, INT8, seeds)
    elif wants_x:
        row_q, row_scales = kernels.quantize_rowwise(rows, seeds[0])
    else:
        column_q, column_scales = kernels.quantize_colwise(rows, seeds[1])
    if weight is not None:
        wq, w_scales = kernels.quantize_channels(pixels_of(weight))
        taps = wq.unflatten(0, (-1, table.shape[1]))
        pixels = torch.Size(windows.size).numel()
        dx = kernels.int8_conv_input(row_q, taps, row_scales, w_scales, table, images, pixels, x_dtype)
        dx = _images(dx, images, windows.size, channels_last)
    if wants_weight:
        if xq is None or x_scales is None:
            assert x is not None
            xq, x_scales = kernels.quantize_channels(pixels_of(x))
        dw = kernels.int8_conv_weight(column_q, xq, column_scales, x_scales, table, images, weight_dtype)
        dw = dw.unflatten(1, windows.kernel).movedim(-1, 1)
        dw = dw if weight_last else dw.contiguous()
    return dx, dw


def _empty(dy: Tensor, exists: bool, size: Sequence[int], last: bool, dtype: torch.dtype) -> Tensor:
    """A gradient of ``size``, in the memory format that ``last`` says; without elements if it is not wanted."""
    if not exists:
        return dy.new_empty(0, dtype=dtype)
    return _images(dy.new_empty(size[0] * torch.Size(size[2:]).numel(), size[1], dtype=dtype), size[0], size[2:], last)


def _int8_convolution_backward_fake(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, xq: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, x_size, weight_size, _, _, _, channels_last, weight_last, x_dtype, weight_dtype, _ = rest
    dx = _empty(dy, weight is not None, x_size, channels_last, x_dtype)
    return dx, _empty(dy, x is not None or xq is not None, weight_size, weight_last, weight_dtype)


int8_convolution_backward = declare(
    "int8_convolution_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor? xq, Tensor? x_scales, SymInt[] x_size, "
    "SymInt[] weight_size, int[] stride, int[] padding, int[] dilation, bool channels_last, bool weight_last, "
    "ScalarType x_dtype, ScalarType weight_dtype, int rounding) -> (Tensor, Tensor)",
    fake=_int8_convolution_backward_fake,
    implementation=_int8_convolution_backward,
)


# -- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.geometry, ctx.channels_last, f, i, w, save_int8, ctx.rounding = inputs
    ctx.kinds = f, i, w
    _, xq, x_scales = output
    ctx.mark_non_differentiable(xq, x_scales)
    ctx.set_materialize_grads(False)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    saved = (None, xq, x_scales) if save_int8 else (x, None, None)
    ctx.save_for_backward(weight if needs_x else None, *(saved if needs_weight else (None, None, None)))
    ctx.x_size, ctx.weight_size = x.shape, weight.shape
    ctx.weight_last = not weight.is_contiguous()
    ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    weight, x, xq, x_scales = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    _, grad_input, grad_weight = ctx.kinds
    stride, padding, dilation = (tuple(sizes) for sizes in ctx.geometry)
    geometry = stride, padding, dilation
    dx = dw = db = None
    if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated in turn
        if needs_x:
            dx = conv_product.grad_input(dy, weight, ctx.x_size, geometry, ctx.kinds).to(ctx.x_dtype)
        if needs_weight:
            if x is None:
                x = unsaved((xq.float() * x_scales).view(ctx.x_size[0], *ctx.x_size[2:], -1).movedim(-1, 1))
            dw = conv_product.grad_weight(dy, x, ctx.weight_size, geometry, ctx.kinds).to(ctx.weight_dtype)
    else:
        int8_x, int8_weight = needs_x and grad_input, needs_weight and grad_weight
        if int8_x or int8_weight:
            operands = weight if int8_x else None, *((x, xq, x_scales) if int8_weight else (None, None, None))
            formats = ctx.channels_last, ctx.weight_last, ctx.x_dtype, ctx.weight_dtype, ctx.rounding
            dx, dw = int8_convolution_backward(dy, *operands, ctx.x_size, ctx.weight_size, *geometry, *formats)
        if not int8_x:
            dx = high("dx", dy, weight, ctx.x_size, geometry).to(ctx.x_dtype) if needs_x else None
        if not int8_weight:
            dw = high("dw", dy, x, ctx.weight_size, geometry).to(ctx.weight_dtype) if needs_weight else None
    if needs_bias:
        db = dy.sum((0, *range(2, dy.ndim)), dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db, *(None,) * 9


int8_convolution = declare(
    "int8_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "bool channels_last, bool forward, bool grad_input, bool grad_weight, bool save_int8, int rounding) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_int8_convolution_fake,
    implementation=_int8_convolution,
    setup_context=_setup_context,
    backward=_backward,
)
