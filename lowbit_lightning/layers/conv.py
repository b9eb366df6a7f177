"""``Int8Conv1d``, ``Int8Conv2d``, ``Int8Conv3d``: convolutions whose three products run in int8.

How it computes
---------------
A window of a convolution sees a pixel of the image with each of its taps. With an image as rows of channels, which is
what ``channels_last`` is in memory, the three products are, over taps t, channels c and output features o::

    y[m, o]      = sum over t, c of x[p(m, t), c] w[o, t, c]
    dx[p, c]     = sum over t, o of dy[m, o] w[o, t, c]            over the m with p(m, t) = p
    dw[o, t, c]  = sum over m    of dy[m, o] x[p(m, t), c]

A convolution by a kernel of size 1 without padding is a matmul of its pixels, and runs as ``Int8Linear`` does.

Scales
------
The first two have a scale for each *pixel* of the image (of the gradient), and one for each output (input) channel of
the weight. A pixel's scale isn't constant along the taps, which are summed too. So the sum over the channels of one tap
is exact in int32; it is scaled by its pixel, and taps are added in float32. That costs some 15 % of a product of 64
channels, 5 % from 256 on, and nothing needs to be quantised twice: all windows share one int8 image. Scales for whole
patches or images would need no float32 in between; docs/convolutions.md compares them. The third contracts the pixels,
so both operands have a scale for each channel. For independent errors, uniform within half a step of their scales::

    var(y[m, o] - exact)     = sum over t of (s_x[p]^2 |w[o, t]|^2 + s_w[o]^2 |x[p]|^2) / 12
    var(dw[o, t, c] - exact) = sum over m of (s_dy[o]^2 x[p, c]^2 + s_x[c]^2 dy[m, o]^2) / 12

Dither
------
Where a network labels pixels, and behind a batch norm, few pixels have most of a channel's gradient, and most are below
half a step of its scale. To nearest these all become zero, in dw, which sums over pixels. One by one they don't matter,
but together they do: a batch norm makes them sum to zero with the large ones. In a UNet dw was off by 8 to 24 %,
where the formula says 0.5 to 8 %, and in the same direction in each batch. So for dw the gradient is dithered
(``kernels.reference.words.dither``): a fixed pattern is added before rounding, whose errors cancel in the sum. It
draws no random numbers. Its variance is twice that of the formula. dx sums the channels of a pixel, and is rounded to
nearest.

Memory
------
The backward gets the image as int8 channels, a byte per element. Patches are never written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning.kernels.dispatch import is_transformed
from lowbit_lightning.layers.conv_ops import int8_convolution
from lowbit_lightning.layers.conv_product import Geometry, convolve
from lowbit_lightning.layers.int8 import Int8Layer, Products, fewest_rows, in_compute_dtype, multiply
from lowbit_lightning.layers.pixels import every_nth
from lowbit_lightning.layers.product import DITHERED, HIGH, INT8
from lowbit_lightning.layers.seen import ImagesSeen, Terms, is_noted
from lowbit_lightning.layers.windows import Windows


class Int8Conv(Int8Layer, nn.modules.conv._ConvNd):
    """What the convolutions of one, two and three dimensions have in common.

    Input ``[N, C, *size]`` or ``[C, *size]``, output alike, in the input's dtype, or autocast's if autocast is on. The
    output is ``channels_last`` if the input or the weight is: that is the form to train in, others are copied into it
    and back. A training step costs three int8 products, as for ``Int8Linear``, and all settings mean the same.

    Raises:
        TypeError, ValueError: in ``forward``, if the input's dtype, device or shape does not fit the weight.
    """

    dilation: Any
    stride: Any
    padding: Any
    seen: ImagesSeen | None = None

    @property
    def kinds(self) -> tuple[int, int, int]:
        """See ``Int8Layer``. Only a matmul of pixels is rotated."""
        one_pixel = set(self.kernel_size) == {1} and (isinstance(self.padding, str) or set(self.padding) == {0})
        forward, grad_input, grad_weight = (k if one_pixel else min(k, INT8) for k in self.products.kinds)
        return forward, grad_input, grad_weight

    @property
    def rounding(self) -> int:
        """See ``Int8Layer``."""
        return DITHERED if self.products.gradient_rounding == "auto" else super().rounding

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out_channels, taps * in_channels]``."""
        return self.weight.movedim(1, -1).flatten(1)

    @property
    def turned_matrix(self) -> Tensor:
        """The weight as ``[out_channels * taps, in_channels]``."""
        return self.weight.movedim(1, -1).flatten(0, -2)

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """The pixels of images ``[N, C, *size]``, ``[pixels, C]``."""
        return x.movedim(1, -1).flatten(0, -2)

    def forward(self, input: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        if input.ndim == dims + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if input.ndim != dims + 2 or input.shape[1] != self.in_channels:
            wanted = f"[N, {self.in_channels}, *size] or [{self.in_channels}, *size] with {dims} dimensions of size"
            raise ValueError(f"input must be of shape {wanted}, got {tuple(input.shape)}")
        windows = self.windows(input)
        if not (self.training or torch.is_grad_enabled()):
            results = input.shape[0] * torch.Size(windows.results).numel()
            if results < fewest_rows(self.weight):
                return self.plain.forward(self, input)
        x = in_compute_dtype(input, self.weight)
        if self.padding == "same":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice)
            windows = self.windows(x)
        if min(windows.results) < 1:
            raise ValueError(f"input is smaller than the kernel: {tuple(input.shape)}, kernel_size={self.kernel_size}")
        return self._convolve(x, windows)

    def windows(self, x: Tensor) -> Windows:
        """The geometry for an input ``[N, C, *size]``; where ``padding="same"``, of the padded one."""
        padding = (0,) * len(self.kernel_size) if isinstance(self.padding, str) else self.padding
        return Windows(tuple(x.shape[2:]), self.kernel_size, self.stride, padding, self.dilation)

    def _convolve(self, x: Tensor, windows: Windows) -> Tensor:
        p = self.products
        if is_noted():
            self.seen = ImagesSeen(x.shape[0], windows.size, is_channels_last(x), Terms.of(x, self.weight))
        last = is_channels_last(x) or is_channels_last(self.weight)
        if windows.see_one_pixel:
            y = multiply(every_nth(x, windows.stride), self.weight.flatten(1), self.bias, p, self.rounding)
            y = y.unflatten(0, (x.shape[0], *windows.results)).movedim(-1, 1)
            return y if last else y.contiguous()
        geometry: Geometry = (windows.stride, windows.padding, windows.dilation)
        forward, grad_input, grad_weight = (kind != HIGH for kind in p.kinds)
        kinds = forward, grad_input, grad_weight
        if is_transformed():
            y = convolve(x, self.weight, geometry, kinds)
            return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * (x.ndim - 2))
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        save_int8 = trains and p.grad_weight != "high" and p.save_inputs == "int8"
        y, *_ = int8_convolution(x, self.weight, self.bias, *geometry, last, *kinds, save_int8, self.rounding)
        return y


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of an image, ``[N, C, *size]``, lie side by side in memory, and its pixels in rows."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


class _Built(Int8Conv):
    """Adds the constructor: the arguments of ``nn.Conv*``, and settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in tuple(kwargs) if name in Products.__dataclass_fields__}
        self.plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.products = Products(**settings)
        if self.groups != 1:
            raise ValueError(f"groups must be 1 in int8, got {self.groups}: use {self.plain.__name__}")
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros' in int8, got {self.padding_mode!r}")


class Int8Conv1d(_Built, nn.Conv1d):
    """``nn.Conv1d`` with its products in int8; arguments as there (``groups=1``), and the fields of ``Products``."""

    plain = nn.Conv1d


class Int8Conv2d(_Built, nn.Conv2d):
    """``nn.Conv2d`` with its products in int8; arguments as there (``groups=1``), and the fields of ``Products``."""

    plain = nn.Conv2d


class Int8Conv3d(_Built, nn.Conv3d):
    """``nn.Conv3d`` with its products in int8; arguments as there (``groups=1``), and the fields of ``Products``."""

    plain = nn.Conv3d
