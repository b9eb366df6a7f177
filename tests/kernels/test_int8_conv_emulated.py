"""The CUDA backend's convolutions in the emulator, in several orders of its threads and in the mode that finds races:
bit for bit those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.backend import emulated
from support.int8_oracle import assert_same

from lowbit_lightning import kernels

MODES: list[dict[str, Any]] = [{}, {"order": "random", "seed": 1}, {"check": True}]
SIZES = [  # images, pixels, results, taps, channels, features
    (2, 9, 5, 3, 16, 7),
    (3, 50, 60, 2, 80, 130),
    (1, 3, 4, 1, 5, 1),
]


def expected_and_found(sizes: tuple[int, ...], dtype: torch.dtype, mode: dict[str, Any], capability: Any) -> None:
    images, pixels, results, taps, channels, features = sizes
    torch.manual_seed(0)
    reads = torch.stack([torch.randperm(max(pixels, results))[:results] for _ in range(taps)], 1)
    table = torch.where((reads < pixels) & (torch.rand(results, taps) < 0.8), reads, -1).int()
    x, w, dy = (
        torch.randint(-128, 128, shape, dtype=torch.int8)
        for shape in ((images * pixels, channels), (features, taps, channels), (images * results, features))
    )
    of_pixels, of_results, of_features, of_channels = map(torch.rand, map(int, (len(x), len(dy), features, channels)))
    of_pixels[0] = float("nan")
    bias = torch.randn(features)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.int8_conv, (x, w, of_pixels, of_features, table, images, bias, dtype)),
        (kernels.int8_conv_input, (dy, w, of_results, of_channels, table, images, pixels, dtype)),
        (kernels.int8_conv_weight, (dy.T.contiguous(), x, of_features, of_channels, table, images, dtype)),
    ]
    for op, arguments in calls:
        with kernels.use_backend("reference"):
            wanted = op(*arguments)
        with emulated(capability=capability, **mode):
            ours = op(*arguments)
        assert_same(ours, wanted)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    for sizes in SIZES if not mode else SIZES[:1]:
        expected_and_found(sizes, dtype, mode, (8, 0))


def test_with_the_products_of_another_engine() -> None:
    expected_and_found((2, 30, 40, 2, 24, 9), torch.float16, {}, (7, 5))
