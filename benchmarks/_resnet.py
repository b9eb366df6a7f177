"""The convolutions of ResNet-50 (He et al., 2016; strides in the 3 x 3, as torchvision has them)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Convolution:
    """A kind of convolution: kernel, stride, channels, features, the size of its images, and how many there are."""

    kernel: int
    stride: int
    channels: int
    features: int
    size: int
    count: int

    def __str__(self) -> str:
        kind = f"{self.kernel} x {self.kernel}" + (f", stride {self.stride}" if self.stride > 1 else "")
        return f"{kind}, {self.channels} to {self.features}, {self.size} x {self.size}"

    def layer(self, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
        return kind(self.channels, self.features, self.kernel, self.stride, self.kernel // 2, bias=False)


def resnet50() -> list[Convolution]:
    """The convolutions of ResNet-50 for images of 224 x 224, all but the first."""
    found: dict[tuple[int, int, int, int, int], int] = {}
    channels, size = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for place in range(depth):
            stride = 2 if stage and not place else 1
            kinds = [(1, 1, channels, width, size), (3, stride, width, width, size)]
            if not place:
                kinds.append((1, stride, channels, 4 * width, size))
            size //= stride
            for kind in (*kinds, (1, 1, width, 4 * width, size)):
                found[kind] = found.get(kind, 0) + 1
            channels = 4 * width
    return [Convolution(*kind, count) for kind, count in found.items()]
