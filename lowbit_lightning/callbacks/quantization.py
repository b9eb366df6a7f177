"""The error of quantising, as torchmetrics metrics: ``QuantizationError`` of int8 products, ``StateCodes`` of
optimizers.

The signal-to-noise ratio
-------------------------
An operand X of a product is rounded to Q = scale * q; its noise is X - Q. The usual ratio, ||X||^2 / ||X - Q||^2 of
the whole matrix, does not show the case that matters: an outlier feature makes all others coarse, and the energy of the
outlier itself hides this. With one feature 100 times larger than the other 255 the usual ratio is 29 dB, while those
255 have only 13 dB. So the ratio is computed for each feature, with its energies summed over the tokens (over the other
features of a weight). The result is the median over the features:

    snr = median over features f of 10 log10(sum_t X[t, f]^2 / sum_t (X - Q)[t, f]^2)          in dB

Features that are all zero are left out, and 100 dB is the most that is reported. The noises of a product's two
operands add up, each relative to its own signal: 10^(-snr/10) = 10^(-snr_a/10) + 10^(-snr_b/10). For independent
operands that is the error of the product itself.

Normally distributed data in rows of 1024 has about 42 dB for an operand and 39 dB for a product; an outlier of a
times the typical magnitude leaves 10 log10(12 * 127^2 / a^2): 13 dB for a = 100.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import dynamic_map

PRODUCTS = ("forward", "grad_input", "grad_weight")
SHARES = ("saturation", "underflow", "nonfinite")
HIGHEST_SNR = 100.0
INT32_MAX = 2**31 - 1
CHUNK = {"cpu": 2**18, "cuda": 2**22}  # elements that are held in float32 at a time: in cache, or few launches


class Slot(NamedTuple):
    """One operand: the layer's index, the product's index in ``PRODUCTS``, 0 or 1 for its left or right operand."""

    layer: int
    product: int
    side: int


def measure(x: Tensor, q: Tensor, scales: Tensor, features: str, rotated: bool = False) -> Tensor:
    """float32 ``[5]``: snr in dB, saturation, underflow, nonfinite, overflow of ``x [R, C]`` and its int8 form.

    ``q [R, C]``, ``scales [R]``: what a quantiser made of x. ``features``: whether x's "columns" or "rows" are them.
    ``rotated``: the quantiser got x rotated along its rows. The error is that of x all the same, since the rotation is
    its own inverse: noise is spread over a block, where x's features are as different as they were.

    saturation: share of codes at +-127 (at least one in a row has to be). underflow: share of non-zero values that
    became zero. nonfinite: share of rows with a value that isn't finite; the other numbers leave them out. overflow:
    the largest sum that these codes can give in a product, as a share of what int32 holds. NaN: nothing to measure.
    """
    good = scales.isfinite()
    unit = 1 / scales.nan_to_num().amax().clamp_min(torch.finfo(torch.float32).tiny)  # keeps the squares in range
    scaled = scales.nan_to_num() * unit
    over = 0 if features == "columns" else 1
    signal, noise, counts = [], [], []
    rows = max(1, CHUNK.get(q.device.type, 2**22) // q.shape[1])
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        values = torch.where(good[part, None], x[part], 0).float()
        nonzero = (kernels.hadamard(values, 1) if rotated else values).count_nonzero()
        rounded = q[part].float().mul_(scaled[part, None])
        error = values.mul_(unit) - (kernels.hadamard(rounded, 1) if rotated else rounded)
        signal.append(values.square().sum(over))
        noise.append(error.square_().sum(over))
        magnitude = q[part].abs()
        longest = magnitude.sum(1, dtype=torch.int32).amax()
        counts.append(torch.stack([(magnitude == 127).sum(), nonzero, magnitude.count_nonzero(), longest]))
    if features == "columns":
        snr = _snr(torch.stack(signal).sum(0), torch.stack(noise).sum(0))
    else:
        snr = _snr(torch.cat(signal), torch.cat(noise))
    saturated, nonzero, kept, longest = torch.stack(counts).unbind(1)
    shares = [saturated.sum() / (good.sum() * q.shape[1]), 1 - kept.sum() / nonzero.sum(), 1 - good.float().mean()]
    return torch.stack([snr, *shares, longest.amax() * (127 / INT32_MAX)])


def _snr(signal: Tensor, noise: Tensor) -> Tensor:
    ratio = signal / torch.maximum(noise, signal * 10 ** (-HIGHEST_SNR / 10))
    return torch.where(signal > 0, 10 * ratio.log10(), torch.nan).nanmedian()


class QuantizationError(Metric):
    """The error of ``layers`` layers' int8 products: the mean over what ``update`` gets, on all ranks.

    ``compute`` returns float32 tensors ``[layers, 3]``, by ``PRODUCTS``: ``snr`` (dB), ``saturation``, ``underflow``,
    ``nonfinite`` (of the worse operand) and ``overflow`` (the largest seen; at most 1 means that no sum can leave
    int32). ``operands``: the snr of both operands, ``[layers, 3, 2]``. NaN where nothing was measured.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    overflow: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        shape = (layers, len(PRODUCTS), 2)
        self.add_state("total", torch.zeros(*shape, 1 + len(SHARES), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(*shape, 1 + len(SHARES), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("overflow", torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="max")

    def update(self, slots: list[Slot], values: Tensor) -> None:
        """``values [n, 5]``: what ``measure`` gave for these operands; an operand may come several times."""
        values = values.to(self.total.device)
        places = [(s.layer * len(PRODUCTS) + s.product) * 2 + s.side for s in slots]
        index = torch.tensor(places, dtype=torch.long, device=values.device)
        means, overflow = values[:, :-1], values[:, -1]
        self.total.view(-1, 1 + len(SHARES)).index_add_(0, index, means.nan_to_num())
        self.count.view(-1, 1 + len(SHARES)).index_add_(0, index, (~means.isnan()).float())
        self.overflow.view(-1).scatter_reduce_(0, index, overflow, "amax")

    def compute(self) -> dict[str, Tensor]:
        mean = self.total / self.count  # 0 / 0: not measured
        snr, shares = mean[..., 0], mean[..., 1:].amax(2)
        both = -10 * (10 ** (-snr / 10)).sum(-1).log10()
        named = {name: shares[..., i] for i, name in enumerate(SHARES)}
        return {"snr": both, **named, "overflow": self.overflow.amin(-1), "operands": snr}


class StateCodes(Metric):
    """How 8-bit optimizer states use their codes, for each name in ``states``: shares over all blocks and ranks.

    The values before rounding are no longer known, so there is no signal-to-noise ratio. ``compute`` returns float32
    ``[states, 3]``, by ``SHARES``: codes that are exactly zero; codes of the smallest magnitude above it; codes of the
    largest (1.0, which each block has at least once).
    """

    SHARES = ("zero", "smallest", "largest")
    full_state_update = False
    counts: Tensor
    total: Tensor

    def __init__(self, states: tuple[str, ...]) -> None:
        super().__init__()
        self.states = states
        self.add_state("counts", torch.zeros(len(states), 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(states), 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, state: str, codes: Tensor, codebook: str) -> None:
        """``codes``: uint8, of any shape; ``codebook``: the dynamic map that they are of."""
        book, index = dynamic_map(codebook), self.states.index(state)
        zero = book.zero_code
        smallest, largest = (codes == zero + 1).sum(), (codes == 255).sum()
        if book.signed:
            smallest, largest = smallest + (codes == zero - 1).sum(), largest + (codes == 0).sum()
        self.counts[index] += torch.stack([(codes == zero).sum(), smallest, largest]).to(self.counts.device)
        self.total[index] += codes.numel()

    def compute(self) -> Tensor:
        return self.counts / self.total
