"""The CUDA backend's int8 product in the emulator, by both engines: equal to NumPy to the bit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from emulator import EmulatorError, Module
from emulator.backend import emulated
from support.int8_oracle import scaled_sums
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cuda import int8_product
from lowbit_lightning.kernels.sources import specialised

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FUSED, CUBLASLT = (8, 0), (7, 5)  # the compute capability of a GPU on which each engine is chosen
MODES: list[dict[str, Any]] = [{}, {"order": "backward"}, {"order": "random", "seed": 1}, {"check": True}]
# Less than a fragment, K not in multiples of 16, a tile and one more, several tiles and steps of the ring, more row
# tiles than a band, nothing to sum.
SHAPES = [
    *((1, 1, 1), (5, 3, 7), (17, 8, 8), (33, 130, 24), (20, 24, 0), (0, 4, 8), (4, 0, 8)),
    *((128, 128, 64), (129, 129, 65), (130, 72, 400), (64, 300, 192)),
]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None"]
ENGINES = {"fused": int8_product.fused_product, "cublaslt": int8_product.cublaslt_product}


def operands(m: int, n: int, k: int, bias: torch.dtype | None = None) -> Operands:
    """a, b, a_scales, b_scales, bias; -128 among the values, NaN and large ones among the scales."""
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    a_scales, b_scales = torch.rand(m), torch.rand(n)
    a_scales[3:4], b_scales[5:6] = float("nan"), float("nan")
    a_scales[1:2], b_scales[2:3] = 1e33, 1e33
    return a, b, a_scales, b_scales, None if bias is None else torch.randn(n).to(bias)


def expected_product(operands: Operands, dtype: torch.dtype) -> Tensor:
    a, b, a_scales, b_scales, bias = operands
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    result = scaled_sums(exact, a_scales, b_scales)
    return torch.from_numpy(result if bias is None else result + bias.float().numpy()).to(dtype)


def assert_same(actual: Tensor, expected: Tensor, where: object = "") -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wrong = ((actual != expected) & ~(actual.isnan() & expected.isnan())).nonzero()
    assert not len(wrong), f"{where}: {len(wrong)} differ, first at {wrong[0].tolist()}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bias", [None, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_any_shape(engine: str, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    for mode in MODES if bias is None else MODES[3:]:
        for shape in SHAPES:
            of = operands(*shape, bias)
            with emulated(**mode) as launches:
                assert_same(ENGINES[engine](*of, dtype), expected_product(of, dtype), (mode, shape))
            kernel = {"fused": "int8_product", "cublaslt": "scale_sums"}[engine]
            assert [one.kernel for one in launches] == [kernel] * (shape[0] * shape[1] > 0)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_wide_tiles(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "_WIDE_TILES", 2)
    of = operands(129, 270, 330, BF16)
    with emulated(**mode) as launches:
        assert_same(int8_product.fused_product(*of, BF16), expected_product(of, BF16))
    assert [(one.grid, one.block) for one in launches] == [((4, 1, 1), 256)]


def test_more_tiles_than_a_band_and_more_rows_than_a_launch_of_scale_sums() -> None:
    for shape in ((2180, 130, 16), (4100, 8, 8)):
        of = operands(*shape)
        with emulated(order="random"):
            for engine in ENGINES.values():
                assert_same(engine(*of, F32), expected_product(of, F32))


def test_matrices_at_odd_addresses() -> None:
    of = operands(40, 50, 64)
    room = torch.zeros(40 * 64 + 50 * 64 + 1, dtype=torch.int8)
    a, b = room[1 : 1 + 40 * 64].view(40, 64), room[1 + 40 * 64 :].view(50, 64)
    a.copy_(of[0])
    b.copy_(of[1])
    with emulated():
        assert_same(int8_product.fused_product(a, b, *of[2:], F32), expected_product(of, F32))


def test_the_rule_that_chooses_an_engine() -> None:
    chosen = {(8, 0): "int8_product", (8, 9): "int8_product", (12, 0): "int8_product"}
    chosen |= {(10, 0): "scale_sums", (7, 5): "scale_sums"}  # on (9, 0) it is measured: test_int8_wgmma.py
    of = operands(20, 16, int8_product._SHORT_SUM + 8)
    for capability, kernel in chosen.items():
        with emulated(capability=capability) as launches:
            kernels.int8_matmul(*of)
        assert [one.kernel for one in launches] == [kernel], capability
    assert int8_product.fusing_pays((9, 0), int8_product._SHORT_SUM)


# -- what the kernel rests on ----------------------------------------------------------------------------------------

PLACES = """
extern "C" __global__ void places(int* of_a, int* of_b) {  // where chunk blockIdx.x of row threadIdx.x lies
    of_a[blockIdx.x * 64 + threadIdx.x] = OfA::place(threadIdx.x, blockIdx.x);
    of_b[blockIdx.x * 64 + threadIdx.x] = OfB::place(threadIdx.x, blockIdx.x);
}
"""


def test_no_two_rows_of_a_read_share_banks() -> None:
    """Eight lanes read or write 16 bytes each: in eight different eighths of the 128 bytes that the banks span."""
    of_a, of_b = np.zeros((4, 64), "i4"), np.zeros((4, 64), "i4")
    Module(specialised("int8_product.cu", ELEMENT=F32, BIAS=F32, TILE_N=128, STAGES=3) + PLACES).launch(
        "places", 4, 64, [of_a, of_b]
    )
    for places in (of_a, of_b):
        assert sorted(places.ravel() // 16) == list(range(256)), "each chunk has a place of its own"
        for first in range(0, 64, 2):  # eight threads copy the chunks of two rows
            assert len(set(places[:, first : first + 2].ravel() // 16 % 8)) == 8
    for chunk in range(4):
        for first in range(0, 64, 8):
            assert len(set(of_a[chunk, first : first + 8] // 16 % 8)) == 8
        for group in (0, 32):
            for fragment in range(4):
                rows = [group + 8 * (c // 2) + 2 * fragment + c % 2 for c in range(8)]
                assert len(set(of_b[chunk, rows] // 16 % 8)) == 8


DEFECTS = {
    "a copy that is not waited for": (r"wait_for_all_but<STAGES - 2>", "wait_for_all_but<STAGES - 1>"),
    "no barrier": (r"__syncthreads\(\);  // everyone's copies", "// everyone's copies"),
    "the stage that is being read is filled": (r"full = 0, empty = STAGES - 1", "full = 0, empty = 0"),
    "B read where A's rows would lie": (r"load_matrices\(b \+ OfB", "load_matrices(b + OfA"),
    "a column beyond the last": (r"const bool whole = count == 8", "const bool whole = count > 0"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str) -> None:
    pattern, replacement = DEFECTS[defect]
    text, replaced = re.subn(
        pattern, replacement, specialised("int8_product.cu", ELEMENT=F32, BIAS=F32, TILE_N=128, STAGES=3)
    )
    assert replaced == 1
    of = operands(70, 132, 400)
    expected, out = expected_product(of, F32), torch.zeros(70, 132)
    with pytest.raises((EmulatorError, AssertionError)):
        Module(text, check=True).launch(
            *("int8_product", 2, 128, [*of[:2], 70, 132, 400, *of[2:], out]), shared=3 * 256 * 64
        )
        assert_same(out, expected)
