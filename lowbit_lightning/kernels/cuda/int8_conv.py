"""The int8 products of a convolution on the GPU, composed of ``int8_matmul``: one for each tap, of the int8 rows that
it reads, gathered by torch. A product scales by the pixels alone, so that taps add up in the reference's order. Nothing
waits for the device: a tap outside the image reads the first row, and multiplies it by zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda.int8_product import int8_matmul
from lowbit_lightning.kernels.reference.int8_conv import PART, finished


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
    return _windows(a, b, a_scales, b_scales, _of_all(table, images, len(a) // images), bias, out_dtype)


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
    read = torch.where(table < 0, pixels, table).long()
    turned = torch.full((pixels + 1, table.shape[1]), -1, dtype=torch.int64, device=a.device)
    turned.scatter_(0, read, torch.arange(len(table), device=a.device).unsqueeze(1).expand_as(read))
    rows = _of_all(turned[:pixels], images, len(table))
    return _windows(a, b.permute(2, 1, 0), a_scales, b_scales, rows, None, out_dtype)


def _of_all(table: Tensor, images: int, rows: int) -> Tensor:
    """The table of all images, int64; ``rows``: of an image."""
    first = torch.arange(images, device=table.device).mul_(rows).view(-1, 1, 1)
    return torch.where(table < 0, -1, table + first).flatten(0, 1)


def _windows(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    total = torch.zeros(len(rows), len(b), dtype=torch.float32, device=a.device)
    ones = torch.ones(len(b), dtype=torch.float32, device=b.device)  # one more factor of 1 changes nothing
    for t, row in enumerate(rows.unbind(1)):
        read = row.clamp(min=0)
        scales = torch.where(row < 0, 0.0, a_scales[read])
        total += int8_matmul(a[read], b[:, t].contiguous(), scales, ones, None, torch.float32)
    return finished(total, b_scales, bias, out_dtype)


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
    for t, row in enumerate(_of_all(table, images, len(b) // images).unbind(1)):
        pixels = torch.where(row.unsqueeze(1) < 0, 0, b[row.clamp(min=0)]).T
        for start in range(0, a.shape[1], PART):
            parts = (x[:, start : start + PART].contiguous() for x in (a, pixels))
            total[:, t] += int8_matmul(*parts, a_scales, b_scales, None, torch.float32)
    return total.to(out_dtype)
