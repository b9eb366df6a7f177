"""The products of a convolution that every transform of torch can differentiate and batch; ``product`` says why three
kinds are enough. ``conv_ops`` has the fast path of training.

A convolution and its gradients are the partial derivatives of one trilinear form of x, w and dy. So the derivatives of
each are the two others, and each kind keeps how it is computed, in int8 or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.layers.windows import Sizes, Windows

Geometry = tuple[Sizes, Sizes, Sizes]
"""Stride, padding, dilation."""
Kinds = tuple[bool, bool, bool]
"""Whether the kinds "y", "dx" and "dw" run in int8."""

_NAMES = ("y", "dx", "dw")


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, kinds: Kinds) -> Tensor:
    """The convolution of x ``[N, C, *size]`` by a weight ``[O, C, *kernel]``, in x's dtype."""
    return _Product.apply("y", x, weight, torch.Size(), geometry, kinds)  # type: ignore[no-untyped-call]


def grad_input(dy: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry, kinds: Kinds) -> Tensor:
    """The gradient of ``convolve`` by an input of the shape ``size``, in dy's dtype."""
    return _Product.apply("dx", dy, weight, size, geometry, kinds)  # type: ignore[no-untyped-call]


def grad_weight(dy: Tensor, x: Tensor, size: torch.Size, geometry: Geometry, kinds: Kinds) -> Tensor:
    """The gradient of ``convolve`` by a weight of the shape ``size``, in dy's dtype."""
    return _Product.apply("dw", dy, x, size, geometry, kinds)  # type: ignore[no-untyped-call]


# -- in high precision and in int8 -----------------------------------------------------------------------------------


def high(kind: str, a: Tensor, b: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """The product of a kind by torch, in a's dtype; operands as above."""
    stride, padding, dilation = geometry
    b = b.to(a.dtype)
    none, n = (0,) * len(stride), len(stride)
    if kind == "y":
        return torch.ops.aten.convolution(a, b, None, stride, padding, dilation, False, none, 1)
    x, w = (a.new_empty(1).expand(size), b) if kind == "dx" else (b, a.new_empty(1).expand(size))
    mask = [kind == "dx", kind == "dw", False]
    found = torch.ops.aten.convolution_backward(a, x, w, None, stride, padding, dilation, False, [0] * n, 1, mask)
    return found[0] if kind == "dx" else found[1]


def pixels_of(x: Tensor) -> Tensor:
    """``[pixels, channels]`` of images ``[N, C, *size]``, contiguous."""
    return x.movedim(1, -1).flatten(0, -2).contiguous()


def _int8(kind: str, a: Tensor, b: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    images, x_size, kernel = a.shape[0], *{"y": (a.shape, b.shape), "dx": (size, b.shape), "dw": (b.shape, size)}[kind]
    windows = Windows(tuple(x_size[2:]), tuple(kernel[2:]), *geometry)
    table, taps = windows.table(a.device), torch.Size(windows.kernel).numel()
    if kind == "y":
        of_a, of_b = kernels.quantize_rowwise(pixels_of(a)), kernels.quantize_rowwise(b.movedim(1, -1).flatten(1))
        q = of_b[0].unflatten(1, (taps, -1))
        y = kernels.int8_conv(of_a[0], q, of_a[1], of_b[1], table, images, None, a.dtype)
        return y.unflatten(0, (images, *windows.results)).movedim(-1, 1)
    if kind == "dx":
        of_a, of_b = kernels.quantize_rowwise(pixels_of(a)), kernels.quantize_channels(pixels_of(b))
        q = of_b[0].unflatten(0, (-1, taps))
        pixels = torch.Size(windows.size).numel()
        dx = kernels.int8_conv_input(of_a[0], q, of_a[1], of_b[1], table, images, pixels, a.dtype)
        return dx.unflatten(0, (images, *windows.size)).movedim(-1, 1)
    of_a, of_b = kernels.quantize_colwise(pixels_of(a)), kernels.quantize_channels(pixels_of(b))
    dw = kernels.int8_conv_weight(of_a[0], of_b[0], of_a[1], of_b[1], table, images, a.dtype)
    return dw.unflatten(1, windows.kernel).movedim(-1, 1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(kind: str, a: Tensor, b: Tensor, size: torch.Size, geometry: Geometry, kinds: Kinds) -> Tensor:
        if not kinds[_NAMES.index(kind)] or a.numel() == 0 or b.numel() == 0:
            return high(kind, a, b, size, geometry)
        return _int8(kind, a, b, size, geometry).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.kind, a, b, ctx.size, ctx.geometry, ctx.kinds = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        rest = ctx.geometry, ctx.kinds
        by_a = by_b = None
        if ctx.needs_input_grad[1]:  # of y: x; of dx and dw: dy
            if ctx.kind == "y":
                by_a = grad_input(g, b, a.shape, *rest)
            else:
                by_a = convolve(g, b, *rest) if ctx.kind == "dx" else convolve(b.to(g.dtype), g, *rest)
        if ctx.needs_input_grad[2]:  # of y and dx: w; of dw: x
            if ctx.kind == "dw":
                by_b = grad_input(a, g, b.shape, *rest)
            else:
                by_b = grad_weight(g, a, b.shape, *rest) if ctx.kind == "y" else grad_weight(a, g, b.shape, *rest)
        by_a, by_b = (None if d is None else d.to(x.dtype) for d, x in ((by_a, a), (by_b, b)))
        return None, by_a, by_b, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, da: Tensor | None, db: Tensor | None, *__: None) -> Tensor:  # type: ignore[override]
        a, b = ctx.saved_tensors
        rest = ctx.size, ctx.geometry, ctx.kinds
        by_a = None if da is None else _Product.apply(ctx.kind, da, b, *rest)  # type: ignore[no-untyped-call]
        by_b = None if db is None else _Product.apply(ctx.kind, a, db, *rest)  # type: ignore[no-untyped-call]
        if by_a is None or by_b is None:
            return by_a if by_b is None else by_b  # type: ignore[return-value]
        return by_a + by_b

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any,
        in_dims: tuple,
        kind: str,
        a: Tensor,
        b: Tensor,
        size: torch.Size,
        geometry: Geometry,
        kinds: Kinds,
    ) -> tuple[Tensor, int]:
        """A batch of images by one weight is more images, with the same numbers; others go one by one."""
        _, a_dim, b_dim, *_ = in_dims
        if b_dim is None and kind != "dw":
            a = a.movedim(a_dim, 0)
            size = torch.Size((a.shape[0] * a.shape[1], *size[1:])) if size else size
            y = _Product.apply(kind, a.flatten(0, 1), b, size, geometry, kinds)  # type: ignore[no-untyped-call]
            return y.unflatten(0, a.shape[:2]), 0
        count = info.batch_size
        of_a = [a] * count if a_dim is None else a.movedim(a_dim, 0).unbind()
        of_b = [b] * count if b_dim is None else b.movedim(b_dim, 0).unbind()
        pairs = zip(of_a, of_b, strict=True)
        each = [_Product.apply(kind, *pair, size, geometry, kinds) for pair in pairs]  # type: ignore[no-untyped-call]
        return torch.stack(each), 0
