"""Low-bit weights on the GPU: src/lowbit_decode.cu."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache, wraps
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div
from lowbit_lightning.kernels.cuda.lowbit_form import form_argument, text_of
from lowbit_lightning.kernels.reference import lowbit


@cache
def _warn() -> None:
    warnings.warn(
        "low-bit weights on a GPU are quantised and multiplied by plain torch: the numbers are right, the speed is "
        "below that of a high-precision layer, and a product decodes its whole weight",
        stacklevel=2,
    )


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def warned(*arguments: Any) -> Any:
        _warn()
        return function(*arguments)

    return warned


lowbit_gemv = _plain(lowbit.lowbit_gemv)
lowbit_matmul = _plain(lowbit.lowbit_matmul)
lowbit_matmul_backward = _plain(lowbit.lowbit_matmul_backward)
lowbit_quantize = _plain(lowbit.lowbit_quantize)


def lowbit_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    """See the reference."""
    return _decode(packed, scales, None, packed.shape[:-1], form, row_length, dtype)


def lowbit_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    """See the reference. An index out of range stops the kernel, as it does torch's."""
    return _decode(packed, scales, indices, indices.shape, form, row_length, dtype)


def _decode(
    packed: Tensor, scales: Tensor, indices: Tensor | None, leading: Any, form: str, length: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(*leading, length, dtype=dtype, device=packed.device)
    if out.numel():
        count, index_bytes = prod(leading), 0 if indices is None else indices.element_size()
        rows = ctypes.c_int64(prod(packed.shape[:-1]))
        which = indices, ctypes.c_int32(index_bytes), ctypes.c_int64(count)
        arguments = packed, scales, rows, *which, form_argument(form, length), out
        grid = ceil_div(count * ceil_div(length, 8), 256), 1, 1
        launch.run(Launch(text_of("lowbit_decode.cu", form, ELEMENT=dtype), "decode", grid, 256, arguments))
    return out
