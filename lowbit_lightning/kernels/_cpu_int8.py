"""The int8 ops on CPU: src/int8_quantize.cpp and src/int8.cpp, compiled on first use, called through ctypes.

Equal to reference.py to the bit: the quantisers divide, multiply and round in the same order, and the product is exact
in int32 before it is scaled. src/int8_gemm.h says how the product is computed, src/int8_dot.h and src/int8_amx.h by
which instructions.

torch's own engines are not used. ``torch._int_mm`` is as fast on a processor with AVX-512 VNNI, but leaves the scaling
to another pass over memory and does not use AMX; oneDNN's ``qlinear_pointwise`` scales in another order, and without
AMX has no fast kernel for int8 inputs at all (measured: minutes instead of milliseconds).
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import host_library, source_text

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SLOW = "no int8 instructions"
REFUSED = "AMX refused, "  # and what is used in its place
_MANY = 1 << 15  # elements, or 64 products each, below which a second thread costs more than it saves

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_QUANTIZE: list[Any] = [_POINTER, _INT, _LONG, _LONG, *[_POINTER] * 5, _INT]
_MATMUL: list[Any] = [
    _POINTER,
    _POINTER,
    _LONG,
    _LONG,
    _LONG,
    _POINTER,
    _POINTER,
    _POINTER,
    _POINTER,
    _INT,
    _POINTER,
    _INT,
]


@cache
def quantize_library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled quantisers; ``flags`` choose another instruction set, for tests."""
    compiled = host_library(source_text("int8_quantize.cpp"), flags=flags)
    compiled.lb_int8_quantize.restype, compiled.lb_int8_quantize.argtypes = None, _QUANTIZE
    return compiled


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled product, with its argument types; ``flags`` choose another instruction set, for tests."""
    compiled = host_library(source_text("int8.cpp"), flags=flags)
    compiled.lb_int8_instructions.restype = ctypes.c_char_p
    compiled.lb_int8_matmul_workspace.restype = _LONG
    compiled.lb_int8_matmul_workspace.argtypes = [_LONG, _LONG, _LONG]
    compiled.lb_int8_matmul.restype, compiled.lb_int8_matmul.argtypes = None, _MATMUL
    if instructions(compiled) == SLOW and not flags:
        warnings.warn(
            "lowbit_lightning knows no instructions for int8 products on this processor: int8_matmul gives the same"
            " numbers, but not faster than float32; precision='bf16-mixed' or '32-true' may train faster here",
            stacklevel=2,
        )
    if instructions(compiled).startswith(REFUSED) and not flags:
        warnings.warn(
            "this processor has AMX, but the system does not give this process its registers (Linux 5.16 and newer do,"
            " unless a sandbox or a hypervisor forbids it); int8 products run several times slower than they could, by"
            f" {instructions(compiled).removeprefix(REFUSED)}",
            stacklevel=2,
        )
    return compiled


def instructions(compiled: ctypes.CDLL) -> str:
    """What the product is computed with: "AMX", or an instruction set as ``int8_dot.h`` names it."""
    return compiled.lb_int8_instructions().decode()


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_rowwise``."""
    form = _empty_form(*x.shape)
    _quantize(x, seed, *form, None, None)
    return form


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_colwise``."""
    rows, columns = x.shape
    form = _empty_form(columns, rows)
    _quantize(x, seed, None, None, *form)
    return form


def quantize_both(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.quantize_both``."""
    rows, columns = x.shape
    forms = *_empty_form(rows, columns), *_empty_form(columns, rows)
    _quantize(x, seed, *forms)
    return forms


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See ``reference.int8_matmul``."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device="cpu")
    workspace = torch.empty(library().lb_int8_matmul_workspace(m, n, k), dtype=torch.uint8, device="cpu")
    bias = None if bias is None else bias.float().contiguous()
    library().lb_int8_matmul(
        a.data_ptr(),
        b.data_ptr(),
        m,
        n,
        k,
        a_scales.data_ptr(),
        b_scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        DTYPES[out_dtype],
        workspace.data_ptr(),
        _threads(m * n * k // 64),
    )
    return out


def _empty_form(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, columns, dtype=torch.int8, device="cpu"), torch.empty(
        rows, dtype=torch.float32, device="cpu"
    )


def _quantize(x: Tensor, seed: int | None, *forms: Tensor | None) -> None:
    word = None if seed is None else ctypes.byref(ctypes.c_int64(seed))
    pointers = [None if form is None else form.data_ptr() for form in forms]
    threads = _threads(x.numel())
    quantize_library().lb_int8_quantize(x.data_ptr(), DTYPES[x.dtype], *x.shape, word, *pointers, threads)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _MANY else 1
