"""The int8 products of a convolution on the GPU, composed of ``int8_matmul``: one for each tap, of the int8 rows that
it reads, gathered by torch. A product scales by the pixels alone, so that taps add up in the reference's order."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda.int8_product import int8_matmul
from lowbit_lightning.kernels.reference.int8_conv import PART, finished, taps_of


def int8_conv(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See the reference."""
    total = torch.zeros(images * len(table), b.shape[0], dtype=torch.float32, device=a.device)
    for t, (results, pixels) in taps_of(table, images, len(a) // images):
        total[results] += _scaled(a[pixels], b[:, t].contiguous(), a_scales[pixels])
    return finished(total, b_scales, bias, out_dtype)


def int8_conv_input(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    pixels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See the reference."""
    total = torch.zeros(images * pixels, b.shape[2], dtype=torch.float32, device=a.device)
    for t, (results, read) in taps_of(table, images, pixels):
        total[read] += _scaled(a[results], b[:, t].T.contiguous(), a_scales[results])
    return finished(total, b_scales, None, out_dtype)


def _scaled(a: Tensor, b: Tensor, a_scales: Tensor) -> Tensor:
    """The exact sums, times a's scales: one more factor of 1 changes nothing."""
    return int8_matmul(a, b, a_scales, torch.ones(len(b), device=b.device), None, torch.float32)


def int8_conv_weight(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See the reference."""
    total = torch.zeros(a.shape[0], table.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for t, (results, pixels) in taps_of(table, images, len(b) // images):
        for start in range(0, a.shape[1], PART):
            part = (results >= start) & (results < start + PART)
            operands = a[:, results[part]].contiguous(), b[pixels[part]].T.contiguous()
            total[:, t] += int8_matmul(*operands, a_scales, b_scales, None, torch.float32)
    return total.to(out_dtype)
