"""Random words and dithers, equal on every backend, and what is rounded by them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_words(seed: int, ordinal: int, step: int, offset: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements ``offset`` to ``offset + count - 1``: int64 in [0, 65535].

    Philox4x32-10 (Salmon et al., 2011) with key (seed's low and high word) and counter (low and high word of index
    // 8, step, ordinal); element ``index`` takes half ``index % 2`` of word ``index // 2 % 4``. Equal on every
    backend and world size.
    """
    index = torch.arange(offset, offset + count, dtype=torch.int64, device=device)
    group, mask = index >> 3, 0xFFFFFFFF
    counter = [group & mask, group >> 32, torch.full_like(index, step & mask), torch.full_like(index, ordinal & mask)]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # wraps in 64 bits: the low and high words are right
        high_a, high_b = (a >> 32) & mask, (b >> 32) & mask
        counter = [high_b ^ counter[1] ^ key[0], b & mask, high_a ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    words = torch.stack(counter, -1).gather(-1, ((index >> 1) & 3).unsqueeze(-1)).squeeze(-1)
    return (words >> (16 * (index & 1))) & 0xFFFF


def dither(seed: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """What is added to a matrix before it is rounded to nearest, so that this has no bias: float32 ``[rows, columns]``,
    multiples of 2**-16 between -1/2 and 1/2.

    An additive recurrence by the plastic number in two dimensions (Roberts, 2018: the sequence R2): the highest 15 bits
    of ``seed * 0x9E3779B1 + row * 0xC13FA9A9 + column * 0x91E10DA5`` in 32 bits. Along rows, along columns and over
    seeds these are spread more evenly than random numbers, so that errors cancel sooner in a sum; and they cost two
    additions.
    """
    row = torch.arange(rows, dtype=torch.int64, device=device).unsqueeze(1) * 0xC13FA9A9
    column = torch.arange(columns, dtype=torch.int64, device=device) * 0x91E10DA5
    start = (seed & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF
    words = ((start + row + column) & 0xFFFFFFFF) >> 17
    return (words.float() + 0.5) / 2**15 - 0.5


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """float32 to bfloat16: up with the probability of the remainder. Non-finite values are rounded to nearest."""
    bits = ((x.view(torch.int32).long() + words) >> 16).to(torch.int16)
    return torch.where(x.isfinite(), bits.view(torch.bfloat16), x.to(torch.bfloat16))
