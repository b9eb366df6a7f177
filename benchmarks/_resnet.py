"""ResNets (He et al., 2016; strides in the 3 x 3, as torchvision has them) and the convolutions of ResNet-50."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


class Basic(nn.Module):
    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Sequential()
        if stride > 1 or channels != features:
            projection = nn.Conv2d(channels, features, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 by default. ``width``: channels of the first stage; ``small``: a stem for images of 32 x 32."""

    def __init__(self, classes: int, colours: int = 3, width: int = 64, small: bool = False) -> None:
        super().__init__()
        if small:
            stem: list[nn.Module] = [nn.Conv2d(colours, width, 3, padding=1, bias=False)]
        else:
            stem = [nn.Conv2d(colours, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
        self.stem = nn.Sequential(stem[0], nn.BatchNorm2d(width), nn.ReLU(inplace=True), *stem[1:])
        blocks = []
        channels = width
        for stage in range(4):
            for place in range(2):
                features = width << stage
                blocks.append(Basic(channels, features, 2 if stage and not place else 1))
                channels = features
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


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
