"""Which convolutions are faster in int8 on this device: measured, by the sizes that they have seen.

A convolution that has trained once knows the sizes of its images (``Int8Conv.seen``). Its forward and backward are then
timed in int8 and in high precision, on a few such images. The times are kept for the next run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_lightning.kernels.compile import processor
from lowbit_lightning.layers.conv import Int8Conv, Seen
from lowbit_lightning.layers.int8 import FORMS, Products
from lowbit_lightning.layers.timing import remembered, shortest

MOST_PRODUCTS, ROUNDS, SECONDS = 3e8, 6, 0.4
"""The most products of a timed forward, unless one image has more; rounds, and seconds after which none begins."""

GAIN = 1.05
"""int8 must be faster by this factor, so that noise does not decide."""

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Times(NamedTuple):
    """Seconds for the forward and backward of a convolution, in int8 and in high precision."""

    int8: float
    high: float

    @property
    def pays(self) -> bool:
        return self.high > GAIN * self.int8

    def __str__(self) -> str:
        return f"{self.high / self.int8:.2f} times as fast in int8"


class Shape(NamedTuple):
    """What decides how long a convolution takes; ``str(shape)`` is what a report shows."""

    channels: int
    features: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    products: Products
    seen: Seen

    @classmethod
    def of(cls, layer: Int8Conv) -> Shape | None:
        """The shape of a layer; None if it hasn't trained yet."""
        if layer.seen is None:
            return None
        padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else tuple(layer.padding)
        sizes = tuple(layer.kernel_size), tuple(layer.stride), padding, tuple(layer.dilation)
        return cls(layer.in_channels, layer.out_channels, *sizes, layer.products, layer.seen)

    def __str__(self) -> str:
        kernel, size = (" x ".join(map(str, sizes)) for sizes in (self.kernel, self.seen.size))
        stride = "" if set(self.stride) == {1} else f", stride {self.stride[0]}"
        channels = f"{self.channels} to {self.features} channels"
        return f"{kernel}{stride}, {channels}, {self.seen.images} images of {size}"


@cache
def times(shape: Shape, device: torch.device) -> Times:
    """The times of a shape, kept from an earlier run or measured now."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Times(*remembered("convolution", machine, repr(shape), measure=lambda: measure(shape, device)))


def measure(shape: Shape, device: torch.device) -> Times:
    """``times``, measured now."""
    runs = [_runner(shape, device, high) for high in (False, True)]
    return Times(*shortest(runs, device, ROUNDS, SECONDS, least=3))


def _runner(shape: Shape, device: torch.device, high: bool) -> Callable[[], object]:
    """Runs the forward and backward of a convolution of this shape once, in the dtype that the model computes in."""
    plain: type = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape.kernel)]
    sizes = shape.channels, shape.features, shape.kernel, shape.stride, shape.padding, shape.dilation
    dtype = DTYPES[shape.seen.dtype]
    layer: Any = (plain if high else FORMS[plain])(*sizes, bias=False, device="meta", dtype=dtype)
    layer.weight = nn.Parameter(_image(shape.features, shape.channels, shape.kernel, True, dtype, device))
    if not high:
        layer.products = shape.products
    windows = Int8Conv.windows(layer, torch.empty(1, 1, *shape.seen.size, device="meta"))
    each = torch.Size(windows.results).numel() * layer.weight.numel()
    images = max(1, min(shape.seen.images, int(MOST_PRODUCTS // max(1, each))))
    x = _image(images, shape.channels, shape.seen.size, shape.seen.channels_last, dtype, device).requires_grad_()
    dy = _image(images, shape.features, windows.results, shape.seen.channels_last, dtype, device)

    def run() -> None:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            torch.autograd.grad(layer(x), (x, layer.weight), dy)

    return run


def _image(
    n: int, channels: int, size: tuple[int, ...], last: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An image of fixed values, because the run's random generators must not be used."""
    values = torch.arange(n * channels * torch.Size(size).numel(), device=device).remainder_(251).sub_(125)
    x = values.to(dtype).view(n, *size, channels).movedim(-1, 1)
    return x if last else x.contiguous()
