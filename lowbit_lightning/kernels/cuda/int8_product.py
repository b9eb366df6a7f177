"""The scaled int8 product on the GPU: cuBLASLt's (``torch._int_mm``) and our own epilogue."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch
from lowbit_lightning.kernels.cuda.types import CPP_TYPES, ceil_div


@cache
def scale_sums_text(out: torch.dtype, bias: torch.dtype) -> str:
    """src/int8_scale_sums.cu for one dtype of the result and of the bias."""
    macros = f"#define ELEMENT {CPP_TYPES[out]}\n#define BIAS {CPP_TYPES[bias]}"
    return source_text("int8_scale_sums.cu", prelude=macros)


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See ``reference.int8_matmul``; equal to it to the bit."""
    m, n = a.shape[0], b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    sums = _product(a, b)
    bias = None if bias is None else bias.contiguous()
    text = scale_sums_text(out_dtype, torch.float32 if bias is None else bias.dtype)
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(sums.shape[1])
    grid = ceil_div(n, 1024), min(m, 4096), 1
    launch.run(Launch(text, "scale_sums", grid, 256, (sums, *sizes, a_scales, b_scales, bias, out)))
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32, at least [M, N]: cuBLASLt wants more than 16 rows, and K and N in multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    more_k = -k % 8 if k else 8
    if more_k or m <= 16:
        a = pad(a, (0, more_k, 0, max(0, 17 - m)))
    if more_k or n % 8:
        b = pad(b, (0, more_k, 0, -n % 8))
    return torch._int_mm(a, b.t())
