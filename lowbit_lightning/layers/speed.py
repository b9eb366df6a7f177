"""Which convolutions and experts are faster in int8 on this device: measured, by the sizes that they have seen.

A convolution that has trained once knows the sizes of its images (``Int8Conv.seen``), and experts the number of their
rows. Their forward and backward are then timed in int8 and in high precision, on a few such images, or on some of the
experts. The times are kept for the next run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowbit_lightning.kernels.compile import processor, sources_digest
from lowbit_lightning.layers.conv import Int8Conv, Seen
from lowbit_lightning.layers.grouped_ops import grouped_linear
from lowbit_lightning.layers.int8 import FORMS, Int8Layer, Products
from lowbit_lightning.layers.moe import ExpertsSeen, Int8ExpertsForm, linear_by_groups
from lowbit_lightning.layers.timing import remembered, shortest

MOST_PRODUCTS, ROUNDS, SECONDS = 3e8, 6, 0.4
"""The most products of a timed forward, unless one image or expert has more; rounds, and seconds after which none
begins."""

GAIN = 1.05
"""int8 must be faster by this factor, so that noise does not decide."""

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Times(NamedTuple):
    """Seconds for the forward and backward of a layer, in int8 and in high precision."""

    int8: float
    high: float

    @property
    def pays(self) -> bool:
        return self.high > GAIN * self.int8

    def __str__(self) -> str:
        return f"{self.high / self.int8:.2f} times as fast in int8"


class Shape(Protocol):
    """What decides how long a layer takes; ``str(shape)`` is what a report shows."""

    def __hash__(self) -> int:
        """A shape is timed once."""

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """A function that runs the forward and backward once, in the dtype that the model computes in."""


class ConvShape(NamedTuple):
    """The shape of a convolution."""

    channels: int
    features: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    products: Products
    seen: Seen

    @classmethod
    def of(cls, layer: Int8Conv) -> ConvShape | None:
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

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """See ``Shape``."""
        plain: type = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(self.kernel)]
        sizes = self.channels, self.features, self.kernel, self.stride, self.padding, self.dilation
        dtype = DTYPES[self.seen.dtype]
        layer: Any = (plain if high else FORMS[plain])(*sizes, bias=False, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(_image(self.features, self.channels, self.kernel, True, dtype, device))
        if not high:
            layer.products = self.products
        windows = Int8Conv.windows(layer, torch.empty(1, 1, *self.seen.size, device="meta"))
        each = torch.Size(windows.results).numel() * layer.weight.numel()
        images = max(1, min(self.seen.images, int(MOST_PRODUCTS // max(1, each))))
        x = _image(images, self.channels, self.seen.size, self.seen.channels_last, dtype, device).requires_grad_()
        dy = _image(images, self.features, windows.results, self.seen.channels_last, dtype, device)
        return lambda: torch.autograd.grad(layer(x), (x, layer.weight), dy)


class ExpertsShape(NamedTuple):
    """Of experts: the shapes of their two parameters, whether these are transposed, and what they were trained on."""

    matrices: tuple[tuple[int, ...], ...]
    transposed: bool
    products: Products
    seen: ExpertsSeen

    @classmethod
    def of(cls, layer: Int8ExpertsForm) -> ExpertsShape | None:
        """The shape of a layer; None if it hasn't trained yet."""
        if layer.seen is None:
            return None
        transposed: Any = layer.is_transposed
        return cls(tuple(tuple(w.shape) for w in layer.weights), transposed, layer.products, layer.seen)

    def __str__(self) -> str:
        (experts, *_), _ = self.matrices
        sizes = " and ".join(" x ".join(map(str, shape[1:])) for shape in self.matrices)
        return f"{experts} experts of {sizes}, {self.seen.rows} rows"

    def runner(self, device: torch.device, high: bool) -> Callable[[], object]:
        """See ``Shape``. All experts have equally many rows."""
        experts = self.matrices[0][0]
        rows, dtype = max(1, self.seen.rows // experts), DTYPES[self.seen.dtype]
        each = rows * sum(shape[1] * shape[2] for shape in self.matrices)
        few = max(1, min(experts, int(MOST_PRODUCTS // each)))
        offs = torch.arange(1, few + 1) * rows
        operands = []
        for _, length, width in self.matrices:
            inputs, outputs = (length, width) if self.transposed else (width, length)
            x, weight, dy = (
                _values(*shape, dtype=dtype, device=device)
                for shape in ((few * rows, inputs), (few, length, width), (few * rows, outputs))
            )
            operands.append((x.requires_grad_(), weight.requires_grad_(), dy))

        grouped_mm = getattr(nn.functional, "grouped_mm", None) if dtype == torch.bfloat16 else None  # torch's fastest
        ends = offs.to(device, torch.int32)

        def run() -> None:
            for x, weight, dy in operands:
                if high and grouped_mm is not None:
                    y = grouped_mm(x, weight if self.transposed else weight.mT, offs=ends)
                elif high:
                    y = linear_by_groups(x, weight.mT if self.transposed else weight, offs)
                else:
                    y = grouped_linear(x, weight, offs, None, self.products, self.transposed)
                torch.autograd.grad(y, (x, weight), dy)

        return run


def shape_of(layer: Int8Layer) -> Shape | None:
    """What decides how long the layer takes; None if it hasn't trained yet, or is not to be timed."""
    if isinstance(layer, Int8Conv):
        return ConvShape.of(layer)
    return ExpertsShape.of(layer) if isinstance(layer, Int8ExpertsForm) else None


@cache
def times(shape: Any, device: torch.device) -> Times:
    """The times of a shape, kept from an earlier run or measured now."""
    kind = "convolution" if isinstance(shape, ConvShape) else "experts"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Times(*remembered(kind, machine, sources_digest(), repr(shape), measure=lambda: measure(shape, device)))


def measure(shape: Shape, device: torch.device) -> Times:
    """``times``, measured now."""
    runs = [_without_autocast(shape.runner(device, high), device) for high in (False, True)]
    return Times(*shortest(runs, device, ROUNDS, SECONDS, least=3))


def _without_autocast(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def once() -> None:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            run()

    return once


def _image(
    n: int, channels: int, size: tuple[int, ...], last: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    x = _values(n, *size, channels, dtype=dtype, device=device).movedim(-1, 1)
    return x if last else x.contiguous()


def _values(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed values, because the run's random generators must not be used."""
    values = torch.arange(torch.Size(shape).numel(), device=device).remainder_(251).sub_(125)
    return values.to(dtype).view(shape)
