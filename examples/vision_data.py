"""Real images without a network: scikit-learn's handwritten digits on patches of its photographs. Or any folder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 32  # pixels of a scene
LIGHT = 0.4, 1.0  # of a digit's colours; photographs have half their brightness, from -1 to 0

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

Batch = tuple[Tensor, Tensor]


@dataclass
class Images:
    """Images, float32 [count, 3, size, size] from -1 to 1, and their targets: a class for each image, int64 [count], or
    for each pixel, int64 [count, size, size]."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> list[Batch]:
        """All of them, in order."""
        return list(zip(self.images.split(size), self.targets.split(size), strict=True))

    def split(self, count: int) -> tuple[Images, Images]:
        """The first ``count``, and the others."""
        return Images(self.images[:count], self.targets[:count]), Images(self.images[count:], self.targets[count:])


@dataclass
class Data:
    """What one training reads, in order; what it is tested on; the classes' names."""

    training: Images
    held_out: Images
    classes: tuple[str, ...]


class Scenes:
    """Handwritten digits on photographs; who wrote which pixel is known exactly.

    A scene is a patch of a photograph at half its brightness. On it is one digit of 24 x 24 pixels, or two of 16 x 16
    side by side, at random places and of random light colours. Held-out scenes show digits and parts of the photographs
    that training never shows: every fifth digit, and the right quarter of each photograph.
    """

    classes = tuple("0123456789")

    def __init__(self, size: int = 32) -> None:
        from sklearn.datasets import load_digits, load_sample_images

        self.size = size
        found = load_digits()
        digits = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
        self.strokes = {size: F.interpolate(digits, size=(size, size), mode="bilinear")[:, 0] for size in (16, 24)}
        self.written = torch.tensor(found.target, dtype=torch.int64)
        photographs = (_tensor(photograph)[None] for photograph in load_sample_images().images)
        self.photographs = [F.interpolate(p, scale_factor=0.5, mode="area")[0] / 2 - 0.5 for p in photographs]

    def data(self, segments: bool, count: int, held_out: int, seed: int) -> Data:
        """``count`` scenes of that seed to train on, and the same ``held_out`` ones for all seeds."""
        draw = self.segmentation if segments else self.classification
        names = (*self.classes, "photograph") if segments else self.classes
        return Data(draw(count, seed), draw(held_out, 0, held_out=True), names)

    def classification(self, count: int, seed: int, held_out: bool = False) -> Images:
        """One digit in each scene; the target is which."""
        images, _, digits = self._draw(count, 1, seed, held_out)
        return Images(images, digits)

    def segmentation(self, count: int, seed: int, held_out: bool = False) -> Images:
        """Two digits in each scene; the target of a pixel is its digit, or 10 where the photograph shows."""
        images, pixels, _ = self._draw(count, 2, seed, held_out)
        return Images(images, pixels)

    def _draw(self, count: int, digits: int, seed: int, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Images, the class of each pixel, the last digit of each image."""
        chance = random.Random(f"{seed} {held_out}")
        usable = [n for n in range(len(self.written)) if (n % 5 == 0) == held_out]
        images = torch.empty(count, 3, self.size, self.size)
        pixels = torch.full((count, self.size, self.size), len(self.classes))
        last = torch.empty(count, dtype=torch.int64)
        edge = 24 if digits == 1 else 16
        for i in range(count):
            images[i] = self._patch(chance, held_out)
            for left in range(0, self.size, self.size // digits):
                number = chance.choice(usable)
                row = chance.randint(0, self.size - edge)
                column = left + chance.randint(0, self.size // digits - edge)
                place = slice(row, row + edge), slice(column, column + edge)
                stroke = self.strokes[edge][number]
                colour = torch.tensor([chance.uniform(*LIGHT) for _ in "rgb"])[:, None, None]
                images[i, :, place[0], place[1]].lerp_(colour, stroke)
                pixels[i][place][stroke > 0.5] = last[i] = self.written[number]
        return images, pixels, last

    def _patch(self, chance: random.Random, held_out: bool) -> Tensor:
        photograph = chance.choice(self.photographs)
        _, height, width = photograph.shape
        border = width * 3 // 4
        row = chance.randint(0, height - self.size)
        column = chance.randint(border, width - self.size) if held_out else chance.randint(0, border - self.size)
        return photograph[:, row : row + self.size, column : column + self.size]


class Folder:
    """The images of a folder that has a folder for each class, scaled and cut to squares, in a random order.

    Raises:
        SystemExit: if there are not two such folders at least, or one of them has no image.
    """

    def __init__(self, folder: Path, size: int) -> None:
        from PIL import Image, ImageOps

        classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if len(classes) < 2:
            raise SystemExit(f"--images {folder}: a folder with at least two folders of images is needed")
        images, targets = [], []
        for number, one in enumerate(classes):
            paths = sorted(p for p in one.rglob("*") if p.suffix.lower() in ENDINGS)
            if not paths:
                raise SystemExit(f"--images {folder}: {one.name} has no image ({', '.join(sorted(ENDINGS))})")
            for path in paths:
                with Image.open(path) as image:
                    images.append(_tensor(ImageOps.fit(image.convert("RGB"), (size, size))))
                targets.append(number)
        self.classes = tuple(p.name for p in classes)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = Images(torch.stack(images)[order], torch.tensor(targets)[order])

    def data(self, segments: bool, count: int, held_out: int, seed: int) -> Data:
        """``count`` images to train on, drawn by the seed, with repetitions; at most a fifth of all is held out."""
        if segments:
            raise ValueError("a folder of images has no classes of pixels")
        tested, rest = self.images.split(min(held_out, len(self.images) // 5))
        chosen = torch.randint(len(rest), (count,), generator=torch.Generator().manual_seed(seed))
        return Data(Images(rest.images[chosen], rest.targets[chosen]), tested, self.classes)


def _tensor(image: Any) -> Tensor:
    """Colours first, from -1 to 1."""
    return torch.tensor(numpy.asarray(image)).permute(2, 0, 1) / 127.5 - 1
