"""What the CUDA kernels of low-bit weights are told of a format: macros (src/lowbit_units.h) and a struct."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.kernels.sources import specialised

_LONG = ctypes.c_int64


class _Form(ctypes.Structure):
    """``struct Form`` of src/lowbit_units.h."""

    _fields_ = [
        *((name, _LONG) for name in ("length", "packed_stride", "scales_stride")),
        ("values", ctypes.c_float * 16),
    ]


@cache
def form_argument(name: str, length: int) -> _Form:
    """The struct for rows of ``length`` elements."""
    f = weight_format(name)
    values = f.values if f.bits < 8 else ()
    scales_stride = f.scales_width(length) * f.scales_dtype.itemsize
    return _Form(length, f.packed_width(length), scales_stride, (ctypes.c_float * 16)(*values))


@cache
def text_of(source: str, name: str, **macros: torch.dtype | int) -> str:
    """``src/SOURCE`` for a format."""
    f = weight_format(name)
    form = {"BITS": f.bits, "BLOCK": f.block_size, "SQUARE": f.scale_kind == "square", "AFFINE": f.is_affine}
    return specialised(source, **form, **macros)
