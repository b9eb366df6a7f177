"""Tables of quantised values, as ``bitsandbytes.functional`` makes them: float32 ``[256]``, ascending, with zeros where
a map has fewer values; and the 16 values of 4-bit types by their codes."""

from __future__ import annotations

from itertools import product
from statistics import NormalDist

import torch
from torch import Tensor

from lowbit_lightning.kernels.formats import codebook, weight_format


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map (``kernels.formats.maps`` describes it), or one with other numbers of bits."""
    if (max_exponent_bits, total_bits) == (7, 8):
        return codebook("dynamic_signed" if signed else "dynamic_unsigned")
    fraction_bits = total_bits - 1 - max_exponent_bits
    magnitudes: list[float] = []
    for decade in range(max_exponent_bits):
        steps = int(2 ** (decade + fraction_bits + (0 if signed else 1)))
        magnitudes += _middles(steps, 10.0 ** (decade + 1 - max_exponent_bits))
    if (more := int(2**fraction_bits) - 1) > 0:  # without an indicator bit
        magnitudes += _middles(more, 1.0)
    negatives = [-x for x in magnitudes] if signed else []
    return _filled([*negatives, 0.0, *magnitudes, 1.0])


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Equal steps from -1 (signed) or 0 to 1; with a zero, a signed map has one value less."""
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    return _filled(torch.linspace(-1.0 if signed else 0.0, 1.0, count, dtype=torch.float32).tolist())


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """Floating-point numbers of so many bits, subnormal ones included, divided by the largest."""
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"exponent_bits + precision_bits must be {total_bits - signed} for total_bits={total_bits}, got "
            f"{exponent_bits} + {precision_bits}"
        )
    values = []
    for exponent, fraction in product(range(2**exponent_bits), range(2**precision_bits)):
        mantissa = fraction / 2**precision_bits + (1 if exponent else 0)
        values.append(
            mantissa * 2.0 ** (1 - exponent if exponent else -(2**exponent_bits))
        )  # exponents count downwards
    values += [-x for x in values] if signed else []
    found = _filled(values)
    return found / found.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """NormalFloat: quantiles of the normal distribution (QLoRA: Dettmers et al., 2023, appendix E)."""

    def quantiles(count: int) -> list[float]:
        levels = torch.linspace(offset, 0.5, count, dtype=torch.float32)[:-1].tolist()
        return [NormalDist().inv_cdf(level) for level in levels]

    positive, negative = quantiles(9 if use_extra_value else 8), quantiles(8)
    found = _filled([*positive, 0.0, *(-x for x in negative)])
    return found / found.max()


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """float32 ``[16]``: the value of each code of ``"nf4"`` or ``"fp4"``.

    Raises:
        NotImplementedError: for other types.
    """
    if typename not in ("nf4", "fp4"):
        raise NotImplementedError(f"typename must be 'nf4' or 'fp4', got {typename!r}")
    return weight_format(typename).table(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _middles(steps: int, unit: float) -> list[float]:
    """The middles of equal steps from 0.1 to 1, times the unit."""
    bounds = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
    return (unit * (bounds[:-1] + bounds[1:]) / 2).tolist()


def _filled(values: list[float]) -> Tensor:
    return torch.tensor(sorted([*values, *[0.0] * (256 - len(values))]), dtype=torch.float32)
