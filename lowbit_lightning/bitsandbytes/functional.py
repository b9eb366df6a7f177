"""``bitsandbytes.functional``: quantise and decode tensors. The kernels are this package's own, and so is the grid of
their blocks: inside rows. bitsandbytes' blocks are flat, so a tensor is handed to them as rows of whole blocks."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.bitsandbytes.maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from lowbit_lightning.bitsandbytes.quant_state import QuantState, form_of
from lowbit_lightning.bitsandbytes.refused import refusing
from lowbit_lightning.convert.bitsandbytes import NESTED_BLOCK, decoded_scales
from lowbit_lightning.kernels.arguments import FLOATS
from lowbit_lightning.kernels.formats import MAPS, Format, codebook

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

# -- 8-bit codes in blocks -------------------------------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes, uint8 of A's shape, in flat blocks, and their state.

    Args:
        A: float32, float16 or bfloat16, of any shape.
        code: the table, ascending from -1 or more to 1 (values may stand several times); None: the signed dynamic map.
        absmax, out: tensors to write the scales and codes into.
        blocksize: a power of two from 32 to 4096.
        nested: quantise the scales too.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if A.dtype not in FLOATS:
        raise ValueError(f"A must be float32, float16 or bfloat16, got {A.dtype}")
    table = codebook("dynamic_signed") if code is None else code.float().cpu()
    values = table.unique()
    codes, scales = kernels.quantize_blockwise(A.reshape(-1), _book(values), blocksize)
    if len(values) < len(table):  # the first of equal ones
        codes = _translated(codes, torch.searchsorted(table, values))
    scales = scales.flatten()
    state = QuantState(scales, code=table.to(A.device), blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = codes.reshape(A.shape)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The inverse of ``quantize_blockwise``, in the dtype of the state (float32 without one). ``absmax``, ``code``,
    ``blocksize`` and ``nested`` count only without a state.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax")
        table = codebook("dynamic_signed") if code is None else code
        quant_state = QuantState(absmax, code=table, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    table = quant_state.code.float().cpu()
    values, codes = table.unique(), A.reshape(-1)
    if len(values) < len(table):
        codes = _translated(codes, torch.searchsorted(values, table))
    scales = _scales(quant_state).reshape(1, -1)
    found = kernels.dequantize_blockwise(codes, scales, _book(values), quant_state.blocksize, quant_state.dtype)
    found = found.reshape(A.shape)
    return found if out is None else out.copy_(found)


def _translated(codes: Tensor, to: Tensor) -> Tensor:
    return to.to(codes.device, torch.uint8)[codes.int()]


def _book(values: Tensor) -> str | Tensor:
    """The name of a dynamic map, for which kernels need no table, or the values."""
    for name in MAPS:
        if len(values) == 256 and torch.allclose(values, codebook(name), rtol=1e-5, atol=1e-10):
            return name
    return values


def _scales(state: QuantState) -> Tensor:
    """Float32, of quantised ones the decoded values."""
    nested = state.state2
    if nested is None:
        return state.absmax.float()
    return decoded_scales(state.absmax, nested.code, nested.absmax, nested.blocksize) + state.offset


# -- 4 bits ----------------------------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool | None = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Codes of 4 bits, two to a byte, ``[(numel + 1) // 2, 1]``, in flat blocks, and their state: bitsandbytes' to the
    bit.

    Args:
        A: float32, float16 or bfloat16, of any shape.
        absmax, out: tensors to write the scales and codes into.
        blocksize: a power of two from 32 to 4096; None: 64.
        compress_statistics: quantise the scales too, in blocks of 256 by the signed dynamic map.
        quant_type: "nf4" or "fp4".
        quant_storage: the dtype as which the bytes are stored.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    form = form_of(quant_type, blocksize)
    if A.dtype not in FLOATS:
        raise ValueError(f"A must be float32, float16 or bfloat16, got {A.dtype}")
    packed, scales = kernels.lowbit_quantize(A.reshape(-1, _row_length(A.numel(), form)), form)
    packed, scales = packed.reshape(-1, 1), scales.reshape(-1)
    if quant_storage != torch.uint8:
        packed = packed.flatten().view(quant_storage).unsqueeze(1)
    state = QuantState(scales, A.shape, form.table(A.device), form.block_size, quant_type, A.dtype)
    if compress_statistics:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed if out is None else out.copy_(packed), state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The inverse of ``quantize_4bit``. Without a state, ``absmax`` and ``out`` say the scales, shape and dtype. Codes
    that are handed over transposed (``[1, bytes]``) are decoded to the transpose.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or absmax and out")
        quant_state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    form = quant_state.format
    numel = torch.Size(quant_state.shape).numel()
    length = _row_length(numel, form)
    rows = numel // max(length, 1)
    packed = A.reshape(-1).view(torch.uint8).reshape(rows, form.packed_width(length))
    scales = _scales(quant_state).reshape(rows, form.scales_width(length))
    found = kernels.lowbit_dequantize(packed, scales, form, length, quant_state.dtype).reshape(quant_state.shape)
    if out is not None:
        return out.copy_(found)
    return found.T if A.ndim == 2 and A.shape[0] == 1 < A.shape[1] and found.ndim == 2 else found


def _quantizing(kind: str) -> Callable[..., tuple[Tensor, QuantState]]:
    def quantize(
        A: Tensor,
        absmax: Tensor | None = None,
        out: Tensor | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = False,
        quant_storage: torch.dtype = torch.uint8,
    ) -> tuple[Tensor, QuantState]:
        return quantize_4bit(A, absmax, out, blocksize, compress_statistics, kind, quant_storage)

    quantize.__name__, quantize.__doc__ = f"quantize_{kind}", f"``quantize_4bit`` to {kind}."
    return quantize


quantize_fp4, quantize_nf4 = _quantizing("fp4"), _quantizing("nf4")
dequantize_fp4 = functools.partial(dequantize_4bit, quant_type="fp4")
dequantize_nf4 = functools.partial(dequantize_4bit, quant_type="nf4")


def linear_4bit(A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """``A @ weight.T (+ bias)`` of a weight ``[N, K]`` in codes ``B``; the gradient of A is exact for the decoded one.

    Where rows are multiples of a block the packed weight is multiplied as it is; elsewhere it is decoded first.
    """
    form, (rows, length) = state.format, state.shape
    if length % form.block_size:
        weight = dequantize_4bit(B.reshape(-1, 1), state).to(A.dtype)
        return torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))
    packed = B.reshape(-1).view(torch.uint8).view(rows, length // 2)
    return kernels.lowbit_matmul(A, packed, _scales(state).view(rows, -1), bias, form)


def embedding_4bit(indices: Tensor, B: Tensor, state: QuantState) -> Tensor:
    """Rows of a table ``[rows, K]`` in codes ``B``, in the state's dtype."""
    form, (rows, length) = state.format, state.shape
    if length % form.block_size:
        return torch.nn.functional.embedding(indices, dequantize_4bit(B.reshape(-1, 1), state))
    packed = B.reshape(-1).view(torch.uint8).view(rows, length // 2)
    return kernels.lowbit_embedding(indices, packed, _scales(state).view(rows, -1), form, length, state.dtype)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A @ weight.T`` of any number of rows; the transposed flags count as little as in bitsandbytes."""
    if state is None:
        raise ValueError("gemv_4bit needs the state that quantize_4bit returned")
    found = linear_4bit(A, B, state)
    return found if out is None else out.copy_(found)


def _row_length(numel: int, form: Format) -> int:
    """Rows of one block where blocks divide the tensor; else it is one row, whose last block is short."""
    return numel if numel % form.block_size or not numel else form.block_size


# -- int8 ------------------------------------------------------------------------------------------------------------


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes of a matrix by rows, the rows' largest magnitudes (float32), and the columns with outliers.

    Args:
        A: float32, float16 or bfloat16 ``[..., K]``; nothing passes through float16.
        threshold: 0, or the magnitude from which an element is an outlier. Outliers count in no row's largest
            magnitude, and the codes of their columns are 0. The third result is then their indices, int64; else None.
    """
    rows = A.detach().reshape(-1, A.shape[-1])
    columns = None
    if threshold > 0:
        outliers = rows.abs() >= threshold
        columns = outliers.any(0).nonzero().flatten()
        rows = rows.masked_fill(outliers, 0)
    codes, _ = kernels.quantize_rowwise(rows)
    if columns is not None:
        codes[:, columns] = 0
    return codes.reshape(A.shape), rows.abs().amax(1).float(), columns


def int8_double_quant(
    A: Tensor,
    col_stats: None = None,
    row_stats: None = None,
    out_col: None = None,
    out_row: None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Codes by rows and by columns, both of A's shape, the largest magnitudes of rows and of columns, and the columns
    with outliers, as ``int8_vectorwise_quant`` has them.

    Raises:
        ValueError: for the four tensors to write into, which bitsandbytes refuses too.
    """
    if any(given is not None for given in (col_stats, row_stats, out_col, out_row)):
        raise ValueError("col_stats, row_stats, out_col and out_row must be None: results are new tensors")
    by_rows, row_max, columns = int8_vectorwise_quant(A, threshold)
    rows = A.detach().reshape(-1, A.shape[-1])
    if threshold > 0:
        rows = rows.masked_fill(rows.abs() >= threshold, 0)
    by_columns, _ = kernels.quantize_colwise(rows)
    return by_rows, by_columns.T.reshape(A.shape), row_max, rows.abs().amax(0).float(), columns


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """float32 ``A * stats / 127`` of codes ``[N, K]`` and the rows' largest magnitudes ``[N]``."""
    return A.float() * (stats.float() / 127).unsqueeze(-1)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """int32 ``A @ B.T`` of int8 ``[..., K]`` and ``[N, K]``, exact."""
    if dtype != torch.int32:
        raise ValueError(f"dtype must be torch.int32, got {dtype}; int8_mm_dequant makes floats of it")
    found = torch._int_mm(A.reshape(-1, A.shape[-1]), B.T).reshape(*A.shape[:-1], B.shape[0])
    return found if out is None else out.copy_(found)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """float16 ``A * row_stats * col_stats / 127**2 (+ bias)`` of an int32 product ``[M, N]``."""
    found = A.reshape(-1, A.shape[-1]) * (row_stats.reshape(-1, 1) / 127) * (col_stats.reshape(1, -1) / 127)
    found = (found if bias is None else found + bias).half().reshape(A.shape)
    return found if out is None else out.copy_(found)


# -- small things ----------------------------------------------------------------------------------------------------


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's first element."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def has_avx512bf16() -> bool:
    """False: no weight is ever packed anew for a processor, so none is saved in another form than it was loaded in."""
    return False


__getattr__ = refusing(
    __name__,
    {
        **dict.fromkeys(
            ("lib", "CUBLAS_Context", "GlobalPageManager", "elementwise_func", "fill", "is_on_gpu"),
            "it is the door to bitsandbytes' own C library; call the functions of this module instead",
        ),
        **dict.fromkeys(
            ("get_paged", "prefetch_tensor"), "optimizers page their states themselves: optim.PagedAdamW8bit(...)"
        ),
        **dict.fromkeys(
            ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"),
            "call the step() of an optimizer, or lowbit_lightning.kernels.optimizer_step",
        ),
        **dict.fromkeys(
            ("igemm", "batched_igemm", "check_matmul"), "bitsandbytes is about to remove it; use int8_linear_matmul"
        ),
        **dict.fromkeys(
            ("_convert_weight_packed_for_cpu", "_convert_weight_packed_for_cpu_inverse"),
            "weights stay in the form that they were quantised in; the kernels read that form",
        ),
    },
)
