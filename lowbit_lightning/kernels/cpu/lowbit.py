"""Low-bit weights on CPU: src/lowbit.cpp, src/lowbit_quantize.cpp, compiled for the bits of a code.

A product of few rows of x reads the packed weight once, and decodes it in registers or for eight rows of x at a time
(src/lowbit_product.h). One of many rows decodes a panel of the weight at a time. With AVX-512 that is done in each
thread, which multiplies the panel by vectors (src/lowbit_gemm.h). Elsewhere, and for bfloat16 where the processor has
tiles (AMX), a panel is some rows of the weight, which stay in the caches for torch's own product (oneDNN, MKL). A panel
of the backward is some columns, in the order in which codes are decoded.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.cpu.int8 import quantize_rowwise
from lowbit_lightning.kernels.formats import Format, weight_format
from lowbit_lightning.kernels.reference.lowbit import split_outliers as split_outliers  # plain torch is as fast
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, specialised
from lowbit_lightning.kernels.structs import fit_rule

_MANY = 1 << 16  # elements of a weight below which a second thread costs more than it saves
_PANEL = 8 << 20  # bytes of a panel
_memory = threading.local()
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Form(ctypes.Structure):
    """``struct Form`` of src/lowbit.h."""

    _fields_ = [
        *((name, _LONG) for name in ("block", "blocks", "length", "packed_stride", "scales_stride")),
        *(("square", ctypes.c_int32), ("affine", ctypes.c_int32), ("factor", ctypes.c_float), ("unused", _INT)),
        *(("values", ctypes.c_float * 16), ("narrow", ctypes.c_uint16 * 32)),
    ]


@cache
def _form(name: str, length: int) -> tuple[Any, Any, Format]:
    """The compiled library of a format, the argument that describes it, and the format."""
    f = weight_format(name)
    factor = f.bfloat16_unit
    table = f.table() if f.bits < 8 else torch.zeros(16, dtype=torch.float32, device="cpu")
    values = table.repeat(16 // len(table))
    narrow = (values * factor).to(torch.bfloat16).view(torch.int16).repeat(2)
    form = _Form(
        *(f.block_length(length), f.blocks_per_row(length), length, f.packed_width(length)),
        *(f.scales_width(length) * f.scales_dtype.itemsize, f.scale_kind == "square", f.is_affine, factor, 0),
        *((ctypes.c_float * 16)(*values.tolist()), (ctypes.c_uint16 * 32)(*(n & 0xFFFF for n in narrow.tolist()))),
    )
    return library(f.bits), ctypes.byref(form), f


@cache
def quantize_library() -> ctypes.CDLL:
    """The compiled quantiser."""
    compiled = host_library(specialised("lowbit_quantize.cpp"))
    compiled.lb_lowbit_quantize.argtypes = [_POINTER, _POINTER, _INT, _LONG, _POINTER, _POINTER, _INT]
    compiled.lb_lowbit_quantize.restype = None
    return compiled


def lowbit_quantize(weight: Tensor, form: str, fit: str) -> tuple[Tensor, Tensor]:
    (*leading, length), rows = weight.shape, prod(weight.shape[:-1])
    if weight_format(form).kind == "int8":
        codes, scales = quantize_rowwise(weight.view(rows, length), None)
        return codes.view(torch.uint8).view(weight.shape), scales.view(*leading, 1)
    rule, f = fit_rule(form, length, fit), weight_format(form)
    packed = torch.empty(*leading, f.packed_width(length), dtype=torch.uint8, device="cpu")
    scales = torch.empty(*leading, f.scales_width(length), dtype=f.scales_dtype, device="cpu")
    if weight.numel():
        quantize_library().lb_lowbit_quantize(
            *(ctypes.byref(rule), weight.data_ptr(), DTYPE_NUMBERS[weight.dtype], rows),
            *(packed.data_ptr(), scales.data_ptr(), _threads(weight.numel())),
        )
    else:
        scales.zero_()
    return packed, scales


@cache
def library(bits: int) -> ctypes.CDLL:
    """The compiled kernels for codes of ``bits`` bits."""
    compiled = host_library(specialised("lowbit.cpp", BITS=bits))
    functions = {
        "lb_lowbit_dequantize": [_POINTER] * 4 + [_LONG, _POINTER, _INT, _INT],
        "lb_lowbit_panel": [_POINTER] * 3 + [_LONG, _LONG, _LONG, _POINTER, _INT, _INT],
        "lb_lowbit_gemv": [_POINTER] * 3 + [_LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT],
        "lb_lowbit_gemm": [_POINTER] * 3 + [_LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT],
    }
    for name, arguments in functions.items():
        getattr(compiled, name).restype, getattr(compiled, name).argtypes = None, arguments
    for name in ("lb_lowbit_phases", "lb_lowbit_lanes", "lb_lowbit_pairs"):
        getattr(compiled, name).restype, getattr(compiled, name).argtypes = _LONG, []
    compiled.lb_lowbit_multiplies.restype, compiled.lb_lowbit_multiplies.argtypes = _LONG, [_INT]
    return compiled


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= _MANY else 1


def lowbit_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    return _dequantize(packed, scales, None, packed.shape[:-1], form, row_length, dtype)


def lowbit_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    flat = indices.to(torch.int64)
    low, high = (int(flat.min()), int(flat.max())) if flat.numel() else (0, -1)
    if low < 0 or high >= packed.shape[0]:
        raise IndexError(f"index out of range: indices must be from 0 to {packed.shape[0] - 1}, got {low} to {high}")
    return _dequantize(packed, scales, flat, indices.shape, form, row_length, dtype)


def _dequantize(
    packed: Tensor, scales: Tensor, indices: Tensor | None, leading: Any, form: str, length: int, dtype: torch.dtype
) -> Tensor:
    return _decode(torch.empty(*leading, length, dtype=dtype, device="cpu"), packed, scales, indices, form)


def _decode(out: Tensor, packed: Tensor, scales: Tensor, indices: Tensor | None, form: str) -> Tensor:
    if out.numel():
        length = out.shape[-1]
        compiled, argument, _ = _form(form, length)
        rows = None if indices is None else indices.data_ptr()
        compiled.lb_lowbit_dequantize(
            *(argument, packed.data_ptr(), scales.data_ptr(), rows, out.numel() // length, out.data_ptr()),
            *(DTYPE_NUMBERS[out.dtype], _threads(out.numel())),
        )
    return out


def lowbit_gemv(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    (*leading, length), outputs = x.shape, packed.shape[0]
    compiled, argument, _ = _form(form, length)
    out = torch.empty((*leading, outputs), dtype=x.dtype, device="cpu")
    bias = None if bias is None else bias.float()
    compiled.lb_lowbit_gemv(
        *(argument, packed.data_ptr(), scales.data_ptr(), outputs, x.data_ptr(), prod(leading)),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), DTYPE_NUMBERS[x.dtype]),
        _threads(outputs * length),
    )
    return out


def lowbit_matmul(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    rows, length = x.shape
    dtype = _dtype(x.dtype, form, length)
    if _by_eight(rows, length, dtype):
        return lowbit_gemv(x, packed, scales, bias, form)
    multiply = _by_vectors if _form(form, length)[0].lb_lowbit_multiplies(DTYPE_NUMBERS[dtype]) else _by_panels
    return multiply(x.to(dtype), packed, scales, bias, form).to(x.dtype)


def _by_eight(rows: int, length: int, dtype: torch.dtype) -> bool:
    """Whether the kernel of few rows, eight of x at a time, is faster than panels (measured on Zen 4)."""
    return rows <= max(8, min(128 // dtype.itemsize, length // 64))


def _by_vectors(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """By a kernel of our own, for the dtypes that ``lb_lowbit_multiplies`` names."""
    (rows, length), outputs = x.shape, packed.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device="cpu")
    if x.dtype == torch.bfloat16 and length % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    if bias is not None:
        bias = bias.float()
    compiled, argument, _ = _form(form, length)
    compiled.lb_lowbit_gemm(
        *(argument, packed.data_ptr(), scales.data_ptr(), outputs, x.data_ptr(), x.shape[1], rows),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), DTYPE_NUMBERS[x.dtype]),
        _threads(outputs * length),
    )
    return out


def _by_panels(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """By torch's product with decoded panels."""
    (rows, length), outputs = x.shape, packed.shape[0]
    step = max(1, _PANEL // x.itemsize // length)
    out = torch.empty(rows, outputs, dtype=x.dtype, device="cpu") if outputs > step else None
    for first in range(0, outputs, step):
        part = slice(first, min(outputs, first + step))
        panel = _scratch((part.stop - first, length), x.dtype)
        y = torch.nn.functional.linear(x, _decode(panel, packed[part], scales[part], None, form))
        if bias is not None:
            y.add_(bias[part])
        if out is None:
            return y
        out[:, part] = y
    assert out is not None
    return out


def lowbit_matmul_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    """A panel is all rows of some chunks of columns, in the order ``[chunk][phase][lane]`` in which
    codes are decoded (src/lowbit.h); the result is brought out of it."""
    (rows, outputs), (compiled, argument, f) = dy.shape, _form(form, row_length)
    there = dy.to(_dtype(dy.dtype, form, row_length))
    lanes, phases = compiled.lb_lowbit_lanes(), compiled.lb_lowbit_phases()
    chunk, chunks = lanes * phases, -(-row_length // (lanes * phases))
    step = min(chunks, max(1, _PANEL // there.itemsize // outputs // chunk))
    dx = torch.empty(rows, chunks * chunk, dtype=there.dtype, device="cpu")
    for first in range(0, chunks, step):
        last = min(chunks, first + step)
        panel = _scratch((outputs, (last - first) * chunk), there.dtype)
        compiled.lb_lowbit_panel(
            *(argument, packed.data_ptr(), scales.data_ptr(), outputs, first, last, panel.data_ptr()),
            *(DTYPE_NUMBERS[panel.dtype], _threads(panel.numel())),
        )
        dx[:, first * chunk : last * chunk] = there @ panel  # into dx itself torch multiplies bfloat16 slowly
    if f.bits < 8:
        dx = dx.view(rows, chunks, phases, lanes).transpose(2, 3).reshape(rows, chunks * chunk)
    return dx[:, :row_length].to(dy.dtype).contiguous()


def _dtype(dtype: torch.dtype, form: str, length: int) -> torch.dtype:
    """In which torch multiplies: bfloat16 for operands that are that, if the processor multiplies pairs of them."""
    narrow = dtype == torch.bfloat16 and _form(form, length)[0].lb_lowbit_pairs()
    return torch.bfloat16 if narrow else torch.float32


def _scratch(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory that this thread keeps for panels: fresh memory would cost a page fault for every 4 KiB."""
    size = prod(shape) * dtype.itemsize
    memory: Tensor | None = getattr(_memory, "bytes", None)
    if memory is None or len(memory) < size:
        memory = _memory.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(dtype).view(shape)
