"""The int8 products of a convolution, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import PART


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
    """The forward: ``[images * M, N]`` of pixels a ``[images * R, K]`` and a weight b ``[N, T, K]``.

    Tap by tap, the exact sum over K is converted to float32, multiplied by the scale of the tap's pixel, and added in
    float32, from tap 0 on; a tap outside the image adds nothing. Then the total is multiplied by b's scale, and the
    bias added.
    """
    total = torch.zeros(images * len(table), b.shape[0], device=a.device)
    for t, (results, pixels) in _taps(table, images, len(a) // images):
        total[results] += _sums(a[pixels], b[:, t]) * a_scales[pixels, None]
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
    """The gradient by the input: ``[images * R, N]`` of a gradient a ``[images * M, K]`` and a weight b ``[K, T, N]``.

    The same arithmetic: tap by tap, a pixel adds the result that reads it, if there is one.
    """
    total = torch.zeros(images * pixels, b.shape[2], device=a.device)
    for t, (results, read) in _taps(table, images, pixels):
        total[read] += _sums(a[results], b[:, t].T) * a_scales[results, None]
    return finished(total, b_scales, None, out_dtype)


def int8_conv_weight(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    table: Tensor,
    images: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The gradient by the weight: ``[N, T, K]`` of a transposed gradient a ``[N, images * M]`` and pixels b
    ``[images * R, K]``.

    The sums over ``PART`` results at a time are exact, times the smaller scale, times the larger one, and added in
    float32.
    """
    total = torch.zeros(a.shape[0], table.shape[1], b.shape[1], device=a.device)
    of_a, of_b = torch.broadcast_tensors(a_scales.unsqueeze(1), b_scales)
    low, high = torch.where(of_a < of_b, of_a, of_b), torch.where(of_b > of_a, of_b, of_a)
    for t, (results, pixels) in _taps(table, images, len(b) // images):
        for start in range(0, a.shape[1], PART):
            part = (results >= start) & (results < start + PART)
            total[:, t] += _sums(a[:, results[part]], b[pixels[part]].T) * low * high
    return total.to(out_dtype)


def _taps(table: Tensor, images: int, pixels: int) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """For each tap: results and, pairwise, the pixels that it reads for them, of all images."""
    pairs = []
    for t in range(table.shape[1]):
        results = (table[:, t] >= 0).nonzero().squeeze(1)
        image = torch.arange(images, device=table.device).unsqueeze(1)
        of_all = (image * len(table) + results).flatten(), (image * pixels + table[results, t]).flatten()
        pairs.append((t, of_all))
    return pairs


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.T``, rounded to float32; -0.0, of products of zero, becomes 0.0."""
    return (a.double() @ b.double().T).float() + 0.0


def finished(total: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = total * scales
    return (total if bias is None else total + bias.float()).to(dtype)
