"""The scaled int8 product on the GPU, by one of three engines.

``fused_product``: a kernel of our own on tensor cores (src/int8_product.cu). It scales the sums while they are in
registers. Its matrix instruction, ``mma.sync``, is the fastest that sm_80 to sm_89 and sm_120 have; sm_90 and sm_100
have faster ones of another kind, so there it reaches about 60 % of the peak at most.

``wgmma_product`` (int8_wgmma.py): the same by the instruction of sm_90.

``cublaslt_product``: cuBLASLt's through ``torch._int_mm``, which is fast everywhere, but leaves the int32 sums in
memory: they are written, read and scaled by another kernel, eight bytes for each element of the result.

All give the same bits. On sm_90 the fastest is measured for each kind of product, on its first call; elsewhere
``fusing_pays`` estimates it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.cuda import int8_wgmma, launch
from lowbit_lightning.kernels.cuda.fastest import Fastest
from lowbit_lightning.kernels.cuda.int8_wgmma import Engine
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.sources import specialised

_TILE_M, _TILE_K, _STAGES = 128, 64, 3
_WIDE_TILES = 256  # so many tiles of 128 x 256 fill any GPU (132 multiprocessors in an H200); fewer get 128 x 128
_SHORT_SUM = 2048


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    arguments = a, b, a_scales, b_scales, bias, out_dtype
    (m, k), n = a.shape, b.shape[0]
    rows = 1 << max(m - 1, 0).bit_length()  # batches of about the same size are one kind
    kind = a.device, rows, n, k, out_dtype, None if bias is None else bias.dtype
    # While a CUDA graph is captured, nothing can be measured.
    if int8_wgmma.exists(a.device) and m * n * k and (kind in fastest.chosen or not launch.is_capturing()):
        return fastest.run(kind, _engines(a.device), arguments, a.device)
    return (fused_product if fusing_pays(launch.capability(a.device), k) else cublaslt_product)(*arguments)


def _engines(device: torch.device) -> dict[str, Engine]:
    """Those to measure on sm_90."""
    wgmma = int8_wgmma.engines() if int8_wgmma.is_right(device, fused_product) else {}
    return {"mma.sync": fused_product, "cuBLASLt": cublaslt_product, **wgmma}


fastest = Fastest()
"""What was measured for each kind of product."""


def engines(device: torch.device) -> dict[str, str]:
    """See ``dispatch.engine``."""
    if not int8_wgmma.exists(device):
        capability = launch.capability(device)
        short, long = (fusing_pays(capability, k) for k in (1, 1 << 20))
        fused = f"mma.sync, cuBLASLt for sums over more than {_SHORT_SUM}" if short != long else "mma.sync"
        return {"int8_matmul": fused if short else "cuBLASLt"}
    chosen: dict[Any, str] = fastest.chosen
    sizes = {name: f"{m} x {n} x {k}" for (at, m, n, k, *_), name in chosen.items() if at == device}
    measured = ", ".join(f"{name} (for {size})" for name, size in sizes.items())
    return {"int8_matmul": measured or "the fastest of mma.sync, cuBLASLt and wgmma, to be measured for each size"}


def fusing_pays(capability: tuple[int, int], k: int) -> bool:
    """Whether ``fused_product`` should be faster than ``cublaslt_product`` on a GPU, for sums over ``k``.

    By arithmetic, not by measurement. Eight bytes for each sum at 3.3 TB/s (H100) are 2.4 ps; the sum itself is 2 k
    operations, at 1.4 PTOP/s by cuBLASLt and about 1.0 PTOP/s by ``mma.sync``: even at k = 4200. Half of that is
    asked. Where ``mma.sync`` is the fastest, saving the bytes pays at any k. On sm_75, without asynchronous copies, it
    does not.
    """
    major, _ = capability
    return major in (8, 12) or (major == 9 and k <= _SHORT_SUM)


def _macros(out_dtype: torch.dtype, bias: Tensor | None) -> dict[str, torch.dtype]:
    return {"ELEMENT": out_dtype, "BIAS": torch.float32 if bias is None else bias.dtype}


# -- our own ---------------------------------------------------------------------------------------------------------


def fused_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``int8_matmul`` in one launch. Where K is no multiple of 16, A and B are copied first."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    tile_n = 256 if ceil_div(m, _TILE_M) * ceil_div(n, 256) >= _WIDE_TILES else 128
    text = specialised("int8_product.cu", **_macros(out_dtype, bias), TILE_N=tile_n, STAGES=_STAGES)
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(k + -k % 16)
    arguments = launch.in_chunks(a), launch.in_chunks(b), *sizes, a_scales, b_scales, bias, out
    grid = ceil_div(m, _TILE_M) * ceil_div(n, tile_n), 1, 1
    shared = _STAGES * (_TILE_M + tile_n) * _TILE_K
    launch.run(Launch(text, "int8_product", grid, tile_n, arguments, shared=shared))
    return out


# -- cuBLASLt's ------------------------------------------------------------------------------------------------------


def cublaslt_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``int8_matmul`` by ``torch._int_mm`` and a kernel that scales."""
    m, n = a.shape[0], b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not m or not n:
        return out
    sums = _int_mm(a, b)
    text = specialised("int8_scale_sums.cu", **_macros(out_dtype, bias))
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(sums.shape[1])
    grid = ceil_div(n, 1024), min(m, 4096), 1
    launch.run(Launch(text, "scale_sums", grid, 256, (sums, *sizes, a_scales, b_scales, bias, out)))
    return out


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32, at least [M, N]: cuBLASLt wants more than 16 rows, and K and N in multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    more_k = -k % 8 if k else 8
    if more_k or m <= 16:
        a = pad(a, (0, more_k, 0, max(0, 17 - m)))
    if more_k or n % 8:
        b = pad(b, (0, more_k, 0, -n % 8))
    return torch._int_mm(a, b.t())
