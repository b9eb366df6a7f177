"""Block-wise quantisation, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.formats import SMALLEST_SCALE, BlockGrid


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of x's shape, and scales, float32 ``[rows, blocks_per_row]``, of a contiguous float tensor.

    ``codebook``: ``"dynamic_signed"``, ``"dynamic_unsigned"`` or ``"custom"``, whose sorted ``values`` end at 1.0.

    A block's scale is its value of largest magnitude: with its sign where the codebook has negative values but no -1
    (of two equal extremes the positive one counts), the largest positive value where the codebook has no negative
    ones, the magnitude otherwise; raised to 2**-126 unless zero. A value becomes the code nearest to ``x * (1 /
    scale)``, the lower one on a tie; zero becomes zero; under a codebook without negative values a positive value
    becomes at least the first positive code, and a negative one zero. NaN and infinite values count as zero and do not
    enter the scale; neither zero has a sign afterwards.
    """
    grid = BlockGrid.of(x.shape, block_size)
    blocks = to_blocks(x.float(), grid)
    blocks = torch.where(blocks.isfinite(), blocks, 0.0)
    scales = _block_scales(blocks, *_signs(codebook, values))
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    codes = _encode(blocks, inverse.unsqueeze(-1), codebook, values)
    return _from_blocks(codes, grid).reshape(x.shape), scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """``codebook[code] * scale`` in float32, rounded to ``dtype``; of the codes' shape.

    A scale that is NaN or infinite makes its block so (0 * inf is NaN); a value beyond ``dtype``'s range is infinite.
    """
    grid = BlockGrid.of(codes.shape, block_size)
    table = (formats.codebook(codebook) if values is None else values).to(codes.device)
    table = torch.nn.functional.pad(table, (0, 256 - table.numel()))
    decoded = table[to_blocks(codes, grid).int()] * scales.unsqueeze(-1)
    return _from_blocks(decoded, grid).reshape(codes.shape).to(dtype)


def _signs(codebook: str, values: Tensor | None) -> tuple[bool, bool]:
    """Whether the codebook has negative values, and whether the scale carries the sign."""
    if values is None:
        return codebook == "dynamic_signed", codebook == "dynamic_signed"
    lowest = float(values[0])
    return lowest < 0, -1 < lowest < 0


def to_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """[rows, blocks_per_row, block_size], short blocks padded with zeros."""
    padding = grid.blocks_per_row * grid.block_size - grid.row_length
    rows = torch.nn.functional.pad(x.reshape(grid.rows, grid.row_length), (0, padding))
    return rows.view(grid.rows, grid.blocks_per_row, grid.block_size)


def _from_blocks(blocks: Tensor, grid: BlockGrid) -> Tensor:
    return blocks.flatten(1)[:, : grid.row_length].contiguous()


def of_elements(scales: Tensor, grid: BlockGrid) -> Tensor:
    """Every element's scale: [rows, row_length]."""
    return scales.repeat_interleave(grid.block_size, 1)[:, : grid.row_length]


def _block_scales(blocks: Tensor, has_negative: bool, carries_sign: bool) -> Tensor:
    high, low = blocks.amax(-1).clamp(min=0), blocks.amin(-1).clamp(max=0)
    if not has_negative:
        scales = high
    elif carries_sign:
        scales = torch.where(high >= -low, high, low)
    else:
        scales = torch.maximum(high, -low)
    smallest = torch.full_like(scales, SMALLEST_SCALE)
    return torch.where(scales == 0, 0.0, torch.copysign(torch.maximum(scales.abs(), smallest), scales))


def _encode(x: Tensor, inverse: Tensor, codebook: str, values: Tensor | None) -> Tensor:
    if values is not None:
        return _encode_custom(x, inverse, values)
    constants = formats.dynamic_map(codebook)

    def line(name: str) -> Tensor:
        return torch.from_numpy(getattr(constants, name)).to(x.device)

    y = x * inverse
    magnitude = (y.abs() if constants.signed else y).clamp(min=float(constants.low))
    below = torch.bucketize(magnitude, line("thresholds"))
    offset = torch.full_like(magnitude, float(formats.ENCODE_OFFSET))
    u = rules.fused(magnitude, line("encode_slope")[below], offset).clamp(max=float(formats.ENCODE_TOP))
    f = (u.view(torch.int32) >> line("encode_shift")[below]) & 255
    if constants.signed:
        return torch.where(y < 0, 127 - f, 127 + f).clamp(min=0).to(torch.uint8)
    return torch.where(x > 0, (f - 1) & 255, 0).to(torch.uint8)


def _encode_custom(x: Tensor, inverse: Tensor, values: Tensor) -> Tensor:
    middles = (values[1:] + values[:-1]) * 0.5
    codes = torch.bucketize(x * inverse, middles)
    if float(values[0]) == 0:
        codes = torch.where(x > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8)
