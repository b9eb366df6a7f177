"""What the CUDA kernels of low-bit weights are told of a format: macros (src/lowbit_units.h) and a struct."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.kernels.sources import specialised


class Form(ctypes.Structure):
    """``struct Form`` of src/lowbit_units.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "packed_stride", "scales_stride")),
        *(("unit", ctypes.c_float), ("values", ctypes.c_float * 16)),
    ]


@cache
def form_argument(name: str, length: int, factor: float = 1.0) -> Form:
    """The struct for rows of ``length`` elements. The table is multiplied by ``factor``, and the unit divided by it."""
    f = weight_format(name)
    values = [value * factor for value in f.values] if f.bits < 8 else ()
    scales_stride = f.scales_width(length) * f.scales_dtype.itemsize
    return Form(length, f.packed_width(length), scales_stride, 1 / factor, (ctypes.c_float * 16)(*values))


@cache
def text_of(source: str, name: str, **macros: torch.dtype | int) -> str:
    """``src/SOURCE`` for a format."""
    f = weight_format(name)
    form = {"BITS": f.bits, "BLOCK": f.block_size, "SQUARE": f.scale_kind == "square", "AFFINE": f.is_affine}
    return specialised(source, **form, **macros)
