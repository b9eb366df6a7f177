"""Int8 matrices with a scale for each row or column, on CPU: src/int8_quantize.cpp and src/int8_hadamard.cpp.

It divides, multiplies and rounds in the reference's order.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, specialised

MANY = 1 << 15
"""Elements below which a second thread costs more than it saves."""
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_QUANTIZE: list[Any] = [_POINTER, _INT, _LONG, _LONG, _POINTER, _INT, *[_POINTER] * 4, _INT, _INT]
_GROUPS: list[Any] = [_POINTER, _INT, _POINTER, _LONG, _LONG, *[_POINTER] * 5, _INT, _LONG]


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled quantisers; ``flags`` choose another instruction set, for tests."""
    compiled = host_library(specialised("int8_quantize.cpp"), flags=flags)
    compiled.lb_int8_quantize.restype, compiled.lb_int8_quantize.argtypes = None, _QUANTIZE
    compiled.lb_int8_quantize_groups.restype, compiled.lb_int8_quantize_groups.argtypes = None, _GROUPS
    return compiled


@cache
def rotation(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled rotation; ``flags`` as for ``library``."""
    compiled = host_library(specialised("int8_hadamard.cpp"), flags=flags)
    compiled.lb_hadamard.restype = None
    compiled.lb_hadamard.argtypes = [_POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _INT]
    return compiled


def hadamard(x: Tensor, dim: int) -> Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    threads = torch.get_num_threads() if x.numel() >= MANY else 1
    rotation().lb_hadamard(x.data_ptr(), DTYPE_NUMBERS[x.dtype], *x.shape, dim, out.data_ptr(), threads)
    return out


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    form = empty_form(*x.shape)
    quantize_into(x, seed, *form, None, None)
    return form


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    form = empty_form(columns, rows)
    quantize_into(x, seed, None, None, *form)
    return form


def quantize_both(x: Tensor, seed: int | None, nearest_rows: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    forms = *empty_form(rows, columns), *empty_form(columns, rows)
    quantize_into(x, seed, *forms, nearest_rows=nearest_rows)
    return forms


def quantize_channels(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    form = _empty_channels(x)
    quantize_into(x, seed, None, None, *form, turned=False)
    return form


def quantize_image(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forms = *empty_form(*x.shape), *_empty_channels(x)
    quantize_into(x, seed, *forms, turned=False)
    return forms


def _empty_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    return q, torch.empty(columns, dtype=torch.float32, device="cpu")


def empty_form(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Uninitialised int8 ``[rows, columns]`` and scales ``[rows]``."""
    q = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    return q, torch.empty(rows, dtype=torch.float32, device="cpu")


def quantize_into(
    x: Tensor, seed: int | None, *forms: Tensor | None, nearest_rows: bool = False, turned: bool = True
) -> None:
    """Write the results of ``quantize_both``, or of ``quantize_image`` if not ``turned``, into the given tensors.
    Give None, None for a form that is not wanted."""
    word = None if seed is None else ctypes.byref(ctypes.c_int64(seed))
    pointers = [None if form is None else form.data_ptr() for form in forms]
    threads = torch.get_num_threads() if x.numel() >= MANY else 1
    matrix = x.data_ptr(), DTYPE_NUMBERS[x.dtype], *x.shape
    library().lb_int8_quantize(*matrix, word, nearest_rows, *pointers, turned, threads)
