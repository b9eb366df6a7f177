"""The kernels of low-bit weights that the roofline looks at.

x is float16, which has tensor units on every architecture. Scales and x are read once for many elements, so little
depends on their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import Format, weight_format
from roofline.describe import F16, Phase, Work, random

FORMS = ("int8", "nf4", "nf4-dq", "int4", "int3", "int2")
LENGTH = 4096  # of a row, whose exponent bytes and tails then weigh nothing


def lowbit_works() -> Iterator[Work]:
    for form in ("nf4", "int4"):
        yield from _elementwise(weight_format(form))
    for form in FORMS:
        yield _row(weight_format(form))
    for form in FORMS:
        yield _gemv(weight_format(form), 8)
    yield _gemv(weight_format("nf4"), 32)
    yield _product(weight_format("nf4"))


def _bytes(f: Format) -> float:
    """Of a weight and its share of the scales."""
    return f.bits_per_weight(LENGTH) / 8


def _made(f: Format, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.lowbit_quantize(random(rows, length), f, "absmax")


def _scale_bytes(f: Format) -> int:
    """That a lane loads to scale the elements of one block, beside the row's exponents."""
    return 4 if f.scale_kind == "float32" else 1 + f.is_affine


def _elementwise(f: Format) -> Iterator[Work]:
    codes = f.bits  # bytes of a unit: eight elements
    name, weight = str(f), random(16, 512, F16)
    # Two readings of a row: the first finds the scale (and offset) of each block, the second writes codes.
    fit = Phase("quantize_weight", 8, 16, 8)
    write = Phase("quantize_weight", 8, 16 + (8 if f.is_affine else 4), codes, arithmetic=16 if f.is_affine else 8)
    run: Callable[[], object] = partial(kernels.lowbit_quantize, weight, f, "absmax")
    yield Work(f"{name} quantize fp16", (fit, write), run, 2 + _bytes(f), "element")

    # A lane has four units. An affine format's code is a difference, times its scale, plus its offset.
    arithmetic, made = 4 * (24 if f.is_affine else 8), _made(f, 16, 1024)
    loads = 4 * (codes + _scale_bytes(f)) + (0 if f.scale_kind == "float32" else 1 + f.is_affine)  # exponents once
    phase = Phase("decode", 32, loads, 64, arithmetic=arithmetic, whole=True)
    run = partial(kernels.lowbit_dequantize, *made, f, 1024, F16)
    yield Work(f"{name} dequantize fp16", (phase,), run, 2 + _bytes(f), "element")
    phase = Phase("decode", 32, loads + 8, 64, arithmetic=arithmetic, whole=True)
    run = partial(kernels.lowbit_embedding, torch.arange(15, -1, -1), *made, f, 1024, F16)
    yield Work(f"{name} embedding fp16", (phase,), run, 2 + _bytes(f), "element")


def _row(f: Format) -> Work:
    """A turn along K, of which a loop has two: a lane has 16 bytes of each of four rows, of 3 bits and their high ones.
    A warp multiplies 32 rows, as two fragments of 16 x 16, by x; and x by ones and powers of two."""
    turn = {8: 64, 4: 128, 3: 256, 2: 256}[f.bits]
    blocks = min(2, turn // 4 // f.block_size) or 1 if f.block_size else 0  # of a lane's part of a row
    of_block = 4 if f.scale_kind == "float32" else 2 if f.is_affine else 1
    products = turn // 8 + (turn // 16 if f.is_affine else 0)
    phase = Phase(
        *("lowbit_row", turn, 4 * (turn // 4 * f.bits // 8 + blocks * of_block)),
        tensor=products,
        arithmetic=4 * blocks * (2 if f.is_affine else 1),
        unrolled=(2,),
    )
    run = partial(kernels.lowbit_matmul, random(1, 2048, F16), *_made(f, 32, 2048), None, f)
    return Work(f"{f} gemv fp16, one row", (phase,), run, _bytes(f), "weight", operations=32.0 * 8 * products / turn)


def _gemv(f: Format, rows: int) -> Work:
    """A step of 128 along K: a warp multiplies 16 rows of the weight, or 32, as fragments of 16 x 16."""
    fragments = 2 if rows == 8 or not f.is_affine else 1
    threads = 32 * 128 // (16 * fragments)
    weights = 128 * 128 // threads  # of a lane
    blocks = 128 // f.block_size if f.block_size else 0  # of a row and a step
    scales = 2 * fragments * blocks * (4 if f.scale_kind == "float32" else 2 if f.is_affine else 1)
    scales = scales // 4 if 2 * fragments * blocks >= 4 else scales  # four lanes share them
    products = rows // 8 * (fragments + f.is_affine)  # of x's columns with the weight, and with ones
    phase = Phase(
        *("lowbit_gemv", weights, weights * f.bits // 8 + 16 * rows * 16 // threads + scales),
        tensor=8 * products,
        arithmetic=2 * fragments * blocks * rows // 8 * 2,
        ahead=3,
    )
    run = partial(kernels.lowbit_matmul, random(rows, 512, F16), *_made(f, 128, 512), None, f)
    name = f"{f} gemv fp16, up to {rows} rows"
    return Work(name, (phase,), run, _bytes(f), "weight", operations=32.0 * products / fragments)


def _product(f: Format) -> Work:
    """A step of 64 along K: each warp multiplies 64 x 32 x 64, by instructions of 16 x 8 x 16; each thread decodes four
    units and copies four chunks of x. A 16-bit operation takes as long as two in int8."""
    phase = Phase("lowbit_product", 64 * 32 * 64 / 32, 4 * (f.bits + 4) + 64, tensor=64, arithmetic=32, ahead=2)
    run = partial(kernels.lowbit_matmul, random(128, 512, F16), *_made(f, 128, 512), None, f)
    return Work(f"{f} product fp16, tiles of 128 x 128", (phase,), run, 0.0, "multiplication", operations=4.0)
