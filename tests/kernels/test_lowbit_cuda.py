"""Low-bit weights on the CUDA backend, executed by the emulator, against the reference.

A text is compiled for each format, dtype and mode, which takes a second: every run of the tests has a few of them,
``make slow`` all.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from emulator.backend import emulated
from torch import Tensor

from lowbit_lightning import kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = ("int8", "nf4", "nf4-dq", "nf4-g4096", "fp4-g32", "int4", "int4-g128", "int3", "int3-g32", "int2", "int2-g256")
MODES: dict[str, dict[str, Any]] = {"": {}, "backward": {"order": "backward"}, "check": {"check": True}}
LENGTHS = (1, 31, 64, 129, 333, 512)


def cases(quick: set[tuple[Any, ...]], *axes: tuple[Any, ...]) -> list[Any]:
    """All combinations; those that are not quick are slow."""
    return [pytest.param(*v, marks=() if v in quick else pytest.mark.slow) for v in product(*axes)]


def weight_of(form: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """A weight with a zero row, a block that is zero and one that is not finite."""
    weight = torch.randn(rows, length, generator=torch.Generator().manual_seed(length))
    weight[1] = 0
    weight[2, : min(32, length)] = 0
    weight[3, length // 2] = float("inf")
    with kernels.use_backend("reference"):
        return kernels.lowbit_quantize(weight, form, "absmax")


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, at an address that no wide access may use."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    room[1:] = x.reshape(-1)
    return room[1:].view(x.shape)


def assert_same_bits(ours: Tensor, theirs: Tensor, where: object) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    same = (ours == theirs) | (ours.isnan() & theirs.isnan() if ours.is_floating_point() else ours.isnan())
    bad = (~same).nonzero()
    assert not len(bad), f"{where}: first difference at {bad[0].tolist()}: {ours[~same][0]} against {theirs[~same][0]}"


# -- decode ----------------------------------------------------------------------------------------------------------

DECODED = {
    ("nf4-dq", BF16, "check"),
    ("int3", F32, "check"),
    ("int8", F16, ""),
    ("int2", BF16, ""),
    ("fp4-g32", F32, ""),
}


@pytest.mark.parametrize(("form", "dtype", "mode"), cases(DECODED, FORMS, (F32, F16, BF16), tuple(MODES)))
def test_dequantised_and_looked_up(form: str, dtype: torch.dtype, mode: str) -> None:
    for length in LENGTHS:
        packed, scales = weight_of(form, 7, length)
        indices = torch.tensor([[6, 0, 1], [3, 3, 2]])
        with kernels.use_backend("reference"):
            expected = kernels.lowbit_dequantize(packed, scales, form, length, dtype)
        places = [packed] if mode == "check" else [packed, shifted(packed)]
        for place in places:
            with emulated(**MODES[mode]):
                whole = kernels.lowbit_dequantize(place, scales, form, length, dtype)
                rows = [
                    kernels.lowbit_embedding(i, place, scales, form, length, dtype) for i in (indices, indices.int())
                ]
            assert_same_bits(whole, expected, length)
            for found in rows:
                assert_same_bits(found, expected[indices], length)


def test_more_dimensions_and_none() -> None:
    packed, scales = weight_of("nf4", 6, 100)
    with emulated() as launches:
        whole = kernels.lowbit_dequantize(packed.view(2, 3, 50), scales.view(2, 3, 2), "nf4", 100)
        assert len(launches) == 1
        assert kernels.lowbit_dequantize(packed[:0], scales[:0], "nf4", 100).shape == (0, 100)
        assert kernels.lowbit_embedding(torch.zeros(0, 4, dtype=torch.int64), packed, scales, "nf4", 100).numel() == 0
        assert len(launches) == 1
    assert_same_bits(whole, kernels.lowbit_dequantize(packed, scales, "nf4", 100).view(2, 3, 100), "")


@pytest.mark.parametrize("index", [7, -1])
def test_an_index_out_of_range_stops_the_kernel(index: int) -> None:
    packed, scales = weight_of("int8", 7, 64)
    with emulated(), pytest.raises(Exception, match="__trap"):
        kernels.lowbit_embedding(torch.tensor([2, index]), packed, scales, "int8", 64)
