"""The scaled int8 product on CPU: src/int8.cpp, exact in int32 before it is scaled.

src/int8_gemm.h says how it is computed, src/int8_dot.h and src/int8_amx.h by which instructions.

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

from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, specialised

SLOW = "no int8 instructions"
REFUSED = "AMX refused, "  # followed by the instructions that are used instead
MANY = 1 << 21
"""Products below which a second thread costs more than it saves."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIZES: list[Any] = [_LONG, _LONG, _LONG]
_MATMUL: list[Any] = [_POINTER, _POINTER, *_SIZES, *[_POINTER] * 4, _INT, _POINTER, _INT]
_GROUPS: list[Any] = [_POINTER, _LONG, _LONG, _LONG, _INT]
_GROUPED: list[Any] = [_POINTER, _POINTER, *_GROUPS, *[_POINTER] * 4, _INT, _POINTER, _INT, _LONG]


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled product; ``flags`` choose another instruction set, for tests."""
    compiled = host_library(specialised("int8.cpp"), flags=flags)
    compiled.lb_int8_instructions.restype = ctypes.c_char_p
    compiled.lb_int8_matmul_workspace.restype, compiled.lb_int8_matmul_workspace.argtypes = _LONG, _SIZES
    compiled.lb_int8_matmul.restype, compiled.lb_int8_matmul.argtypes = None, _MATMUL
    compiled.lb_int8_grouped_workspace.restype, compiled.lb_int8_grouped_workspace.argtypes = _LONG, _GROUPS
    compiled.lb_int8_grouped.restype, compiled.lb_int8_grouped.argtypes = None, _GROUPED
    if instructions(compiled) == SLOW and not flags:
        warnings.warn(
            "lowbit_lightning knows no instructions for int8 products on this processor: int8_matmul gives the same"
            " numbers, but is no faster than float32; precision='bf16-mixed' or '32-true' may train faster here",
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
    """The instructions that the product uses: "AMX", or a name from ``int8_dot.h``."""
    return compiled.lb_int8_instructions().decode()


def engines(device: torch.device) -> dict[str, str]:
    """See ``dispatch.engine``."""
    return {"int8_matmul": instructions(library())}


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    if bias is None and 2 * m <= n <= k:  # b would be packed, which for few rows takes as long as the product
        return int8_matmul(b, a, b_scales, a_scales, None, out_dtype).T.contiguous()
    out = torch.empty(m, n, dtype=out_dtype, device="cpu")
    workspace = torch.empty(library().lb_int8_matmul_workspace(m, n, k), dtype=torch.uint8, device="cpu")
    bias = None if bias is None else bias.float()
    library().lb_int8_matmul(
        *(a.data_ptr(), b.data_ptr(), m, n, k, a_scales.data_ptr(), b_scales.data_ptr()),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), DTYPE_NUMBERS[out_dtype], workspace.data_ptr()),
        torch.get_num_threads() if m * n * k >= MANY else 1,
    )
    return out
