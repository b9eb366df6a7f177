"""A vision transformer, a ResNet, a ConvNeXt and a UNet in plain torch, of sizes for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """A transformer's block: attention and a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., 2020, with the mean of the tokens instead of a token for the class. Patches come from
    convolutions (Xiao et al., 2021), which learn faster than one linear layer."""

    def __init__(self, classes: int, size: int = 32, patch: int = 8, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"size={size} has to be a multiple of patch={patch}")
        widths = [width >> halvings for halvings in reversed(range(patch.bit_length() - 1))]
        parts: list[nn.Module] = []
        for first, last in zip([3, *widths], widths, strict=False):
            parts += [nn.Conv2d(first, last, 3, 2, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU(inplace=True)]
        self.patches = nn.Sequential(*parts)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, width // 32) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class Basic(nn.Module):
    """A block of ResNet-18: two convolutions and a way past them."""

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
    """ResNet-18 (He et al., 2016). ``width``: channels of the first stage; ``small``: a stem for images of 32 x 32."""

    def __init__(self, classes: int, width: int = 64, small: bool = False) -> None:
        super().__init__()
        kernel = 3 if small else 7
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel, 2, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Identity() if small else nn.MaxPool2d(3, 2, 1),
        )
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
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class Mixer(nn.Module):
    """A block of ConvNeXt: a depthwise convolution, then a perceptron for each pixel. Its linear layers are 1 x 1
    convolutions, written as the authors wrote them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Shrink(nn.Module):
    """Halves the image and doubles its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(channels), nn.Conv2d(channels, 2 * channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        smaller: Tensor = self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return smaller


class ConvNeXt(nn.Module):
    """Liu et al., 2022. ``depths``: blocks of each stage; ``patch``: of the stem."""

    def __init__(self, classes: int, width: int = 64, depths: tuple[int, ...] = (2, 2), patch: int = 4) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, patch, patch)]
        for stage, depth in enumerate(depths):
            if stage:
                parts.append(Shrink(width << stage - 1))
            parts += [Mixer(width << stage) for _ in range(depth)]
        self.body = nn.Sequential(*parts)
        self.norm = nn.LayerNorm(width << len(depths) - 1)
        self.head = nn.Linear(width << len(depths) - 1, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(x).mean((2, 3))))
        return logits


def _two(channels: int, features: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first in (channels, features):
        layers += [
            nn.Conv2d(first, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al., 2015, with padding, norms and nearest upsampling. ``levels``: how often the image is halved,
    less one."""

    def __init__(self, classes: int, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(_two(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_two(3 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # -> [batch, classes, height, width]
        seen: list[Tensor] = []
        for level, part in enumerate(self.down):
            x = part(F.max_pool2d(x, 2) if level else x)
            seen.append(x)
        for part, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            x = part(torch.cat((F.interpolate(x, scale_factor=2.0), beside), 1))
        logits: Tensor = self.head(x)
        return logits
