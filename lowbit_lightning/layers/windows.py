"""Which pixels of an image the windows of a convolution see, as a table (``kernels.int8_conv``)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

Sizes = tuple[int, ...]
KEPT = 2**27
"""Most elements of all tables that are kept: 512 MiB. A model that sees images of many sizes needs many tables."""


@dataclass(frozen=True)
class Windows:
    """The geometry of a convolution over images of one size; every field has an entry for each dimension of space."""

    size: Sizes
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def results(self) -> Sizes:
        """The size of the result; an entry below 1 means that the kernel is larger than the padded image."""
        sides = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, pad, dilation in sides)

    @property
    def see_one_pixel(self) -> bool:
        """Whether each window is a pixel of the image: the convolution is a matmul."""
        return set(self.kernel) == {1} and set(self.padding) == {0}

    def table(self, device: torch.device) -> Tensor:
        """int32 ``[results, taps]``: the pixel that a tap reads, or -1 outside the image. It is shared: don't write."""
        table = _tables.pop((self, device), None)
        if table is None:
            table = _made(self, device)
            while _tables and table.numel() + sum(map(Tensor.numel, _tables.values())) > KEPT:
                _tables.popitem(last=False)
        _tables[self, device] = table  # at the end: it was used last
        return table


_tables: OrderedDict[tuple[Windows, torch.device], Tensor] = OrderedDict()


def _made(windows: Windows, device: torch.device) -> Tensor:
    pixels, inside = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for d, (n, length) in enumerate(zip(windows.size, windows.results, strict=True)):
        starts = torch.arange(length) * windows.stride[d] - windows.padding[d]
        at = starts[:, None] + torch.arange(windows.kernel[d]) * windows.dilation[d]
        exists = (at >= 0) & (at < n)
        shape = pixels.shape[0] * at.shape[0], pixels.shape[1] * at.shape[1]
        pixels = (pixels[:, None, :, None] * n + at[None, :, None, :]).reshape(shape)
        inside = (inside[:, None, :, None] & exists[None, :, None, :]).reshape(shape)
    return torch.where(inside, pixels, -1).to(torch.int32).to(device)
