"""Every nth pixel of images as rows, in one copy each way: what a strided convolution by a kernel of size 1 reads.

Sliced by torch, the gradient would be written once for each dimension, each time with zeros around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowbit_lightning.kernels.dispatch import declare, is_transformed


def every_nth(x: Tensor, stride: Sequence[int]) -> Tensor:
    """``[pixels, C]``: of images ``[N, C, *size]`` every ``stride``-th pixel in each dimension."""
    if set(stride) == {1}:
        return x.movedim(1, -1).flatten(0, -2)
    if is_transformed():
        return _sliced(x, stride).flatten(0, -2)
    return _every_nth(x, stride)


def _sliced(x: Tensor, stride: Sequence[int]) -> Tensor:
    every = (slice(None), *(slice(None, None, step) for step in stride))
    return x.movedim(1, -1)[every]


def _fake(x: Tensor, stride: Sequence[int]) -> Tensor:
    return x.new_empty(_sliced(x, stride).flatten(0, -2).shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:
    x, ctx.stride = inputs
    ctx.size, ctx.contiguous = x.shape, x.is_contiguous()


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    images, channels, *size = ctx.size
    memory = dy.new_zeros(images, channels, *size) if ctx.contiguous else dy.new_zeros(images, *size, channels)
    dx = memory if ctx.contiguous else memory.movedim(-1, 1)
    some = _sliced(dx, ctx.stride)
    some.copy_(dy.view(some.shape))
    return dx, None


_every_nth = declare(
    "every_nth_pixel(Tensor x, int[] stride) -> Tensor",
    fake=_fake,
    implementation=lambda x, stride: _sliced(x, stride).contiguous().flatten(0, -2),
    setup_context=_setup_context,
    backward=_backward,
)
