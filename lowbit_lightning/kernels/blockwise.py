"""Block-wise quantisation to 8-bit codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats
from lowbit_lightning.kernels.checks import check_dtype
from lowbit_lightning.kernels.dispatch import declare, run


def quantize_blockwise(
    x: Tensor, codebook: str | Tensor = "dynamic_signed", block_size: int = formats.DEFAULT_BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to 8-bit codes, block by block inside its rows (a row: everything after dimension 0).

    Args:
        x: float32, float16 or bfloat16, of any shape.
        codebook: a name that ``formats.codebook`` knows, or a sorted float32 vector of 2 to 256 values in [-1, 1]
            that ends at 1.
        block_size: a power of two from 32 to 4096.

    Returns:
        codes (uint8, x's shape) and scales (float32, ``[rows, ceil(row_length / block_size)]``; signed where the
        codebook has no -1).

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    check_dtype("x", x.dtype)
    formats.check_block_size(block_size)
    name, values = _codebook(codebook, x.device)
    return _quantize(x, name, values, block_size)


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    codebook: str | Tensor = "dynamic_signed",
    block_size: int = formats.DEFAULT_BLOCK_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The inverse of ``quantize_blockwise``: ``codebook[codes] * scales``, of the codes' shape, in ``dtype``.

    Raises:
        TypeError, ValueError: for an argument that is not allowed; the error names it.
    """
    formats.check_block_size(block_size)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    check_dtype("dtype", dtype)
    expected = formats.BlockGrid.of(codes.shape, block_size).scales_shape
    if scales.dtype != torch.float32 or tuple(scales.shape) != expected or scales.device != codes.device:
        raise ValueError(
            f"scales must be float32 of shape {expected} on {codes.device} for codes of shape {tuple(codes.shape)} in "
            f"blocks of {block_size}, got {scales.dtype} of shape {tuple(scales.shape)} on {scales.device}"
        )
    name, values = _codebook(codebook, codes.device)
    return _dequantize(codes, scales, name, values, block_size, dtype)


def _codebook(codebook: str | Tensor, device: torch.device) -> tuple[str, Tensor | None]:
    if isinstance(codebook, str):
        formats.check_name(codebook)
        return codebook, None
    formats.check_codebook(codebook)
    return "custom", codebook.to(device).contiguous()


@cache
def _named_values(name: str, device: torch.device) -> Tensor:
    return formats.codebook(name).to(device)


def _resolved(name: str, values: Tensor | None, device: torch.device) -> tuple[str, Tensor | None]:
    """The codebook in a backend's form: the name of a dynamic map, or "custom" with values."""
    if values is not None or name in formats.MAPS:
        return name, None if values is None else values.contiguous()
    return "custom", _named_values(name, device)


def _quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    return run("quantize_blockwise", x.device, x.contiguous(), *_resolved(codebook, values, x.device), block_size)


def _quantize_blockwise_fake(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(formats.BlockGrid.of(x.shape, block_size).scales_shape, dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), scales


def _dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    book = _resolved(codebook, values, codes.device)
    return run("dequantize_blockwise", codes.device, codes.contiguous(), scales.contiguous(), *book, block_size, dtype)


_quantize = declare(
    "quantize_blockwise(Tensor x, str codebook, Tensor? values, int block_size) -> (Tensor, Tensor)",
    fake=_quantize_blockwise_fake,
    implementation=_quantize_blockwise,
)
_dequantize = declare(
    "dequantize_blockwise(Tensor codes, Tensor scales, str codebook, Tensor? values, int block_size, ScalarType dtype)"
    " -> Tensor",
    fake=lambda codes, *_: torch.empty(codes.shape, dtype=_[-1], device=codes.device),
    implementation=_dequantize_blockwise,
)
