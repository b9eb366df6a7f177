"""Which convolutions are faster in int8 on this device: measured, by the sizes that they have seen.

A convolution that has trained once knows the sizes of its images (``Int8Conv.seen``). Its forward and backward are then
timed in int8 and in high precision, in turns, on a few such images. The times are kept beside the compiled kernels, for
this processor and version of torch, so the next run does not measure again. One thread is timed on a CPU: if threads
wait for each other, other programs decide how long a convolution takes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_lightning.kernels.compile import cache as kept
from lowbit_lightning.kernels.compile import processor
from lowbit_lightning.layers.conv import Int8Conv, Seen
from lowbit_lightning.layers.int8 import FORMS, Products

MOST_PRODUCTS, ROUNDS, SECONDS = 3e8, 5, 0.4
"""Of a forward that is timed, unless one image has more; rounds, and seconds after which no round begins."""

GAIN = 1.05
"""How much faster int8 must be: a coin should not be tossed."""

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
        """None of a layer that hasn't trained yet."""
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


def times_of(shapes: Iterable[Shape], device: torch.device) -> dict[Shape, Times]:
    """The times of each shape, kept from an earlier run or measured now."""
    return {shape: _times(shape, device) for shape in dict.fromkeys(shapes)}


@cache
def _times(shape: Shape, device: torch.device) -> Times:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    described = json.dumps([1, torch.__version__, machine, repr(shape)])
    name = f"convolution-{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"
    entry = kept.find(name)
    if entry is None:
        measured = measure(shape, device)
        kept.store(name, json.dumps(measured).encode())
        return measured
    return Times(*json.loads(kept.body(entry)))


def measure(shape: Shape, device: torch.device) -> Times:
    """The same, measured now: the shortest of several rounds, in which the two take turns."""
    rival, int8 = (_runner(shape, device, high) for high in (True, False))
    best = [float("inf")] * 2
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        for rounds in range(ROUNDS + 1):  # the first one warms up
            if rounds >= 3 and time.perf_counter() - start > SECONDS:
                break
            found = [_once(run, device) for run in (int8, rival)]
            if rounds:
                best = [min(pair) for pair in zip(best, found, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return Times(*best)


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
    """Not random: the run's generators are not ours to draw from."""
    values = torch.arange(n * channels * torch.Size(size).numel(), device=device).remainder_(251).sub_(125)
    x = values.to(dtype).view(n, *size, channels).movedim(-1, 1)
    return x if last else x.contiguous()


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
