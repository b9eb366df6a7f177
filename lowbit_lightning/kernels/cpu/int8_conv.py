"""The int8 products of a convolution on CPU: src/int8_conv.cpp. Patches are never written; src/int8_conv.h says how."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import Scaled
from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.sources import DTYPE_NUMBERS, specialised

_MANY = 1 << 21  # products below which a second thread costs more than it saves
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIZES: list[Any] = [_LONG, _LONG, _POINTER, *[_LONG] * 4]  # sizes of a result's rows, and the table
_CONV: list[Any] = [*[_POINTER] * 5, *_SIZES, _INT, _POINTER, _INT, _INT]
_WEIGHT: list[Any] = [*[_POINTER] * 4, *_SIZES, _POINTER, _INT]


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled products; ``flags`` choose another instruction set, for tests."""
    compiled = host_library(specialised("int8_conv.cpp"), flags=flags)
    compiled.lb_int8_conv_instructions.restype = ctypes.c_char_p
    compiled.lb_int8_conv.restype, compiled.lb_int8_conv.argtypes = None, _CONV
    compiled.lb_int8_conv_weight.restype, compiled.lb_int8_conv_weight.argtypes = None, _WEIGHT
    return compiled


def int8_conv(a: Scaled, b: Scaled, table: Tensor, images: int, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    n, _, k = b[0].shape
    out = torch.empty(images * len(table), n, dtype=out_dtype, device="cpu")
    bias = None if bias is None else bias.float()
    operands = *_addresses(a, b), None if bias is None else bias.data_ptr()
    _run(operands, n, k, table, len(a[0]) // images, images, False, out)
    return out


def int8_conv_input(a: Scaled, b: Scaled, table: Tensor, images: int, pixels: int, out_dtype: torch.dtype) -> Tensor:
    k, _, n = b[0].shape
    out = torch.empty(images * pixels, n, dtype=out_dtype, device="cpu")
    _run((*_addresses(a, b), None), n, k, table, pixels, images, True, out)
    return out


def _addresses(a: Scaled, b: Scaled) -> list[int]:
    return [x.data_ptr() for x in (*a, *b)]


def _run(
    operands: tuple[int | None, ...], n: int, k: int, table: Tensor, pixels: int, images: int, turned: bool, out: Tensor
) -> None:
    results, taps = table.shape
    library().lb_int8_conv(
        *(*operands, n, k, table.data_ptr(), results, taps, pixels, images, turned, out.data_ptr()),
        *(DTYPE_NUMBERS[out.dtype], _threads(results * images * taps * n * k)),
    )


def int8_conv_weight(a: Scaled, b: Scaled, table: Tensor, images: int, out_dtype: torch.dtype) -> Tensor:
    (n, all_results), (rows, k), (results, taps) = a[0].shape, b[0].shape, table.shape
    total = torch.zeros(n, taps, k, dtype=torch.float32, device="cpu")
    library().lb_int8_conv_weight(
        *(*_addresses(a, b), n, k, table.data_ptr(), results, taps),
        *(rows // images, images, total.data_ptr(), _threads(all_results * taps * n * k)),
    )
    return total.to(out_dtype)


def _threads(products: int) -> int:
    return torch.get_num_threads() if products >= _MANY else 1
