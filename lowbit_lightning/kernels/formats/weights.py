"""The formats of low-bit weights: 8 to 2 bits, a scale for each block of a row, codes packed into bytes.

A weight ``[..., K]`` is a stack of *rows* of K elements. A row is cut into blocks of ``block_size`` elements (the last
one may be short), and an element is

    table[code] * scale + offset

with the block's scale and, in the affine formats, its offset. Everything that belongs to a row lies in that row of two
tensors, so both can be cut, sharded and gathered along dimension 0 without decoding anything:

``packed``, uint8 ``[..., packed_width(K)]``: the codes. They stand like digits: the first element of a byte is in its
highest bits (as in bitsandbytes). 3-bit codes are kept as two planes, the low two bits of all elements of the row and
after them the high bits, eight to a byte. Rows end at a byte; unused bits are zero. ``int8`` has one byte an element,
two's complement.

``scales``, of ``[..., scales_width(K)]``: by ``scale_kind``,

* ``"float32"``, one float32 for each block. A non-finite value makes the scale NaN, and so the whole block.
* ``"square"``, uint8: an exponent byte, then a code for each block, ``scale = code**2 * 2**(exponent - 127)``. Steps
  are finer where scales are small, and decoding is exact: a square of 16 bits and a power of two. Affine formats have
  ``[exponent, exponent of offsets, codes, codes of offsets]``, where an offset's code is an int8 in two's complement
  and ``offset = code * |code| * 2**(exponent - 127)``. The exponent 255 marks a row with a non-finite value: it is
  NaN.

**How a block is fitted.** ``"absmax"`` takes the extremes: the largest magnitude is the scale of a codebook, which
makes ``nf4`` and ``fp4`` those of bitsandbytes to the bit, and an affine format spans minimum to maximum. ``"lsq"``
looks for the least squared error: from several starts it alternates between the nearest codes and the best scale (and
offset) for them. On normal weights that takes away 10 % of the error at 4 bits and 25 % at 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit_lightning.kernels.formats.maps import check_block_size, codebook

FITS = ("absmax", "lsq")
SCALE_SQUARE, OFFSET_SQUARE = 255**2, 127**2
"""The largest squares of a code, of a scale and of an offset."""
BIAS, LOWEST_EXPONENT, HIGHEST_EXPONENT, NAN_EXPONENT = 127, 1, 254, 255
"""Exponent bytes: ``2**(byte - BIAS)``, from the smallest normal float32 on."""
NARROWER, CODEBOOK_ROUNDS, AFFINE_ROUNDS = (1.0, 0.9, 0.8, 0.7, 0.6), 3, 8
"""The starts of a least-squares fit, parts of the extremes; its rounds of codes and scales."""

SMALLEST_DIVISOR = 1e-38
"""A block is divided by its scale, or by this if that is less: float32, and bitsandbytes' choice."""

_FP4_BY_CODE = tuple(x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
_KINDS = {"int8": (8, 0), "nf4": (4, 64), "fp4": (4, 64), "int4": (4, 64), "int3": (3, 64), "int2": (2, 32)}
_SPEC = re.compile(r"(?P<kind>[a-z]+\d)(?P<dq>-dq)?(-g(?P<block>\d+))?")


@dataclass(frozen=True)
class Format:
    """A format of weights; ``weight_format`` makes one. ``str(format)`` is its name, from which it can be made again.

    ``kind``: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"`` or ``"int2"``. ``bits``: of a code.
    ``block_size``: elements that share a scale; 0 is the whole row. ``double_quant``: scales in 8 bits, of a codebook
    format (affine ones always have that).
    """

    kind: str
    bits: int
    block_size: int
    double_quant: bool = False

    def __str__(self) -> str:
        return self.name

    @cached_property
    def name(self) -> str:
        block = "" if self.block_size == _KINDS[self.kind][1] else f"-g{self.block_size}"
        return f"{self.kind}{'-dq' if self.double_quant else ''}{block}"

    @property
    def is_affine(self) -> bool:
        return self.kind in ("int4", "int3", "int2")

    @cached_property
    def scale_kind(self) -> str:
        return "square" if self.is_affine or self.double_quant else "float32"

    @cached_property
    def scales_dtype(self) -> torch.dtype:
        return torch.float32 if self.scale_kind == "float32" else torch.uint8

    @property
    def signs(self) -> tuple[float, ...]:
        """The signs of the scale that a least-squares fit tries. It tries both where that can matter."""
        return (1.0, -1.0) if self.kind == "nf4" and self.scale_kind == "float32" else (1.0,)

    @property
    def default_fit(self) -> str:
        return "lsq" if self.is_affine else "absmax"

    @cached_property
    def values(self) -> tuple[float, ...]:
        """``table``: the value of each code, in the order of codes. Of ``int8``: -128 to 127, by ``code ^ 128``."""
        if self.kind == "nf4":
            return tuple(codebook("nf4").tolist())
        if self.kind == "fp4":  # sign, two bits of exponent, one of mantissa: not ascending
            return (*_FP4_BY_CODE, *(-x for x in _FP4_BY_CODE))
        return tuple(code - (2**self.bits - (0 if self.bits == 8 else 1)) / 2 for code in range(2**self.bits))

    @property
    def bfloat16_unit(self) -> float:
        """The factor for the table before it is rounded to bfloat16. With it nf4 is off by 0.063 % (rms), instead of
        0.106 %; fp4 is exact. The tables of other formats are exact as they are."""
        return {"nf4": 1.437, "fp4": 12.0}.get(self.kind, 1.0)

    def order(self) -> tuple[int, ...]:
        """The codes by ascending value, of equal ones the lower first."""
        return tuple(sorted(range(len(self.values)), key=lambda code: self.values[code]))

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """``values`` as float32 ``[2**bits]``."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def block_length(self, row_length: int) -> int:
        """Elements in a block that is not cut short."""
        return self.block_size or max(row_length, 1)

    def blocks_per_row(self, row_length: int) -> int:
        return -(-row_length // self.block_size) if self.block_size else 1

    def packed_width(self, row_length: int) -> int:
        """Bytes of a row's codes."""
        if self.bits == 3:
            return -(-row_length // 4) + -(-row_length // 8)
        return -(-row_length * self.bits // 8)

    def scales_width(self, row_length: int) -> int:
        """Elements of a row's scales, of ``scales_dtype``."""
        blocks = self.blocks_per_row(row_length)
        if self.scale_kind == "float32":
            return blocks
        return 2 * (1 + blocks) if self.is_affine else 1 + blocks

    def bits_per_weight(self, row_length: int) -> float:
        """Bits that an element takes with its share of the scales, in rows of this length."""
        scale_bytes = self.scales_width(row_length) * self.scales_dtype.itemsize
        return 8 * (self.packed_width(row_length) + scale_bytes) / row_length


@cache
def weight_format(name: str | Format, *, block_size: int | None = None, double_quant: bool | None = None) -> Format:
    """The format of a name: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"``, ``"int2"``; with ``-dq`` for
    scales in 8 bits (nf4, fp4), with ``-g128`` for a block size: ``"nf4-dq"``, ``"int4-g32"``, ``"nf4-dq-g128"``.

    ``block_size`` (a power of two from 32 to 4096; 64, for int2 32) and ``double_quant`` replace what the name says.

    Raises:
        ValueError: for an unknown name, a block size that is not allowed, or an option that the format doesn't have.
    """
    match = _SPEC.fullmatch(str(name))
    if not match or match["kind"] not in _KINDS:
        raise ValueError(
            f"the format of weights must be one of {sorted(_KINDS)}, with -dq for 8-bit scales and -g128 for a block"
            f" size where wanted ('nf4-dq', 'int4-g32'), got {str(name)!r}"
        )
    kind, (bits, block) = match["kind"], _KINDS[match["kind"]]
    wanted = block_size if block_size is not None else int(match["block"]) if match["block"] else block
    double = double_quant if double_quant is not None else bool(match["dq"])
    if kind == "int8" and wanted:
        raise ValueError(f"block_size must be left out for int8, whose scales are those of rows; got {wanted}")
    if kind not in ("nf4", "fp4") and double:
        raise ValueError(f"double_quant is for nf4 and fp4, got it with {kind}; int4, int3 and int2 always have it")
    if kind != "int8":
        check_block_size(wanted)
    return Format(kind, bits, wanted, double)


def check_fit(form: Format, fit: str | None) -> str:
    """``fit``, by default the format's own. Raises ValueError unless the format can be fitted so."""
    if fit is None:
        return form.default_fit
    if fit not in FITS or (form.kind == "int8" and fit != "absmax"):
        allowed = FITS[:1] if form.kind == "int8" else FITS
        raise ValueError(f"fit must be one of {allowed} for {form}, got {fit!r}")
    return fit
