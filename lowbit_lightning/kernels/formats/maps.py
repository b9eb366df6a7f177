"""The 8-bit formats: code maps (codebooks) and the block grid.

A tensor is quantised block by block: a block's values are divided by the block's scale and each quotient is
stored as the index (the *code*) of a value near it in a sorted table of at most 256 values (the *codebook*).

**The dynamic maps** spread their codes over seven decades, so that a value far below its block's maximum keeps a
relative precision. Decade ``d`` (0 to 6) covers ``10**(d-7)`` to ``10**(d-6)`` with ``P`` equal steps, ``P = 2**d``
for the signed map and ``2**(d+1)`` for the unsigned one, and its codes are the middles of the steps; 0 and 1.0
complete the map (Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization"). Number the non-negative
codes by ``f``, with ``f = |code - 127|`` (signed) and ``f = code + 1`` (unsigned): decade ``d`` is exactly ``P <= f
< 2 P``. So the number of bits of ``f`` tells the decade, and inside it the value is linear in ``f``. Decoding needs no
table of 256 entries: one look-up among ten pairs (slope, offset), one fused multiply-add. Encoding needs one among
nine pairs (slope, shift): a fused multiply-add makes of a decade the interval from 4 to 8, where the bits of a float
begin with those of ``f``. The constants stand here once; ``reference/blockwise.py`` and ``src/dynamic_map.h`` use them.

**The scale carries a sign** where the codebook has no -1: a signed block is divided by its element of largest
magnitude *with its sign*, so that this element is 1.0 exactly and re-quantising changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAPS = ("dynamic_signed", "dynamic_unsigned")
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, DEFAULT_BLOCK_SIZE = 32, 4096, 256
SMALLEST_SCALE = 2.0**-126
"""The scale of a block that is not all zero has at least this magnitude, so that its reciprocal is finite."""
DECADES = 7
FOLD = 256
"""Blocks whose sums are folded at once, for norms over a whole parameter."""


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a tensor: ``block_size`` consecutive elements inside one row.

    A row is everything after dimension 0; a tensor with fewer than two dimensions is one row. The last block of a
    row may be short. Cutting a tensor along dimension 0 never cuts a block.
    """

    rows: int
    row_length: int
    block_size: int

    @classmethod
    def of(cls, shape: tuple[int, ...] | torch.Size, block_size: int = DEFAULT_BLOCK_SIZE) -> BlockGrid:
        if len(shape) < 2:
            return cls(1, prod(shape), block_size)
        return cls(shape[0], prod(shape[1:]), block_size)

    @property
    def blocks_per_row(self) -> int:
        return -(-self.row_length // self.block_size)

    @property
    def scales_shape(self) -> tuple[int, int]:
        return self.rows, self.blocks_per_row

    @property
    def in_runs(self) -> bool:
        """Whether blocks are consecutive elements of the whole tensor, which may then be cut before any of them."""
        return self.rows <= 1 or self.row_length % self.block_size == 0


class Span(NamedTuple):
    """The elements ``start`` to ``stop - 1`` of a tensor. The cuts are before a block, or before a row."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def of(self, x: Tensor, grid: BlockGrid) -> Tensor:
        """This part of a tensor with the grid: a vector or whole rows; a view if the tensor is contiguous."""
        if grid.in_runs:
            return x.contiguous().view(-1)[self.start : self.stop]
        return x.contiguous()[self.start // grid.row_length : self.stop // grid.row_length]

    def of_scales(self, scales: Tensor, grid: BlockGrid) -> Tensor:
        """The scales of this part of a tensor."""
        if grid.in_runs:
            return scales.view(1, -1)[:, self.start // grid.block_size : -(-self.stop // grid.block_size)]
        return scales[self.start // grid.row_length : self.stop // grid.row_length]


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is a power of two from 32 to 4096."""
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, got {block_size}; "
            f"the default is {DEFAULT_BLOCK_SIZE}"
        )


ENCODE_OFFSET = np.float32(32 / 9)
"""The value at zero of the line that rises from 4 to 8 over a decade (from a tenth of its upper end to this end)."""
ENCODE_TOP = np.nextafter(np.float32(8), np.float32(0))
"""The largest float32 below 8."""
_SHIFT_TO = {1: 22, 128: 23, 0: 31}
"""Byte -> the shift after which it is the low byte of ENCODE_OFFSET's bits, 0x40638E39."""


@dataclass(frozen=True)
class DynamicMap:
    """The constants of a dynamic map: float32, the shifts int32. ``f`` is the number of a non-negative code, as above.

    ``decode_slope``, ``decode_offset``: ten lines, ``value = fused(f, slope[k], offset[k])``, a multiply-add rounded
    once; k is the number of bits of f: zero, the seven decades and 1.0, from k = 0 (signed) or k = 1 (unsigned).

    ``low``: a magnitude x is raised to this. ``thresholds``: ascending; l of them are below x. ``encode_slope``,
    ``encode_shift``: ``u = min(fused(x, slope[l], ENCODE_OFFSET), ENCODE_TOP)``, and the low byte of ``bits(u) >>
    shift[l]`` is that of f: a line for each decade, one for 1.0, and in the signed map one for zero, with the threshold
    ``low``. (A positive value of the unsigned map never becomes zero.) In decade d, ``u = 4 f / P`` before f is
    rounded down, from 4 to 8: its exponent field is 129, of which a shift by ``23 - log2(P)`` leaves the last bit, f's
    first, and multiples of 256. Lines of a single f have slope 0 and find its byte in the bits of the offset.
    """

    signed: bool
    decode_slope: np.ndarray
    decode_offset: np.ndarray
    low: np.float32
    thresholds: np.ndarray
    encode_slope: np.ndarray
    encode_shift: np.ndarray

    @property
    def zero_code(self) -> int:
        return 127 if self.signed else 0


@cache
def dynamic_map(name: str) -> DynamicMap:
    """The constants of ``"dynamic_signed"`` or ``"dynamic_unsigned"``."""
    signed = name == "dynamic_signed"
    decade = np.arange(DECADES)
    steps = 2.0 ** (decade + (0 if signed else 1))  # P
    unit = 10.0 ** (decade - 6.0)  # the upper end of the decade
    slope, offset = 0.9 * unit / steps, unit * (0.1 + 0.9 * (0.5 - steps) / steps)  # value = f * slope + offset
    first, last = unit * (0.1 + 0.45 / steps), unit * (1 - 0.45 / steps)  # a decade's smallest and largest code
    low = first[0] / 2 if signed else first[0]
    zeros = 1 if signed else 0  # lines for it
    top = _SHIFT_TO[128] if signed else _SHIFT_TO[0]  # for 1.0, whose f is 128, or 256 with a low byte of 0
    many = steps > 1  # decades of more than one code
    slopes, shifts = np.where(many, 4 / (0.9 * unit), 0), np.where(many, 23 - np.log2(steps), _SHIFT_TO[1])
    f32 = np.float32
    return DynamicMap(
        signed=signed,
        decode_slope=np.array([0, *slope, 0, 0] if signed else [0, 0, *slope, 0], f32),
        decode_offset=np.array([0, *offset, 1, 0] if signed else [0, 0, *offset, 1], f32),
        low=f32(low),
        thresholds=np.array([low] * zeros + [*((last + np.append(first[1:], 1)) / 2)], f32),
        encode_slope=np.array([0] * zeros + [*slopes, 0], f32),
        encode_shift=np.array([_SHIFT_TO[0]] * zeros + [*shifts, top], np.int32),
    )


@cache
def _dynamic_values(name: str) -> np.ndarray:
    constants = dynamic_map(name)
    code = np.arange(256)
    f = (np.abs(code - 127) if constants.signed else code + 1).astype(np.float32)
    line = np.frexp(f)[1]  # the number of bits
    slope, offset = constants.decode_slope[line], constants.decode_offset[line]
    magnitude = (f.astype(np.float64) * slope + offset).astype(np.float32)  # exact in double: rounded once
    return np.where(code < constants.zero_code, -magnitude, magnitude).astype(np.float32)


def codebook(name: str) -> Tensor:
    """The values of a named map, float32, sorted ascending; a new tensor on the CPU.

    ``"dynamic_signed"``, ``"dynamic_unsigned"`` (256 values), ``"linear"`` (255 values k/127), ``"linear_unsigned"``
    (256 values k/255), ``"nf4"`` (QLoRA's NormalFloat: Dettmers et al., 2023, appendix E), ``"fp4"`` (sign, two bits
    of exponent, one of mantissa, as bitsandbytes orders by value), ``"nf2"``.

    Raises:
        ValueError: for an unknown name.
    """
    if name in MAPS:
        return torch.from_numpy(_dynamic_values(name).copy())
    check_name(name)
    return torch.tensor(_STATIC[name], dtype=torch.float32)


_FP4 = (0.0052083333, 0.1666666667, 0.25, 0.3333333333, 0.5, 0.6666666667, 1.0)
_STATIC: dict[str, tuple[float, ...]] = {
    "linear": tuple(k / 127 for k in range(-127, 128)),
    "linear_unsigned": tuple(k / 255 for k in range(256)),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(-x for x in reversed(_FP4)), 0.0, *_FP4),
    "nf2": (-1.0, 0.0, 0.3333333333, 1.0),
}


def check_name(name: str) -> None:
    """Raise ValueError unless ``codebook`` knows the name."""
    if name not in MAPS and name not in _STATIC:
        raise ValueError(
            f"codebook must be one of {sorted([*MAPS, *_STATIC])} or a sorted float32 tensor, got {name!r}"
        )


def check_codebook(values: Tensor) -> None:
    """Raise unless ``values`` is a strictly ascending float32 vector of 2 to 256 finite values that contains 1.0."""
    if values.dtype != torch.float32 or values.ndim != 1 or not 2 <= values.numel() <= 256:
        raise ValueError(
            "codebook must be a float32 vector of 2 to 256 values, "
            f"got {values.dtype} of shape {tuple(values.shape)}; convert it by .float().flatten()"
        )
    if not bool(torch.isfinite(values).all()) or not bool((values.diff() > 0).all()):
        raise ValueError("codebook must be finite and strictly ascending; sort it and remove duplicates")
    if float(values[-1]) != 1.0 or float(values[0]) < -1.0:
        raise ValueError(
            "codebook must lie in [-1, 1] and end at 1.0 (a block's scale), "
            f"got [{float(values[0])}, {float(values[-1])}]; divide it by its largest value"
        )


def cpp_tables() -> str:
    """C++ text: the constants of both dynamic maps, as hexadecimal floats, for ``src/dynamic_map.h``."""
    return "\n".join(_cpp_struct(name.title().replace("_", ""), dynamic_map(name)) for name in MAPS)


def _cpp_struct(name: str, constants: DynamicMap) -> str:
    lines = [f"struct {name}Constants {{", f"    static constexpr bool is_signed = {str(constants.signed).lower()};"]
    lines.append(f"    static constexpr int bias = {127 if constants.signed else -1};  // code = bias + f")
    lines.append(f"    static constexpr int lines = {len(constants.encode_slope)};")
    for field, value in (("low", constants.low), ("encode_offset", ENCODE_OFFSET), ("encode_top", ENCODE_TOP)):
        lines.append(f"    static constexpr float {field} = {float(value).hex()}f;")
    for field in ("decode_slope", "decode_offset", "thresholds", "encode_slope", "encode_shift"):
        values = getattr(constants, field)
        integer = values.dtype == np.int32
        text = ", ".join(str(v) if integer else f"{float(v).hex()}f" for v in values)
        lines.append(f"    static constexpr {'int' if integer else 'float'} {field}[{len(values)}] = {{{text}}};")
    return "\n".join([*lines, "};"])
