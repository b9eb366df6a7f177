"""The int8 ops on every backend of this machine, against an independent oracle in NumPy.

The oracle knows the definition and none of the code: float32 arithmetic for the scales, int64 for the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.instruction_sets import require
from support.int8_oracle import BACKENDS, FLOATS, assert_same, expected_rowwise, needs_compiler, scaled_sums
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu import int8_product

# Empty, single, odd, one less and one more than a vector or a tile, several tiles, both longer than wide and wider.
SHAPES = [
    *((0, 0), (0, 5), (5, 0), (1, 1), (1, 77), (77, 1), (3, 15), (16, 16), (17, 33), (63, 65), (64, 64), (65, 63)),
    *((128, 192), (200, 333), (2, 2500), (130, 2049)),
]
# M, N, K: the same, K not a multiple of 4, K and M longer than what is kept in a cache at a time.
PRODUCTS = [
    *((0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (1, 77, 3), (77, 1, 129), (5, 63, 64), (6, 64, 2), (7, 65, 63)),
    *((13, 100, 130), (193, 70, 64), (200, 17, 31), (13, 49, 5001), (197, 65, 2304)),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


# -- the oracle ------------------------------------------------------------------------------------------------------


def expected_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    result = scaled_sums(exact, a_scales, b_scales)
    if bias is not None:
        result = result + bias.float().numpy()
    return torch.from_numpy(result).to(dtype)


def assert_quantised(x: Tensor) -> None:
    for quantise, rows in ((kernels.quantize_rowwise, x), (kernels.quantize_colwise, x.T)):
        q, scales = quantise(x)
        expected_q, expected_scales = expected_rowwise(rows)
        assert q.is_contiguous()
        assert_same(q, expected_q)
        assert_same(scales, expected_scales)


def int8(*shape: int, low: int = -127) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


def operands(m: int, n: int, k: int, low: int = -127) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return int8(m, k, low=low), int8(n, k, low=low), torch.rand(m), torch.rand(n)


# -- quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantisers_follow_the_definition(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_quantised(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_non_finite_value_marks_its_row_and_no_other(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(70, 90).to(dtype)
    x[3, 5], x[10, 89], x[69, 0] = float("nan"), float("inf"), -float("inf")
    if dtype == torch.float32:
        x[20, 64] = torch.tensor(0x7FC01234, dtype=torch.int32).view(torch.float32)  # a NaN with a payload
    assert_quantised(x)
    q, scales = kernels.quantize_rowwise(x)
    marked = [3, 10, 20, 69] if dtype == torch.float32 else [3, 10, 69]
    assert scales.isnan().nonzero().flatten().tolist() == marked
    assert not q[marked].any()
    y = kernels.int8_matmul(q, q, scales, torch.ones(70))
    assert y.isnan().any(1).nonzero().flatten().tolist() == marked, "the product shows it"


def test_rows_of_zeros_and_tiny_rows(backend: str) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-45, -(2.0**-121), 2.0**-120 * (1 - 2**-24), 2.0**-120, -(2.0**-119), 3e38])
    x = torch.zeros(8, 40)
    x[:, 7] = tiny
    assert_quantised(x)
    q, scales = kernels.quantize_rowwise(x)
    assert (scales > 0).tolist() == [False] * 5 + [True] * 3
    assert q[:, 7].tolist() == [0] * 5 + [127, -127, 127]


def test_ties_round_to_even_and_the_extreme_is_127(backend: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49999997]])
    q, scales = kernels.quantize_rowwise(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 0]]
    assert scales.item() == 1.0
    absmax = torch.rand(5000, 1) * torch.logspace(-30, 30, 5000).unsqueeze(1)
    q, _ = kernels.quantize_rowwise(torch.cat([absmax, -absmax], 1))
    assert (q == torch.tensor([127, -127])).all(), "inverse and product round, but never up to 128 or down to 126"


def test_a_result_that_is_streamed_past_the_caches(backend: str) -> None:
    x = torch.randn(128, 33000)
    q, scales = kernels.quantize_colwise(x)
    expected_q, expected_scales = expected_rowwise(x.T)
    assert_same(q, expected_q)
    assert_same(scales, expected_scales)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_views_are_read_as_they_look(backend: str, dtype: torch.dtype) -> None:
    whole = torch.randn(60, 200).to(dtype)
    for x in (whole.T, whole[::2, 1::3], whole[5:, 7:150]):
        assert_quantised(x)


# -- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_product_follows_the_definition(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = operands(*shape)
    for bias in (None, *(torch.randn(shape[1]).to(kind) for kind in FLOATS)):
        actual = kernels.int8_matmul(*arguments, bias, dtype)
        assert_same(actual, expected_product(*arguments, bias, dtype))


@pytest.mark.parametrize(("a", "b"), [(127, 127), (-127, 127), (127, -127), (-128, 127), (-128, -128)])
@pytest.mark.parametrize("k", [4096, kernels.int8_product.LONGEST_INT8_SUM])
def test_no_sum_saturates_or_overflows(backend: str, a: int, b: int, k: int) -> None:
    m, n = (20, 70) if k == 4096 else (2, 3)
    q, p = torch.full((m, k), a, dtype=torch.int8), torch.full((n, k), b, dtype=torch.int8)
    y = kernels.int8_matmul(q, p, torch.ones(m), torch.ones(n))
    assert_same(y, torch.full((m, n), float(k * a * b)))


def test_minus_128_is_a_number_like_any_other(backend: str) -> None:
    arguments = operands(9, 70, 100, low=-128)
    arguments[0][0], arguments[1][0] = -128, -128
    assert_same(kernels.int8_matmul(*arguments), expected_product(*arguments, None, torch.float32))


def test_sums_too_long_for_int32_are_split(backend: str) -> None:
    k = kernels.int8_product.LONGEST_INT8_SUM + 1001
    q = torch.full((1, k), -128, dtype=torch.int8)
    y = kernels.int8_matmul(q, q, torch.ones(1), torch.ones(1))
    assert y.item() == pytest.approx(k * 128**2, rel=2e-7)
    assert k * 128**2 > 2**31


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_of_a_product_is_what_theory_says(backend: str, dtype: torch.dtype) -> None:
    """Rounding errors are uniform over a step s, of variance s^2 / 12, and independent: they add up as variances."""
    m, n, k = 96, 80, 512
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    (qa, sa), (qb, sb) = kernels.quantize_rowwise(a), kernels.quantize_colwise(b)
    y = kernels.int8_matmul(qa, qb, sa, sb)
    error = (y.double() - a.double() @ b.double()).norm()
    va, vb = sa.double().unsqueeze(1) ** 2 / 12, sb.double() ** 2 / 12
    squares_a, squares_b = a.double().square().sum(1, keepdim=True), b.double().square().sum(0)
    theory = (va * squares_b + vb * squares_a + k * va * vb).sum().sqrt()
    assert error / theory == pytest.approx(1, abs=0.05)


@needs_compiler
@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(0, 70), n=st.integers(0, 140), k=st.integers(0, 300), seed=st.integers(0, 2**20))
def test_any_shape(m: int, n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = torch.randn(m, k), torch.randn(k, n).bfloat16()
    for name in ("reference", "cpu"):
        with kernels.use_backend(name):
            assert_quantised(x)
            assert_quantised(w)
            arguments = *operands(m, n, k), torch.randn(n)
            dtype = FLOATS[seed % 3]
            assert_same(kernels.int8_matmul(*arguments, dtype), expected_product(*arguments, dtype))


# -- the CPU backend -------------------------------------------------------------------------------------------------

NO_AVX512 = tuple(f"-U__AVX512{part}__" for part in ("F", "BW", "VNNI", "BF16", "VBMI"))
NO_AMX = ("-mno-amx-int8", "-mno-amx-tile")
INSTRUCTIONS = {  # what a build without the newer ones is, and what the processor must have to run it
    "AVX-512 BW": (("-mno-avx512vnni", *NO_AMX), {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "AVX-VNNI": (
        (*NO_AMX, *NO_AVX512, "-D__AVXVNNI__", "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"),  # by its AVX-512 twin
        {"avx512_vnni", "avx512vl"},
    ),
    "AMX": (("-DLB_AMX_TWIN=1",), set()),  # its instructions in plain C++
    "AMX refused, AVX2": (("-march=x86-64-v3", "-DLB_AMX_TWIN=0"), {"avx2", "fma", "f16c"}),
    "AVX2": (("-march=x86-64-v3",), {"avx2", "fma", "f16c"}),
    "SSE2": (("-march=x86-64",), {"sse2"}),
    int8_product.SLOW: (("-march=x86-64", "-U__SSE2__"), {"sse2"}),
}


@needs_compiler
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_other_instruction_sets_give_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, needed = INSTRUCTIONS[name]
    require(name, needed)
    build = int8_product.library((*flags, "-O1"))
    assert int8_product.instructions(build) == name
    monkeypatch.setattr(int8_product, "library", lambda: build)
    with kernels.use_backend("cpu"):
        for dtype in FLOATS:
            for rows, columns in ((3, 15), (64, 64), (65, 133)):
                assert_quantised(torch.randn(rows, columns).to(dtype))
            for shape in ((5, 63, 64), (7, 65, 63), (13, 49, 5001), (197, 17, 130)):
                arguments = *operands(*shape, low=-128), torch.randn(shape[1])
                assert_same(kernels.int8_matmul(*arguments, dtype), expected_product(*arguments, dtype))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (int8_product.SLOW, "no instructions for int8 products"),
        ("AMX refused, AVX2", "slower than they could, by AVX2"),
    ],
)
def test_a_processor_without_the_fast_way_is_warned_once(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8_product.library.cache_clear()
    monkeypatch.setattr(int8_product, "instructions", lambda _: name)
    with pytest.warns(UserWarning, match=message):
        int8_product.library()
    int8_product.library()  # warnings are errors here
    int8_product.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    x = torch.randn(300, 260)
    arguments = operands(300, 260, 100)

    def run() -> list[Tensor]:
        return [*kernels.quantize_rowwise(x), *kernels.quantize_colwise(x), kernels.int8_matmul(*arguments)]

    before = torch.get_num_threads()
    with kernels.use_backend("cpu"):
        torch.set_num_threads(1)
        try:
            alone = run()
            torch.set_num_threads(threads)
            together = run()
        finally:
            torch.set_num_threads(before)
    for one, many in zip(alone, together, strict=True):
        assert_same(many, one)


# -- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.quantize_rowwise(torch.zeros(3)), "x must be a float32, float16 or bfloat16 matrix"),
        (lambda: kernels.quantize_colwise(torch.zeros(3, 3, dtype=torch.int32)), "x must be .* got torch.int32"),
        (lambda: kernels.int8_matmul(int8(2, 3), int8(2, 4), torch.ones(2), torch.ones(2)), r"\(2, 3\) and \(2, 4\)"),
        (lambda: kernels.int8_matmul(int8(2, 3), int8(4, 3), torch.ones(3), torch.ones(4)), "a_scales must be"),
        (lambda: kernels.int8_matmul(int8(2, 3), int8(4, 3), torch.ones(2), torch.ones(4).half()), "b_scales must be"),
        (lambda: kernels.int8_matmul(int8(2, 3).int(), int8(4, 3), torch.ones(2), torch.ones(4)), "must be int8"),
        (lambda: kernels.int8_matmul(*operands(2, 4, 3), torch.ones(3)), "bias must be"),
        (lambda: kernels.int8_matmul(*operands(2, 4, 3), None, torch.float64), "out_dtype must be"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@needs_compiler
def test_calls_are_counted() -> None:
    kernels.reset_calls()
    with kernels.use_backend("cpu"):
        q, scales = kernels.quantize_rowwise(torch.randn(4, 8))
        p, _ = kernels.quantize_colwise(torch.randn(8, 4))
        kernels.int8_matmul(q, p, scales, scales)
    expected = {(op, "cpu"): 1 for op in ("quantize_rowwise", "quantize_colwise", "int8_matmul")}
    assert kernels.calls() == expected
