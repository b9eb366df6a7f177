"""The structs that Python fills and kernels read, the same ones on the CPU and on the GPU: those of the step, and what
the quantisers of low-bit weights are told."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from lowbit_lightning.kernels.arguments import StepArguments, StepScalars
from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.kernels.formats.weights import AFFINE_ROUNDS, CODEBOOK_ROUNDS, NARROWER, SMALLEST_DIVISOR

_C_TYPES = {ctypes.c_void_p: "const float*", ctypes.c_uint64: "uint64_t", ctypes.c_int32: "int32_t"}
_SHAPE_WORDS = 5  # row_length to first_block
_rows: WeakKeyDictionary[StepArguments, array] = WeakKeyDictionary()


SETTINGS: list[tuple[str, Any]] = [
    ("lr", ctypes.c_void_p),
    ("unscale", ctypes.c_void_p),
    ("clip", ctypes.c_void_p),
    ("skip", ctypes.c_void_p),
    ("seed", ctypes.c_uint64),
    ("maximize", ctypes.c_int32),
]


class StepSettings(ctypes.Structure):
    """What a step is told as a whole: pointers to one float, or null, then values. ``src/step_settings.h`` uses it."""

    _fields_ = SETTINGS


_pointers_of = attrgetter(*(name for name, kind in SETTINGS if kind is ctypes.c_void_p))
_values_of = attrgetter(*(name for name, kind in SETTINGS if kind is not ctypes.c_void_p))


def settings_tensors(scalars: StepScalars) -> list[Tensor]:
    """What ``StepSettings`` points at."""
    return [value for value in _pointers_of(scalars) if value is not None]


def settings_values(scalars: StepScalars) -> list[int | None]:
    """The fields of ``StepSettings``."""
    pointers = [None if value is None else value.data_ptr() for value in _pointers_of(scalars)]
    return [*pointers, *_values_of(scalars)]


def cpp_settings() -> str:
    """C++ text: ``struct StepSettings``."""
    return f"struct StepSettings {{ {' '.join(f'{_C_TYPES[kind]} {name};' for name, kind in SETTINGS)} }};"


def hyper_values(scalars: StepScalars) -> ctypes.Array:
    """The rule's hyperparameters as doubles, at least one."""
    return _doubles(len(scalars.hyper) or 1)(*scalars.hyper)


@cache
def _doubles(count: int) -> type[ctypes.Array]:
    return ctypes.c_double * count


def parameter_rows(arguments: StepArguments, grads: Sequence[Tensor]) -> array:
    """Rows of ``struct Parameter`` (src/parameter.h) as int64, and one that ends them; its last word is the number of
    all blocks. Addresses are looked up in every call, shapes once."""
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
    """Of a format, rows of ``length`` elements and a fit."""
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
