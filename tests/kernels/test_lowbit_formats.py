"""Formats of low-bit weights: errors, bits, bytes, agreement with bitsandbytes, bad input. On every CPU backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import Format, weight_format

BACKENDS = ("reference", "cpu")
NAMES = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq-g128", "int4", "int3", "int2")

# Relative rms errors on normal weights, measured elsewhere by other programs
ERRORS = {
    **{("nf4-g32", "absmax"): 0.0873, ("nf4", "absmax"): 0.0919, ("nf4-g128", "absmax"): 0.0955},
    **{("nf4-g256", "absmax"): 0.0987, ("nf4-g4096", "absmax"): 0.1096, ("nf4-dq", "absmax"): 0.0919},
    **{("fp4", "absmax"): 0.122, ("fp4-g256", "absmax"): 0.134},
    **{("nf4-g32", "lsq"): 0.076, ("nf4", "lsq"): 0.083, ("nf4-g128", "lsq"): 0.088},
    **{("int4-g32", "lsq"): 0.071, ("int4", "lsq"): 0.082, ("int4-g128", "lsq"): 0.091},
    **{("int3-g32", "lsq"): 0.146, ("int3", "lsq"): 0.165, ("int3-g128", "lsq"): 0.178},
    **{("int2", "lsq"): 0.298, ("int2-g64", "lsq"): 0.321, ("int2-g128", "lsq"): 0.333},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


def round_trip(weight: Tensor, form: str, fit: str | None = None) -> Tensor:
    packed, scales = kernels.lowbit_quantize(weight, form, fit)
    return kernels.lowbit_dequantize(packed, scales, form, weight.shape[-1])


@pytest.mark.parametrize(("form", "fit"), ERRORS)
def test_errors_on_normal_weights(form: str, fit: str, backend: str) -> None:
    weight = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0))
    error = float((round_trip(weight, form, fit) - weight).norm() / weight.norm())
    assert error == pytest.approx(ERRORS[form, fit], rel=0.02)


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        *[("int8", 8 + 32 / 4096), ("nf4", 4.5), ("nf4-dq", 4.125 + 8 / 4096), ("int4", 4.25 + 16 / 4096)],
        *[("int3", 3.25 + 16 / 4096), ("int2", 2.5 + 16 / 4096), ("nf4-g4096", 4 + 32 / 4096)],
    ],
)
def test_bits_per_weight(form: str, bits: float) -> None:
    packed, scales = kernels.lowbit_quantize(torch.zeros(2, 4096), form)
    assert weight_format(form).bits_per_weight(4096) == bits
    assert 8 * (packed.nbytes + scales.nbytes) / (2 * 4096) == bits


def test_names() -> None:
    for name in (*NAMES, "nf4-dq-g4096", "int2-g64", "int4-g32"):
        form = weight_format(name)
        assert str(form) == name
        assert weight_format(form) == form
    assert weight_format("nf4", block_size=32, double_quant=True) == Format("nf4", 4, 32, True)
    assert weight_format("int4-g64") == weight_format("int4")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nf5", {}, "one of .*'nf4'.* got 'nf5'"),
        ("nf4-128", {}, "got 'nf4-128'"),
        ("nf4", {"block_size": 48}, "power of two from 32 to 4096, got 48"),
        ("int4-g8192", {}, "got 8192"),
        ("int8", {"block_size": 64}, "left out for int8"),
        ("int4-dq", {}, "double_quant is for nf4 and fp4"),
        ("int8", {"double_quant": True}, "double_quant is for nf4 and fp4"),
    ],
)
def test_unknown_formats(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weight_format(name, **options)


# -- bitsandbytes ----------------------------------------------------------------------------------------------------

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


def bitsandbytes_rule(weight: np.ndarray, values: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and absmax by the rule that bitsandbytes states, in numpy: values in units of the absmax (at least 1e-38),
    by its reciprocal, go to the nearest of the sorted values, half-way to the lower one."""
    blocks = weight.reshape(-1, block)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / np.float32(2)
    codes = order[np.searchsorted(middles, scaled, side="left")].reshape(-1).astype(np.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def hard_weights(values: np.ndarray) -> Tensor:
    """A million values: random ones of any size, exact ties, extremes, zeros."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((16384, 64)).astype(np.float32)
    x[1000:5000] *= 10.0 ** generator.integers(-38, 38, (4000, 1)).astype(np.float32)
    x[5000:6000] = generator.uniform(-1, 1, (1000, 64)) * 1e-40  # below the smallest normal number
    x[6000:7000] = 0
    ascending = np.sort(values)
    middles = (ascending[1:] + ascending[:-1]) / np.float32(2)
    x[7000:11000] = generator.choice(middles, (4000, 64))
    x[7000:11000, 0] = generator.choice([1.0, -1.0], 4000)
    x[11000:12000] = generator.choice(values, (1000, 64)) * np.float32(3)
    x[12000:12100] = generator.choice([3.4e38, -3.4e38, 1.0, 0.0], (100, 64))
    x[12100:12200] = np.nextafter(x[7000:7100], np.float32(2))
    return torch.from_numpy(x)


@pytest.mark.parametrize(("form", "values"), [("nf4", NF4), ("fp4", FP4)])
def test_absmax_codes_are_those_of_bitsandbytes(form: str, values: np.ndarray, backend: str) -> None:
    weight = hard_weights(values)
    expected, absmax = bitsandbytes_rule(weight.numpy(), values, 64)
    packed, scales = kernels.lowbit_quantize(weight, form, "absmax")
    assert np.array_equal(packed.numpy().ravel(), expected)
    assert np.array_equal(scales.numpy().ravel(), absmax)
    decoded = kernels.lowbit_dequantize(packed, scales, form, 64)
    codes = np.stack([expected >> 4, expected & 15], 1).reshape(-1, 64)
    assert np.array_equal(decoded.numpy(), values[codes] * absmax[:, None])


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_absmax_codes_are_those_of_the_real_bitsandbytes(form: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install 'lowbit-lightning[benchmarks]'")
    weight = hard_weights(NF4 if form == "nf4" else FP4)
    theirs, state = functional.quantize_4bit(weight, quant_type=form, blocksize=64)
    packed, scales = kernels.lowbit_quantize(weight, form, "absmax")
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(scales.flatten(), state.absmax)


# -- shapes and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 65, 127, 200, 321])
def test_any_row_length(form: str, length: int, backend: str) -> None:
    """Odd ones, shorter than a block, not divided by the block: as good as a row of whole blocks."""
    weight = torch.randn(9, length, generator=torch.Generator().manual_seed(length))
    limit = {8: 0.02, 4: 0.2, 3: 0.25, 2: 0.45}[weight_format(form).bits]
    assert float((round_trip(weight, form) - weight).norm() / weight.norm()) < limit


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0,), (2, 0, 70), (70,), (2, 3, 70)])
def test_empty_and_many_dimensional(form: str, shape: tuple[int, ...], backend: str) -> None:
    weight = torch.randn(shape)
    packed, scales = kernels.lowbit_quantize(weight, form)
    f = weight_format(form)
    assert packed.shape == (*shape[:-1], f.packed_width(shape[-1]))
    assert scales.shape == (*shape[:-1], f.scales_width(shape[-1]))
    assert kernels.lowbit_dequantize(packed, scales, form, shape[-1]).shape == shape


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_seen_and_stay_where_they_are(form: str, value: float, backend: str) -> None:
    weight = torch.randn(3, 300)
    weight[1, 70] = value
    result, clean = round_trip(weight, form), round_trip(weight.nan_to_num(0.0, 0.0, 0.0), form)
    f = weight_format(form)
    block = slice(64, 128) if f.block_size == 64 else slice(0, 128)
    rows = slice(None) if f.scale_kind == "square" or form == "int8" else block
    assert result[1, rows].isnan().all()
    result[1, rows] = clean[1, rows]
    assert torch.equal(result, clean)


@pytest.mark.parametrize("form", NAMES)
def test_zeros_and_constants(form: str, backend: str) -> None:
    assert not round_trip(torch.zeros(3, 100), form).any()
    for value in (1e-30, -1.0, 1e30):
        same = torch.full((2, 100), value)
        assert torch.allclose(round_trip(same, form), same, rtol=0.012, atol=0.0), value


@pytest.mark.parametrize("form", [name for name in NAMES if name != "int8"])
def test_fits_do_not_depend_on_the_unit(form: str, backend: str) -> None:
    """A power of two changes exponents, nothing else."""
    weight = torch.randn(4, 256)
    for unit in (2.0**-80, 2.0**60):
        assert torch.equal(round_trip(weight * unit, form, "lsq"), round_trip(weight, form, "lsq") * unit)


def test_bad_arguments() -> None:
    weight = torch.randn(4, 64)
    packed, scales = kernels.lowbit_quantize(weight, "nf4")
    with pytest.raises(TypeError, match=r"weight must be float32.* got torch.float64"):
        kernels.lowbit_quantize(weight.double(), "nf4")
    with pytest.raises(ValueError, match=r"fit must be one of .* got 'best'"):
        kernels.lowbit_quantize(weight, "nf4", "best")
    with pytest.raises(ValueError, match=r"fit must be one of \('absmax',\) for int8"):
        kernels.lowbit_quantize(weight, "int8", "lsq")
    with pytest.raises(ValueError, match="at least one dimension"):
        kernels.lowbit_quantize(torch.ones(()), "nf4")
    with pytest.raises(TypeError, match=r"must be torch\.uint8 and torch\.float32"):
        kernels.lowbit_dequantize(packed.char(), scales, "nf4", 64)
    with pytest.raises(ValueError, match=r"rows of 65 must be \[..., 33\] and \[..., 2\], got \(4, 32\)"):
        kernels.lowbit_dequantize(packed, scales, "nf4", 65)
    with pytest.raises(ValueError, match=r"got \(3, 32\) and \(4, 1\)"):
        kernels.lowbit_dequantize(packed[:3], scales, "nf4", 64)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.float64"):
        kernels.lowbit_dequantize(packed, scales, "nf4", 64, torch.float64)
