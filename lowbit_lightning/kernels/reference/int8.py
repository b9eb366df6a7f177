"""Int8 matrices with a scale for each row or column, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.reference.words import random_words

TINY_ROW = 2.0**-120
"""A row whose largest magnitude is below this counts as zero in the int8 ops."""


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` of a float matrix ``[R, C]``.

    ``q = round(y)`` with ``y = x * (127 / absmax)``, and ``scale = absmax / 127``. Without a seed, values round to
    nearest, ties to even. With a seed they round at random and without bias: ``|q| = floor(|y| + u)`` with
    ``u = (word + 1/2) / 2**16``, where ``word`` is the element's random word (parameter 0, step 0, the element's index
    in x). The extreme of a row becomes 127 or -127 either way.

    A row with absmax below 2**-120 counts as zero (q = 0, scale = 0). A row with a non-finite value has q = 0 and scale
    NaN, so every result that uses it is NaN. q is never -128. Rows without elements have scale 0.
    """
    return _quantize_rows(x, _int8_words(x, seed))


def quantize_colwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """``quantize_rowwise`` of ``x.T``, with the random words of x: int8 ``[C, R]``, contiguous, and scales ``[C]``, of
    a float matrix ``[R, C]``."""
    words = _int8_words(x, seed)
    return _quantize_rows(x.T.contiguous(), None if words is None else words.T)


def quantize_both(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``quantize_rowwise`` and ``quantize_colwise`` return, in this order."""
    return *quantize_rowwise(x, seed), *quantize_colwise(x, seed)


def quantize_channels(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """``quantize_colwise``, not transposed: int8 ``[R, C]`` and scales ``[C]``."""
    q, scales = quantize_colwise(x, seed)
    return q.T.contiguous(), scales


def quantize_image(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``quantize_rowwise`` and ``quantize_channels`` return, in this order."""
    return *quantize_rowwise(x, seed), *quantize_channels(x, seed)


def _int8_words(x: Tensor, seed: int | None) -> Tensor | None:
    return None if seed is None else random_words(seed, 0, 0, 0, x.numel(), x.device).view(x.shape)


def _quantize_rows(x: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float()
    absmax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    limit = torch.full_like(absmax, 127.0)  # a scalar would be multiplied by a reciprocal: two roundings
    inverse = torch.where(finite & (absmax >= TINY_ROW), limit / absmax, 0.0)
    y = torch.where(finite.unsqueeze(1), x * inverse.unsqueeze(1), 0.0)
    q = y.round() if words is None else torch.copysign((y.abs() + (words.float() + 0.5) / 65536).floor(), y)
    scales = torch.where(absmax < TINY_ROW, 0.0, absmax / limit)
    return q.clamp(-127, 127).to(torch.int8), torch.where(finite, scales, torch.nan)
