"""Products with low-bit weights on the GPU, by five engines; ``few_rows``, ``forward`` and ``backward`` choose.

``tensor_row`` (src/lowbit_row.cu): one row of 16-bit x on tensor cores, which meet values of the format's table; scales
and offsets come last, in float32. ``tensor_gemv`` (src/lowbit_gemv.cu): the same for up to 32 rows. ``plain_gemv``
(src/lowbit_gemv_plain.cu): up to 8 rows of any dtype without tensor cores, in float32. All three read the packed weight
once.

``fused_product`` (src/lowbit_product.cu): many rows of 16-bit x on tensor cores; weights are decoded on their way into
shared memory. Forward and backward.

``decoded_product``: a panel of the weight at a time is dequantised to x's dtype and multiplied by cuBLAS. It serves
float32 x of more than 8 rows, which no tensor core multiplies without a loss, and more rows of 16-bit x than
``FUSED_ROWS`` has. ``kernels.calls()`` shows its panels as calls of ``lowbit_dequantize``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.cuda.lowbit_form import form_argument, text_of
from lowbit_lightning.kernels.formats import Format, weight_format

FUSED_ROWS = {7: 512, 8: 1024, 9: 512, 10: 256, 12: 1024}
"""Rows of x up to which ``fused_product`` should beat ``decoded_product``, by the GPU's major capability.

By arithmetic, not by measurement. Decoding costs 4.5 bytes a weight through memory: 1.3 ps on an H100 (3.35 TB/s). A
row costs 2 operations a weight, by cuBLAS (``wgmma``) at three quarters of the H100's peak, by ``mma.sync`` at about
half of it: even at 1900 rows; at 600 if the kernel reaches 40 %. An A100 or an RTX 4090 has no faster instruction than
``mma.sync``; on a B200 that has a quarter of the peak.
"""
_SHORT_ROWS = 32  # of x, up to which ``tensor_gemv`` serves
_TILE_N = _TILE_K = 128
_FILL = 256  # CUDA blocks that a GPU should have: an H100 has 132 multiprocessors
_ROW_TILE, _ROW_WARPS, _ROW_ZEROS = 32, 8, 256  # of src/lowbit_row.cu; bytes that are zero
_ROW_FILL = 128  # CUDA blocks that are enough for it: one has as many bytes on their way as a multiprocessor needs
_PLAIN_ROWS = 4  # of the weight, to a CUDA block
_STEP, _TILE_O, _PRODUCT_STAGES = 64, 128, 3
_PANEL = 1 << 26  # elements of a panel that is decoded: 128 MB in 16 bits


def few_rows(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of up to 8 rows."""
    if not has_tensor_cores(x):
        return plain_gemv(x, packed, scales, bias, form)
    return (tensor_row if len(x) == 1 else tensor_gemv)(x, packed, scales, bias, form)


def forward(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of more than 8 rows."""
    if not has_tensor_cores(x) or len(x) > FUSED_ROWS.get(launch.capability(x.device)[0], 512):
        return decoded_product(x, packed, scales, bias, form)
    if len(x) <= _SHORT_ROWS:
        return tensor_gemv(x, packed, scales, bias, form)
    return fused_product(x, packed, scales, bias, form, x.shape[1], transposed=False)


def backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    """``lowbit_matmul_backward``."""
    if not has_tensor_cores(dy) or len(dy) > FUSED_ROWS.get(launch.capability(dy.device)[0], 512):
        return decoded_product_backward(dy, packed, scales, form, row_length)
    return fused_product(dy, packed, scales, None, form, row_length, transposed=True)


def has_tensor_cores(x: Tensor) -> bool:
    """Whether x's dtype has matrix instructions on its device: float16 on all, bfloat16 from sm_80 on."""
    return x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and launch.capability(x.device) >= (8, 0))


# -- one row ---------------------------------------------------------------------------------------------------------


def tensor_row(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of one row of float16 or bfloat16 x."""
    k, n, f = x.shape[1], packed.shape[0], weight_format(form)
    text = text_of(
        *("lowbit_row.cu", form),
        **{"ELEMENT": x.dtype, "BIAS": torch.float32 if bias is None else bias.dtype},
        **{"PACKETS": _in_chunks(packed, f, k)},
    )
    turn = {8: 64, 4: 128, 3: 256, 2: 256}[f.bits]  # elements of a row that a warp takes at a time
    turns, tiles = ceil_div(k, turn), ceil_div(n, _ROW_TILE)
    longest = 16384 if launch.capability(x.device) >= (8, 0) else 8192  # of x in shared memory
    parts = max(1, ceil_div(k, longest), min(_ROW_FILL // tiles, turns // _ROW_WARPS))
    turns_of_part = ceil_div(turns, parts)
    parts = ceil_div(turns, turns_of_part)
    x = _padded(x)
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    work = torch.empty(parts, 1, n, dtype=torch.float32, device=x.device) if parts > 1 else None
    factor = f.bfloat16_unit if x.dtype == torch.bfloat16 else 1.0
    sizes = ctypes.c_int64(n), ctypes.c_int64(turns_of_part)
    weight = packed, scales, form_argument(form, k, factor)
    arguments = x, ctypes.c_int64(x.shape[1]), *weight, *sizes, bias, work, out
    shared = _table_bytes(f) + turns_of_part * turn * 2 + _ROW_ZEROS
    launch.run(Launch(text, "lowbit_row", (tiles, parts, 1), 32 * _ROW_WARPS, arguments, shared=shared))
    _sum_parts(text, work, bias, out)
    return out


# -- a few rows ------------------------------------------------------------------------------------------------------


def tensor_gemv(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of up to 32 rows of float16 or bfloat16 x."""
    (m, k), n, f = x.shape, packed.shape[0], weight_format(form)
    columns = next(c for c in (8, 16, 32) if c >= m)
    stages = 4 if launch.capability(x.device) >= (8, 0) else 2  # sm_75 has no asynchronous copies to wait for
    text = text_of(
        *("lowbit_gemv.cu", form),
        **{"ELEMENT": x.dtype, "BIAS": torch.float32 if bias is None else bias.dtype},
        **{"COLUMNS": columns, "PACKETS": _in_chunks(packed, f, k), "STAGES": stages},
    )
    steps = ceil_div(k, _TILE_K)
    parts = max(1, min(ceil_div(_FILL, ceil_div(n, _TILE_N)), steps // 2))
    steps_of_part = ceil_div(steps, parts)
    parts = ceil_div(steps, steps_of_part)
    x = _padded(x)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    work = torch.empty(parts, m, n, dtype=torch.float32, device=x.device) if parts > 1 else None
    factor = f.bfloat16_unit if x.dtype == torch.bfloat16 else 1.0
    sizes = ctypes.c_int64(m), ctypes.c_int64(n)
    arguments = (
        *(x, ctypes.c_int64(x.shape[1]), packed, scales, form_argument(form, k, factor)),
        *(*sizes, ctypes.c_int64(steps_of_part), bias, work, out),
    )
    threads = 128 if columns == 8 or not f.is_affine else 256  # a warp has two fragments of the weight, or one
    grid = ceil_div(n, _TILE_N), parts, 1
    shared = _table_bytes(f) + stages * _stage_bytes(f, columns)
    launch.run(Launch(text, "lowbit_gemv", grid, threads, arguments, shared=shared))
    _sum_parts(text, work, bias, out)
    return out


def _sum_parts(text: str, work: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    if work is not None:
        sizes = (ctypes.c_int64(n) for n in work.shape)
        launch.run(Launch(text, "sum_parts", (ceil_div(out.numel(), 256), 1, 1), 256, (work, *sizes, bias, out)))


def _table_bytes(f: Format) -> int:
    return 0 if f.bits == 8 or f.is_affine else 256 * 32 * 4  # the values of two codes, for each lane


def _stage_bytes(f: Format, columns: int) -> int:
    of_row = f.packed_width(_TILE_K)
    return _TILE_N * of_row + columns * _TILE_K * 2


def _in_chunks(packed: Tensor, f: Format, length: int) -> bool:
    """Whether rows, and both planes of 3-bit rows, begin at multiples of 16 bytes."""
    planes = (packed.shape[1], -(-length // 4)) if f.bits == 3 else packed.shape[1:]
    return packed.data_ptr() % 16 == 0 and not any(width % 16 for width in planes)


def _padded(x: Tensor) -> Tensor:
    """The same values in rows that start at multiples of 16 bytes, padded with zeros."""
    if x.shape[1] % 8:
        return pad(x, (0, -x.shape[1] % 8))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def plain_gemv(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of up to 8 rows of x."""
    (m, k), n = x.shape, packed.shape[0]
    columns = next(c for c in (1, 2, 4, 8) if c >= m)
    dtypes = {"ELEMENT": x.dtype, "BIAS": torch.float32 if bias is None else bias.dtype}
    text = text_of("lowbit_gemv_plain.cu", form, **dtypes, COLUMNS=columns)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    arguments = x, packed, scales, form_argument(form, k), ctypes.c_int64(m), ctypes.c_int64(n), bias, out
    launch.run(Launch(text, "lowbit_gemv_plain", (ceil_div(n, _PLAIN_ROWS), 1, 1), 256, arguments))
    return out


# -- many rows -------------------------------------------------------------------------------------------------------


def fused_product(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str, row_length: int, *, transposed: bool
) -> Tensor:
    """``x @ weight.T (+ bias)``, or ``x @ weight`` if transposed, of float16 or bfloat16 x."""
    (m, length), rows = x.shape, packed.shape[0]
    outputs = row_length if transposed else rows
    tile_m = 128 if m > 64 and launch.capability(x.device) >= (8, 0) else 64  # sm_75 has 64 KiB of shared memory
    text = text_of(
        *("lowbit_product.cu", form),
        **{"ELEMENT": x.dtype, "BIAS": torch.float32 if bias is None else bias.dtype},
        **{"TRANSPOSED": transposed, "TILE_M": tile_m, "STAGES": _PRODUCT_STAGES},
    )
    tiles = ceil_div(m, tile_m) * ceil_div(outputs, _TILE_O)
    steps = ceil_div(length, _STEP)
    parts = max(1, min(_FILL // tiles, steps // 8))
    steps_of_part = ceil_div(steps, parts)
    parts = ceil_div(steps, steps_of_part)
    x = _padded(x)
    out = torch.empty(m, outputs, dtype=x.dtype, device=x.device)
    work = torch.empty(parts, m, outputs, dtype=torch.float32, device=x.device) if parts > 1 else None
    sizes = (ctypes.c_int64(n) for n in (m, rows, steps_of_part))
    weight = packed, scales, form_argument(form, row_length)
    arguments = x, ctypes.c_int64(x.shape[1]), *weight, *sizes, bias, work, out
    shared = 2 * _STEP * _TILE_O * 2 + _PRODUCT_STAGES * tile_m * _STEP * 2
    launch.run(Launch(text, "lowbit_product", (tiles, parts, 1), 256, arguments, shared=shared))
    _sum_parts(text, work, bias, out)
    return out


def _panels(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Iterator[Any]:
    """Some rows of the weight, as a slice, and decoded."""
    step = max(1, _PANEL // row_length)
    for first in range(0, packed.shape[0], step):
        part = slice(first, first + step)
        decode = torch.ops.lowbit_lightning.lowbit_dequantize  # through torch's registry, so that it is counted
        yield part, decode(packed[part], scales[part], form, row_length, dtype)


def _decoded_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if has_tensor_cores(x) else torch.float32


def decoded_product(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of any number of rows."""
    there = x.to(_decoded_dtype(x))
    y = torch.empty(len(x), packed.shape[0], dtype=there.dtype, device=x.device)
    for part, weight in _panels(packed, scales, form, x.shape[1], there.dtype):
        torch.mm(there, weight.t(), out=y[:, part])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def decoded_product_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    """``lowbit_matmul_backward`` of any number of rows."""
    there = dy.to(_decoded_dtype(dy))
    parts = (there[:, part] @ weight for part, weight in _panels(packed, scales, form, row_length, there.dtype))
    dx = next(parts)
    for part in parts:
        dx = dx.float() + part
    return dx.to(dy.dtype)
