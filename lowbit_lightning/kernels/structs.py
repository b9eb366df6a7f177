"""The structs that Python fills and kernels read: those of the step, and those of the quantisers of low-bit weights.

They are the same on the CPU and on the GPU.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from lowbit_lightning.kernels.arguments import SCALARS, StepArguments, StepScalars
from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.kernels.formats.weights import AFFINE_ROUNDS, CODEBOOK_ROUNDS, NARROWER, SMALLEST_DIVISOR

_TYPES: dict[Any, tuple[Any, str]] = {
    Tensor | None: (ctypes.c_void_p, "const float*"),
    int: (ctypes.c_uint64, "uint64_t"),
    bool: (ctypes.c_int32, "int32_t"),
}
"""The type of a scalar, for ctypes and in C++ text."""
_SETTINGS = [(name, *_TYPES[kind]) for name, kind in SCALARS.items() if name != "hyper"]
_SHAPE_WORDS = 5  # row_length to first_block
_rows: WeakKeyDictionary[StepArguments, array] = WeakKeyDictionary()


class StepSettings(ctypes.Structure):
    """``StepScalars`` without ``hyper``: values, and pointers to one float or null, for ``src/step_settings.h``."""

    _fields_ = [(name, kind) for name, kind, _ in _SETTINGS]


def settings_tensors(scalars: StepScalars) -> list[Tensor]:
    """The tensors that ``StepSettings`` points to."""
    return [value for value in scalars if isinstance(value, Tensor)]


def settings_values(scalars: StepScalars) -> list[int | None]:
    """The values of the fields of ``StepSettings``."""
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in scalars[1:]]


def cpp_settings() -> str:
    return f"struct StepSettings {{ {' '.join(f'{text} {name};' for name, _, text in _SETTINGS)} }};"


def hyper_values(scalars: StepScalars) -> ctypes.Array:
    """The rule's hyperparameters as an array of doubles with at least one element."""
    return _doubles(len(scalars.hyper) or 1)(*scalars.hyper)


@cache
def _doubles(count: int) -> type[ctypes.Array]:
    return ctypes.c_double * count


def parameter_rows(arguments: StepArguments, grads: Sequence[Tensor]) -> array:
    """Rows of ``struct Parameter`` (src/parameter.h) as int64: one per parameter, and a last row, whose last word is
    the number of all blocks. Addresses are looked up in every call, shapes once."""
    a = arguments
    nothing: list[list[Tensor]] = [] if a.states else [[]]
    columns: list[Sequence[Tensor]] = [a.params, grads, a.steps, *a.states, *nothing, *a.scales, *nothing, a.remainders]
    words = _rows.get(a)
    if words is None:
        words = _rows[a] = _shapes(a, len(columns))
    width = len(columns) + _SHAPE_WORDS
    for number, tensors in enumerate(columns):
        if tensors:
            words[number : len(tensors) * width : width] = array("q", [*map(Tensor.data_ptr, tensors)])
    return words


def _shapes(arguments: StepArguments, addresses: int) -> array:
    """The rows with zeros for addresses."""
    words = array("q")
    first_block = 0
    for i in range(len(arguments.params)):
        grid = arguments.grid(i)
        words.extend([0] * addresses)
        words.extend((grid.row_length, grid.blocks_per_row, arguments.ordinals[i], arguments.offsets[i], first_block))
        first_block += grid.rows * grid.blocks_per_row
    words.extend([0] * (addresses + _SHAPE_WORDS - 1) + [first_block])
    return words


class FitRule(ctypes.Structure):
    """``struct Rule`` of src/lowbit_fit.h: how rows of a low-bit weight are fitted."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "block", "blocks", "packed_stride", "scales_stride")),
        *((name, ctypes.c_int32) for name in ("bits", "affine", "square", "least_squares", "signs")),
        *((name, ctypes.c_int32) for name in ("starts", "codebook_rounds", "affine_rounds")),
        *(("start", ctypes.c_float * 8), ("smallest_divisor", ctypes.c_float)),
        *((name, ctypes.c_float * 16) for name in ("ascending", "middles")),
        ("order", ctypes.c_int32 * 16),
    ]


@cache
def fit_rule(name: str, length: int, fit: str) -> FitRule:
    """The struct for a format, rows of ``length`` elements and a fit."""
    f = weight_format(name)
    rule = FitRule(
        *(length, f.block_length(length), f.blocks_per_row(length), f.packed_width(length)),
        *(f.scales_width(length) * f.scales_dtype.itemsize, f.bits, f.is_affine, f.scale_kind == "square"),
        *(fit == "lsq", len(f.signs), len(NARROWER), CODEBOOK_ROUNDS, AFFINE_ROUNDS),
        *((ctypes.c_float * 8)(*NARROWER), SMALLEST_DIVISOR),
    )
    if not f.is_affine:
        ascending = f.table()[list(f.order())]
        rule.ascending[:] = ascending.tolist()
        rule.middles[:15] = ((ascending[:-1] + ascending[1:]) / 2).tolist()
        rule.order[:] = f.order()
    return rule
