"""The CPU backend: C++ from ``src/``, compiled by the host's compiler on first use and called through ctypes.

The optimizer step is compiled once for each combination of rule, dtypes, coded states and block size that occurs, so
that nothing is decided inside its loop; the cache makes that a matter of the first run on a machine.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels._cpu_int8 import int8_matmul, quantize_both, quantize_colwise, quantize_rowwise
from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.compile import host_compiler, host_library, source_text
from lowbit_lightning.kernels.formats import BlockGrid

__all__ = [
    "dequantize_blockwise",
    "int8_matmul",
    "load",
    "optimizer_norms",
    "optimizer_step",
    "quantize_blockwise",
    "quantize_both",
    "quantize_colwise",
    "quantize_rowwise",
]

_CPP_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
_DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAP_NUMBERS = {"dynamic_signed": 0, "dynamic_unsigned": 1, "custom": 2}


def load() -> None:
    """Raise CompilerNotFound where there is no host compiler. Compiles nothing."""
    host_compiler()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


# -- block-wise quantisation -----------------------------------------------------------------------------------------


@cache
def _quantize_library() -> ctypes.CDLL:
    return host_library(source_text("quantize.cpp", generated={"dynamic_tables.h": formats.cpp_tables()}))


class _Grid(ctypes.Structure):
    """``struct Grid`` of src/quantize.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("row_length", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


class _Map(ctypes.Structure):
    """``struct Map`` of src/quantize.cpp."""

    _fields_ = [("map", ctypes.c_int), ("values", ctypes.c_void_p), ("count", ctypes.c_int)]


def _grid(shape: torch.Size, block_size: int) -> _Grid:
    grid = BlockGrid.of(shape, block_size)
    return _Grid(grid.rows, grid.row_length, block_size, torch.get_num_threads())


def _map(codebook: str, values: Tensor | None) -> _Map:
    if values is None:
        return _Map(_MAP_NUMBERS[codebook], None, 0)
    return _Map(_MAP_NUMBERS[codebook], values.data_ptr(), values.numel())


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_blockwise``; equal to it to the bit."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(BlockGrid.of(x.shape, block_size).scales_shape, dtype=torch.float32, device="cpu")
    if x.numel():
        grid, book, dtype = _grid(x.shape, block_size), _map(codebook, values), ctypes.c_int(_DTYPE_NUMBERS[x.dtype])
        _quantize_library().quantize_blockwise(_pointer(x), dtype, grid, book, _pointer(codes), _pointer(scales))
    return codes, scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See ``reference.dequantize_blockwise``; equal to it to the bit."""
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    if codes.numel():
        grid, book, number = _grid(codes.shape, block_size), _map(codebook, values), ctypes.c_int(_DTYPE_NUMBERS[dtype])
        _quantize_library().dequantize_blockwise(_pointer(codes), _pointer(scales), grid, book, _pointer(out), number)
    return out


# -- optimizer step --------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """``struct Call`` of src/optimizer_step.cpp."""

    _fields_ = [
        ("parameters", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hyper", ctypes.POINTER(ctypes.c_double)),
        ("lr", ctypes.c_void_p),
        ("unscale", ctypes.c_void_p),
        ("clip", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("square_sums", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("maximize", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@cache
def _step_library(
    rule: str, param: torch.dtype, grad: torch.dtype, coded: int, block_size: int, stochastic: bool, remainder: bool
) -> ctypes.CDLL:
    macros = {
        "PARAM": _CPP_TYPES[param],
        "GRAD": _CPP_TYPES[grad],
        "CODED": coded,
        "BLOCK": block_size,
        "STOCHASTIC": int(stochastic),
        "REMAINDER": int(remainder),
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in macros.items())
    generated = {"rule.h": rules.get(rule).cpp(), "dynamic_tables.h": formats.cpp_tables()}
    return host_library(source_text("optimizer_step.cpp", prelude=defines, generated=generated))


def optimizer_step(arguments: StepArguments, norms: Tensor | None) -> None:
    """See ``reference.optimizer_step``; equal to it to the bit."""
    call, _keep = _call(arguments, norms)
    _specialised(arguments).optimizer_step(ctypes.byref(call))


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """See ``reference.optimizer_norms``; equal to it to the bit."""
    shape = len(arguments.params), len(rules.get(arguments.rule).norms)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    call, _keep = _call(arguments, None)
    _specialised(arguments).optimizer_norms(ctypes.byref(call), _pointer(out))
    return out


def _specialised(arguments: StepArguments) -> ctypes.CDLL:
    coded = sum(1 << s for s, state in enumerate(arguments.states) if state[0].dtype == torch.uint8)
    param, grad = arguments.params[0].dtype, arguments.grads[0].dtype
    stochastic = arguments.stochastic_rounding and param == torch.bfloat16
    remainder = bool(arguments.remainders)
    return _step_library(arguments.rule, param, grad, coded, arguments.block_size, stochastic, remainder)


def _call(arguments: StepArguments, norms: Tensor | None) -> tuple[_Call, tuple]:
    """The argument structure, and what must stay alive while it is used."""
    table = _table(arguments)
    hyper = (ctypes.c_double * len(arguments.hyper))(*arguments.hyper)
    call = _Call(
        *(table.buffer_info()[0], len(arguments.params), hyper),
        *(
            None if t is None else t.data_ptr()
            for t in (arguments.lr, arguments.unscale, arguments.clip, arguments.skip)
        ),
        None if norms is None else norms.data_ptr(),
        *(arguments.seed & (2**64 - 1), arguments.maximize, torch.get_num_threads()),
    )
    return call, (table, hyper, norms)


def _table(arguments: StepArguments) -> array:
    """Rows of ``struct Parameter``, one a parameter. Addresses are looked up in every step, shapes once."""
    columns = [arguments.params, arguments.grads, arguments.steps]
    for lists in (arguments.states, arguments.scales):
        columns += [*lists, *([[]] * (3 - len(lists)))]
    columns += [arguments.remainders]
    if "cpu" not in arguments.cache:
        table = array("q")
        for i in range(len(arguments.params)):
            grid = arguments.grid(i)
            place = (grid.rows, grid.row_length, arguments.ordinals[i], arguments.offsets[i])
            table.extend((*([0] * len(columns)), *place))
        arguments.cache["cpu"] = table
    table = arguments.cache["cpu"]
    for number, tensors in enumerate(columns):
        if tensors:
            table[number :: len(columns) + 4] = array("q", map(Tensor.data_ptr, tensors))
    return table
