"""Block-wise quantisation on every backend of this machine: against a brute-force search, and bit for bit against
each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import formats

BACKENDS = ("reference", "cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODEBOOKS = ("dynamic_signed", "dynamic_unsigned", "linear", "linear_unsigned", "nf4", "fp4")
SHAPES = [(), (1,), (5,), (1000,), (0, 3), (2, 0), (7, 700), (64, 256), (9, 33), (3, 5, 77)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


def blocks_of(x: np.ndarray, block_size: int) -> Iterator[tuple[int, int, np.ndarray]]:
    rows = x.reshape(x.shape[0], -1) if x.ndim >= 2 else x.reshape(1, -1)
    for r, row in enumerate(rows):
        for b, start in enumerate(range(0, len(row), block_size)):
            yield r, b, row[start : start + block_size]


def expected_scale(block: np.ndarray, values: np.ndarray) -> float:
    finite = block[np.isfinite(block)]
    high, low = max(finite, default=0.0), min(finite, default=0.0)
    high, low = max(high, 0.0), min(low, 0.0)
    if values[0] >= 0:
        return high
    if values[0] == -1:
        return max(high, -low)
    return high if high >= -low else low


def check_nearest(x: Tensor, codes: Tensor, scales: Tensor, codebook: str, block_size: int) -> None:
    """Every code against a search over all values in float64; a code may differ only in a tie."""
    values = formats.codebook(codebook).double().numpy()
    flat = codes.reshape(codes.shape[0], -1) if codes.ndim >= 2 else codes.reshape(1, -1)
    for r, b, block in blocks_of(x.double().numpy(), block_size):
        scale = float(scales[r, b])
        assert scale == np.float32(expected_scale(block, values))
        got = flat[r, b * block_size : b * block_size + len(block)].numpy()
        for v, code in zip(block, got, strict=True):
            if not np.isfinite(v) or scale == 0:
                assert values[code] == 0
                continue
            distance = np.abs(v / scale - values)
            if values[0] == 0 and v > 0:
                assert code > 0, "a positive value of a non-negative map became zero"
                distance = distance[1:]
                code -= 1
            tie = 1e-6 * abs(v / scale)  # both distances in float32 arithmetic: a few roundings of the value
            assert distance[code] <= distance.min() + tie, (v, scale, code, distance.argmin())


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_the_nearest(backend: str, codebook: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 300) * torch.exp(4 * torch.randn(5, 300))
    x[0, :7] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-6, -1e-6])
    x[1] = 0
    x[2] = -x[2].abs()
    x = x.clamp(-6e4, 6e4).to(dtype)
    codes, scales = kernels.quantize_blockwise(x, codebook, 64)
    check_nearest(x, codes, scales, codebook, 64)


@pytest.mark.parametrize("name", formats.MAPS)
def test_around_every_middle_and_code(backend: str, name: str) -> None:
    """All float32 neighbours of the places where the code changes, where rounding errors would show."""
    values = formats.codebook(name)
    places = torch.cat([values, (values[1:] + values[:-1]) / 2])
    near = [places]
    for direction in (torch.tensor(-2.0), torch.tensor(2.0)):
        x = places
        for _ in range(4):
            x = torch.nextafter(x, direction)
            near.append(x)
    x = torch.cat(near).clamp(0 if name.endswith("unsigned") else -1, 1)
    x = torch.cat([x, torch.ones(1)])
    codes, scales = kernels.quantize_blockwise(torch.stack([x, x]).contiguous(), name, 4096)
    check_nearest(torch.stack([x, x]), codes, scales, name, 4096)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_code_survives(backend: str, codebook: str) -> None:
    values = formats.codebook(codebook)
    codes, scales = kernels.quantize_blockwise(values, codebook, 256)
    assert codes.tolist() == list(range(len(values)))
    assert scales.item() == 1
    torch.testing.assert_close(kernels.dequantize_blockwise(codes, scales, codebook), values, rtol=0, atol=0)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_requantising_changes_nothing(backend: str, codebook: str) -> None:
    for spread in (0.1, 3.0):
        x = torch.randn(40, 600) * torch.exp(spread * torch.randn(40, 600))
        x[:20, 0] = -x[:20].abs().amax(1) * 2  # the block's extreme is negative
        codes, scales = kernels.quantize_blockwise(x, codebook)
        again = kernels.quantize_blockwise(kernels.dequantize_blockwise(codes, scales, codebook), codebook)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2.0**-126, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("name", formats.MAPS)
def test_any_magnitude(backend: str, name: str, scale: float) -> None:
    x = torch.linspace(0, 1, 256) * scale
    codes, scales = kernels.quantize_blockwise(x, name)
    zero = formats.dynamic_map(name).zero_code
    assert scales.isfinite().all()
    assert (codes[x == 0] == zero).all()
    if name == "dynamic_unsigned":
        assert (codes[x > 0] > 0).all()
    if scale >= 1e-30:
        decoded = kernels.dequantize_blockwise(codes, scales, name)
        torch.testing.assert_close(decoded / scale, x / scale, rtol=0, atol=0.9 / 64 / 2 * 1.01)  # half the widest step


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 30), max_size=3),
    last=st.integers(1, 600),
    block_size=st.sampled_from([32, 64, 256, 4096]),
    codebook=st.sampled_from(CODEBOOKS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_backends_agree_to_the_bit(
    shape: list[int], last: int, block_size: int, codebook: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = [*shape[:1], last] if last > 40 else [*shape, last]
    x = torch.randn(size, generator=generator) * torch.exp(3 * torch.randn(size, generator=generator))
    x[torch.rand(size, generator=generator) < 0.01] = float("nan")
    x[torch.rand(size, generator=generator) < 0.01] = -float("inf")
    x = x.to(dtype)
    results = []
    for name in BACKENDS:
        with kernels.use_backend(name):
            codes, scales = kernels.quantize_blockwise(x, codebook, block_size)
            decoded = [kernels.dequantize_blockwise(codes, scales, codebook, block_size, d) for d in FLOATS]
        assert codes.shape == x.shape
        results.append((codes, scales, *decoded))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codes, scales = kernels.quantize_blockwise(x)
    assert codes.shape == x.shape
    assert scales.shape == formats.BlockGrid.of(shape).scales_shape
    decoded = kernels.dequantize_blockwise(codes, scales)
    assert decoded.shape == x.shape
    half_step = 0.9 / 64 / 2 * 1.01
    torch.testing.assert_close(decoded, x, rtol=0, atol=half_step * float(x.abs().max()) if x.numel() else 0)


def test_non_contiguous_input(backend: str) -> None:
    x = torch.randn(300, 7).t()
    for ours, theirs in zip(kernels.quantize_blockwise(x), kernels.quantize_blockwise(x.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_torch_rounds_them(backend: str, dtype: torch.dtype) -> None:
    """Subnormals, NaN and overflow included: the processor's own instructions differ in these."""
    values = torch.arange(256, dtype=torch.uint8).repeat(9).reshape(9, 256)
    scales = torch.tensor([[1.0], [-3e-38], [1e-38], [3e-40], [1e-44], [3.39e38], [7e4], [float("nan")], [-0.0]])
    decoded = kernels.dequantize_blockwise(values, scales)
    got = kernels.dequantize_blockwise(values, scales, dtype=dtype)
    assert torch.equal(got.view(torch.int16)[:7], decoded.to(dtype).view(torch.int16)[:7])
    assert got[7].isnan().all()
    assert got[8].eq(0).all()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 300
    x = torch.ones(n, dtype=torch.bfloat16)
    x[-1] = -4
    codes, scales = kernels.quantize_blockwise(x)
    assert scales.shape == (1, -(-n // 256))
    assert scales[0, -1] == -4
    assert scales[0, :-1].eq(1).all()
    assert codes[-1] == 255
    assert kernels.dequantize_blockwise(codes, scales, dtype=torch.bfloat16)[-2:].tolist() == pytest.approx(
        [1, -4], rel=0.02
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.quantize_blockwise(torch.zeros(4, dtype=torch.int32)), TypeError, "x must be torch.float32"),
        (lambda: kernels.quantize_blockwise(torch.zeros(4), block_size=7), ValueError, "power of two .* got 7"),
        (lambda: kernels.quantize_blockwise(torch.zeros(4), "dynamic"), ValueError, "codebook must be one of"),
        (
            lambda: kernels.dequantize_blockwise(torch.zeros(4), torch.zeros(1, 1)),
            TypeError,
            "codes must be uint8, got torch.float32",
        ),
        (
            lambda: kernels.dequantize_blockwise(torch.zeros(2, 300, dtype=torch.uint8), torch.zeros(2, 1)),
            ValueError,
            r"scales must be float32 of shape \(2, 2\)",
        ),
        (
            lambda: kernels.dequantize_blockwise(
                torch.zeros(4, dtype=torch.uint8), torch.zeros(1, 1), dtype=torch.int8
            ),
            TypeError,
            "dtype must be torch.float32",
        ),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()
