"""The int8 products of a convolution, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import PART, Scaled


def int8_conv(a: Scaled, b: Scaled, table: Tensor, images: int, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The forward: ``[images * M, N]`` of pixels a ``[images * R, K]`` and a weight b ``[N, T, K]``.

    Tap by tap, the exact sum over K is converted to float32, multiplied by the scale of the tap's pixel, and added in
    float32, from tap 0 on; a tap outside the image adds nothing. Then the total is multiplied by b's scale, and the
    bias added.
    """
    (x, x_scales), (w, w_scales) = a, b
    total = torch.zeros(images * len(table), w.shape[0], dtype=torch.float32, device=x.device)
    for t, (results, pixels) in _taps(table, images, len(x) // images):
        total[results] += _sums(x[pixels], w[:, t]) * x_scales[pixels, None]
    return finished(total, w_scales, bias, out_dtype)


def int8_conv_input(a: Scaled, b: Scaled, table: Tensor, images: int, pixels: int, out_dtype: torch.dtype) -> Tensor:
    """The gradient by the input: ``[images * R, N]`` of a gradient a ``[images * M, K]`` and a weight b ``[K, T, N]``.

    The same arithmetic: tap by tap, a pixel adds the result that reads it, if there is one.
    """
    (dy, dy_scales), (w, w_scales) = a, b
    total = torch.zeros(images * pixels, w.shape[2], dtype=torch.float32, device=dy.device)
    for t, (results, read) in _taps(table, images, pixels):
        total[read] += _sums(dy[results], w[:, t].T) * dy_scales[results, None]
    return finished(total, w_scales, None, out_dtype)


def int8_conv_weight(a: Scaled, b: Scaled, table: Tensor, images: int, out_dtype: torch.dtype) -> Tensor:
    """The gradient by the weight: ``[N, T, K]`` of a transposed gradient a ``[N, images * M]`` and pixels b
    ``[images * R, K]``.

    The sums over ``PART`` results at a time are exact, times the smaller scale, times the larger one, and added in
    float32.
    """
    (dy, dy_scales), (x, x_scales) = a, b
    total = torch.zeros(dy.shape[0], table.shape[1], x.shape[1], dtype=torch.float32, device=dy.device)
    of_dy, of_x = torch.broadcast_tensors(dy_scales.unsqueeze(1), x_scales)
    low, high = torch.where(of_dy < of_x, of_dy, of_x), torch.where(of_x > of_dy, of_x, of_dy)
    for t, (results, pixels) in _taps(table, images, len(x) // images):
        for start in range(0, dy.shape[1], PART):
            part = (results >= start) & (results < start + PART)
            total[:, t] += _sums(dy[:, results[part]], x[pixels[part]].T) * low * high
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
