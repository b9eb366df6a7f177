"""The int8 quantisers: both forms at once, dithered rounding, any shape, and every instruction set of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.instruction_sets import require
from support.int8_oracle import BACKENDS, FLOATS, assert_same, expected_rowwise, needs_compiler
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu import int8
from lowbit_lightning.kernels.reference import int8 as reference

SEEDS = (None, 0, 2**64 - 77)


def dithers_of(x: Tensor, seed: int) -> np.ndarray:
    """Of x's elements, by definition: 15 bits of a step, in the middle, less half a step."""
    rows, columns = x.shape
    sums = [[seed * 0x9E3779B1 + r * 0xC13FA9A9 + c * 0x91E10DA5 for c in range(columns)] for r in range(rows)]
    words = np.array([[value % 2**32 >> 17 for value in row] for row in sums], dtype=np.float32)
    return (words.reshape(rows, columns) + np.float32(0.5)) / np.float32(2**15) - np.float32(0.5)


def expected_dithered(x: Tensor, dithers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, scales = expected_rowwise(x)
    rows = x.float().numpy()
    for i in np.flatnonzero(scales > 0):  # neither zero nor NaN
        y = rows[i] * (np.float32(127) / np.abs(rows[i]).max())
        q[i] = np.rint(y + dithers[i])
    return q, scales


def expected(x: Tensor, seed: int | None) -> list[np.ndarray]:
    if seed is None:
        return [*expected_rowwise(x), *expected_rowwise(x.T)]
    dithers = dithers_of(x, seed)
    return [*expected_dithered(x, dithers), *expected_dithered(x.T, dithers.T)]


def assert_quantised(x: Tensor, seed: int | None) -> None:
    wanted = expected(x, seed)
    apart = [*kernels.quantize_rowwise(x, seed), *kernels.quantize_colwise(x, seed)]
    mixed = kernels.quantize_both(x, seed, nearest_rows=True)
    for one, other in zip(mixed, (*kernels.quantize_rowwise(x), *apart[2:]), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    for actual in (apart, kernels.quantize_both(x, seed)):
        for ours, theirs in zip(actual, wanted, strict=True):
            assert ours.is_contiguous()
            assert_same(ours, theirs)


def matrix(rows: int, columns: int, dtype: torch.dtype, special: bool) -> Tensor:
    x = torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, columns))
    values = torch.tensor([0.0, -0.0, 1e-45, 2.0**-121, float("inf"), -float("inf"), float("nan"), 3e38])
    if special and x.numel() > 20:
        x.view(-1)[torch.randperm(x.numel())[: len(values)]] = values
    return x.to(dtype)


# -- every shape, dtype and way to round -----------------------------------------------------------------------------


@needs_compiler
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 600),
    dtype=st.sampled_from(FLOATS),
    seed=st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1)),
    threads=st.sampled_from([1, 2, 5]),
    special=st.booleans(),
)
@example(rows=1, columns=600, dtype=torch.float32, seed=1, threads=2, special=False)
@example(rows=600, columns=1, dtype=torch.bfloat16, seed=1, threads=2, special=False)
@example(rows=0, columns=7, dtype=torch.float16, seed=1, threads=1, special=False)
@example(rows=7, columns=0, dtype=torch.float32, seed=None, threads=1, special=False)
@example(rows=0, columns=0, dtype=torch.float32, seed=3, threads=1, special=False)
@example(rows=256, columns=512, dtype=torch.bfloat16, seed=None, threads=5, special=True)
def test_any_matrix(rows: int, columns: int, dtype: torch.dtype, seed: int | None, threads: int, special: bool) -> None:
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns, dtype, special)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("reference", "cpu"):
            with kernels.use_backend(name):
                assert_quantised(x, seed)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("shape", [(2048, 2112), (2112, 2050), (130, 33000)], ids=str)
def test_results_that_are_streamed_past_the_caches(shape: tuple[int, int]) -> None:
    x = matrix(*shape, torch.bfloat16, special=True)
    with kernels.use_backend("reference"):
        wanted = kernels.quantize_both(x)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with kernels.use_backend("cpu"):
                apart = *kernels.quantize_rowwise(x), *kernels.quantize_colwise(x)
                for ours in (apart, kernels.quantize_both(x)):
                    for one, other in zip(ours, wanted, strict=True):
                        assert_same(one, other)
        finally:
            torch.set_num_threads(before)


# "plain" is what any other processor gets.
BUILDS = {
    "AVX-512 without BW": (("-mno-avx512bw",), {"avx512f"}),
    "AVX2": (("-march=x86-64-v3",), {"avx2", "fma", "f16c"}),
    "SSE2": (("-march=x86-64",), {"sse2"}),
    "plain": (("-march=x86-64", "-U__SSE2__"), {"sse2"}),
}


@needs_compiler
@pytest.mark.parametrize("name", BUILDS)
def test_other_instruction_sets_give_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, needed = BUILDS[name]
    require(name, needed)
    build = int8.library((*flags, "-O1"))
    monkeypatch.setattr(int8, "library", lambda: build)
    with kernels.use_backend("cpu"):
        for seed in SEEDS:
            for dtype in FLOATS:
                for rows, columns in ((3, 15), (64, 64), (65, 133), (72, 520)):
                    assert_quantised(matrix(rows, columns, dtype, special=rows > 3), seed)
        assert_quantised(matrix(2048, 2112, torch.float32, special=False), None)  # streamed


# -- dithered --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dithering_is_unbiased(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(256, 1024).to(dtype)
    for form, scales, values in zip(*_forms(kernels.quantize_both(x, 11)), (x, x.T), strict=True):
        error = form.double() - (values.float() * (127 / values.float().abs().amax(1, keepdim=True))).double()
        assert error.abs().max() < 1 + 1e-6
        assert error.mean().abs() < 3 * error.std() / error.numel() ** 0.5
        assert error.var() == pytest.approx(1 / 6, rel=0.02), "of a uniform remainder f: the mean of f (1 - f)"
        assert (scales == values.float().abs().amax(1) / torch.tensor(127.0)).all()


def _forms(both: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (both[0], both[2]), (both[1], both[3])


def test_mean_over_many_seeds_is_the_value(backend: str) -> None:
    """0.1, 1.25 and -2.75 steps: rounding to nearest would give 0, 1 and -3 every time."""
    x = torch.tensor([[127.0, 0.1, 1.25, -2.75, -0.5, 126.875]])
    count = 600
    mean = torch.stack([kernels.quantize_rowwise(x, seed)[0].double() for seed in range(count)]).mean(0)
    error = (mean - x.double()).abs()
    assert (error <= 3.5 * 0.5 / count**0.5).all()
    assert error[0, 0] == 0


def test_the_extreme_stays_and_nothing_leaves_the_range(backend: str) -> None:
    absmax = torch.rand(3000, 1) * torch.logspace(-30, 30, 3000).unsqueeze(1)
    for seed in range(4):
        q, _ = kernels.quantize_rowwise(torch.cat([absmax, -absmax, absmax.neg().repeat(1, 30)], 1), seed)
        assert (q[:, 0] == 127).all()
        assert (q[:, 1:] == -127).all()


def test_the_dithers_that_could_move_an_extreme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 127 / absmax is rounded, the product misses 127 by a unit in the last place; with the largest and the
    smallest dither that must not matter. (The reference alone takes those that it is told.)"""
    absmax = torch.rand(20000, 1) + 0.5
    products = absmax * (torch.tensor(127.0) / absmax)
    assert {float(p) for p in products.unique()} == {127 - 2**-17, 127.0, 127 + 2**-17}
    for d in (2.0**-16 - 0.5, 0.5 - 2.0**-16):
        monkeypatch.setattr(reference, "dither", lambda *_, d=d: torch.full((20000, 2), d))
        q, _ = reference.quantize_rowwise(torch.cat([absmax, -absmax], 1), 1)
        assert (q == torch.tensor([127, -127], dtype=torch.int8)).all()


def test_seeds_differ_and_repeat(backend: str) -> None:
    x = torch.randn(40, 70)
    first, again, other = (kernels.quantize_rowwise(x, seed)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).float().mean() > 0.2
    assert (kernels.quantize_rowwise(x, -1)[0] == kernels.quantize_rowwise(x, 2**64 - 1)[0]).all(), "64 bits"


def test_errors_cancel_in_sums_of_values_below_half_a_step(backend: str) -> None:
    """As in gradients where few pixels stand out: to nearest all of these become zero, and at random the sum would be
    off by hundreds."""
    x = torch.full((4096, 3), 0.2)
    x[7] = 127.0
    q, _ = kernels.quantize_colwise(x, 0)
    assert ((q.sum(1) - (127 + 4095 * 0.2)).abs() < 8).all()
    assert (kernels.quantize_colwise(x)[0].sum(1) == 127).all()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "dithered"])
def test_errors_of_the_three_products_of_a_layer(backend: str, seed: int | None) -> None:
    """Against float64, normally distributed data: rounding to nearest has the variance s^2 / 12, dithered s^2 / 6."""
    tokens, inputs, outputs = 192, 128, 160
    x, w, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs) / 11, torch.randn(tokens, outputs)
    seeds = [None] * 3 if seed is None else [seed, seed + 1, seed + 2]
    (xr, xrs, xc, xcs), (wr, wrs, wc, wcs), (dr, drs, dc, dcs) = map(kernels.quantize_both, (x, w, dy), seeds)
    for a, qa, sa, b, qb, sb in (
        (x, xr, xrs, w, wr, wrs),
        (dy, dr, drs, w.T, wc, wcs),
        (dy.T, dc, dcs, x.T, xc, xcs),
    ):
        exact = a.double() @ b.double().T
        measured = (kernels.int8_matmul(qa, qb, sa, sb).double() - exact).norm() / exact.norm()
        va, vb = (s.double() ** 2 / (12 if seed is None else 6) for s in (sa, sb))
        squares_a, squares_b = a.double().square().sum(1), b.double().square().sum(1)
        variance = va[:, None] * squares_b + vb * squares_a[:, None] + a.shape[1] * va[:, None] * vb
        assert measured / (variance.sum().sqrt() / exact.norm()) == pytest.approx(1, abs=0.1)


# -- the op ----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_both_forms_are_one_call() -> None:
    kernels.reset_calls()
    with kernels.use_backend("cpu"):
        kernels.quantize_both(torch.randn(4, 8))
    assert kernels.calls() == {("quantize_both", "cpu"): 1}


@pytest.mark.parametrize("op", [kernels.quantize_rowwise, kernels.quantize_colwise, kernels.quantize_both])
def test_wrong_arguments_are_named(op: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="seed must be an int, or None to round to nearest, got float"):
        op(torch.zeros(3, 3), 0.5)
    with pytest.raises(TypeError, match=r"x must be .* matrix, got torch.float64 of shape \(3, 3\)"):
        op(torch.zeros(3, 3, dtype=torch.float64))
