"""Int8 matrices with a scale for each row or column, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.reference.words import dither

TINY_ROW = 2.0**-120
"""A row whose largest magnitude is below this counts as zero in the int8 ops."""


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` of a float matrix ``[R, C]``.

    ``q = round(y)`` with ``y = x * (127 / absmax)``, and ``scale = absmax / 127``. Values round to nearest, ties to
    even. With a seed they are dithered, which leaves no bias: ``q = round(y + d)`` with the element's ``dither`` d.
    The extreme of a row becomes 127 or -127 either way.

    A row with absmax below 2**-120 counts as zero (q = 0, scale = 0). A row with a non-finite value has q = 0 and scale
    NaN, so every result that uses it is NaN. q is never -128. Rows without elements have scale 0.
    """
    return _quantize_rows(x, _dither(x, seed))


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """``quantize_rowwise`` of ``x.T``, with the dithers of x: int8 ``[C, R]``, contiguous, and scales ``[C]``, of
    a float matrix ``[R, C]``."""
    d = _dither(x, seed)
    return _quantize_rows(x.T.contiguous(), None if d is None else d.T)


def quantize_both(x: Tensor, seed: int | None, nearest_rows: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``quantize_rowwise`` and ``quantize_colwise`` return, in this order. ``nearest_rows``: the seed is for the
    columns alone."""
    return *quantize_rowwise(x, None if nearest_rows else seed), *quantize_colwise(x, seed)


def quantize_channels(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """``quantize_colwise``, not transposed: int8 ``[R, C]`` and scales ``[C]``."""
    q, scales = quantize_colwise(x, seed)
    return q.T.contiguous(), scales


def quantize_image(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``quantize_rowwise`` and ``quantize_channels`` return, in this order."""
    return *quantize_rowwise(x, seed), *quantize_channels(x, seed)


SEGMENT = 64


def hadamard(x: Tensor, dim: int) -> Tensor:
    """x ``[R, C]`` times a block-diagonal matrix, from the right for ``dim=1`` (along the rows), from the left for 0.

    A dimension is cut into segments of 64 elements; what is left over is cut into blocks of powers of two, the largest
    first. A block of n elements is multiplied by ``D H D / sqrt(n)``: elements by their sign and by 1 / sqrt(n) in
    float32; then butterflies ``a + b``, ``a - b`` of elements that lie h = 1, 2, 4, ... n / 2 apart, in this order;
    then by their sign. The sign of position i of a segment, with bits i0 to i5, is ``(-1)**(i0 i1 + i2 i3 + i4 i5)``: a
    bent function, whose own transform is flat, so that neither an outlier nor a constant stands out afterwards.

    The matrix is orthogonal and symmetric, hence its own inverse.
    """
    if dim == 0:
        return hadamard(x.T.contiguous(), 1).T.contiguous()
    y, first = x.float(), 0
    parts = []
    for size in (SEGMENT >> k for k in range(SEGMENT.bit_length())):
        length = (x.shape[1] - first) // size * size
        parts.append(_rotated_blocks(y[:, first : first + length].unflatten(1, (-1, size)), first % SEGMENT).flatten(1))
        first += length
    return torch.cat(parts, 1).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


def _rotated_blocks(x: Tensor, first: int) -> Tensor:
    """Rotate blocks ``[R, n, size]``, each of which begins at position ``first`` of a segment."""
    size = x.shape[2]
    place = first + torch.arange(size, device=x.device)
    pairs = place & place >> 1
    signs = 1.0 - 2.0 * ((pairs ^ pairs >> 2 ^ pairs >> 4) & 1).float()
    y, h = x * (signs * size**-0.5), 1
    while h < size:
        a, b = y.unflatten(2, (-1, 2, h)).unbind(3)
        y, h = torch.stack([a + b, a - b], 3).flatten(2), 2 * h
    return y * signs


def _dither(x: Tensor, seed: int | None) -> Tensor | None:
    return None if seed is None else dither(seed, x.shape[0], x.shape[1], x.device)


def _quantize_rows(x: Tensor, d: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float()
    absmax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    limit = torch.full_like(absmax, 127.0)  # a scalar would be multiplied by a reciprocal: two roundings
    inverse = torch.where(finite & (absmax >= TINY_ROW), limit / absmax, 0.0)
    y = torch.where(finite.unsqueeze(1), x * inverse.unsqueeze(1), 0.0)
    q = (y if d is None else y + d).round()
    scales = torch.where(absmax < TINY_ROW, 0.0, absmax / limit)
    return q.clamp(-127, 127).to(torch.int8), torch.where(finite, scales, torch.nan)
