"""The rotation before int8 quantisers: against its definition in float64, and to the bit on every backend."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from support.instruction_sets import require
from support.int8_oracle import FLOATS, assert_same, needs_compiler
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu import int8

SHAPES = [(1, 1), (3, 7), (64, 64), (130, 200), (65, 127), (200, 33), (0, 5), (5, 0), (2, 1100)]


def expected(length: int) -> Tensor:
    """The matrix, float64: blocks of 64 and then those of the binary digits of what is left, by Kronecker products."""
    sizes = [64] * (length // 64) + [2**k for k in reversed(range(6)) if length % 64 >> k & 1]
    blocks, first = [], 0
    for size in sizes:
        signs = []
        for i in range(first, first + size):
            bits = [i % 64 >> k & 1 for k in range(6)]
            signs.append(-1.0 if (bits[0] & bits[1]) ^ (bits[2] & bits[3]) ^ (bits[4] & bits[5]) else 1.0)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        natural = reduce(torch.kron, [two] * (size.bit_length() - 1), torch.ones(1, 1, dtype=torch.float64))
        d = torch.tensor(signs, dtype=torch.float64).diag()
        blocks.append(d @ natural @ d / size**0.5)
        first += size
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("length", [1, 7, 64, 100, 255])
def test_it_is_the_orthogonal_matrix_that_it_says(length: int) -> None:
    with kernels.use_backend("reference"):
        eye = torch.eye(length)
        for dim in (0, 1):
            torch.testing.assert_close(kernels.hadamard(eye, dim).double(), expected(length), rtol=0, atol=1e-6)
    torch.testing.assert_close(expected(length) @ expected(length), torch.eye(length, dtype=torch.float64))


def test_neither_an_outlier_nor_a_constant_stands_out() -> None:
    for x in (torch.eye(64)[5:6] * 8, torch.ones(1, 64)):
        assert torch.equal(kernels.hadamard(x, 1).abs(), torch.ones(1, 64))


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cpu_gives_the_reference_s_bits(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [*SHAPES, (300, 520)]:
            assert_equal_to_reference(special(shape, dtype))
    finally:
        torch.set_num_threads(before)


def special(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape) * torch.exp(4 * torch.randn(shape))
    if x.numel() > 20:
        values = torch.tensor([-0.0, 1e-45, float("inf"), -float("inf"), float("nan"), 3e38])
        x.view(-1)[torch.randperm(x.numel())[:6]] = values
    return x.to(dtype)


def assert_equal_to_reference(x: Tensor) -> None:
    for dim in (0, 1):
        with kernels.use_backend("reference"):
            wanted = kernels.hadamard(x, dim)
        with kernels.use_backend("cpu"):
            found = kernels.hadamard(x, dim)
        assert found.dtype == (torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
        assert_same(found, wanted)


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "needed"),
    [(("-march=x86-64-v3",), {"avx2", "fma", "f16c"}), (("-march=x86-64", "-U__SSE2__"), {"sse2"})],
    ids=["AVX2", "plain"],
)
def test_other_instruction_sets_give_the_same_bits(
    flags: tuple[str, ...], needed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require(flags[0], needed)
    build = int8.rotation((*flags, "-O1"))
    monkeypatch.setattr(int8, "rotation", lambda: build)
    for dtype in FLOATS:
        for shape in ((3, 15), (65, 133)):
            assert_equal_to_reference(special(shape, dtype))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim must be 0 or 1, got 2"):
        kernels.hadamard(torch.ones(2, 2), 2)
    with pytest.raises(TypeError, match="x must be a float32, float16 or bfloat16 matrix"):
        kernels.hadamard(torch.ones(2), 0)
