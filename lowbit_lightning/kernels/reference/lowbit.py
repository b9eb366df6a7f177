"""Low-bit weights; ``formats/weights.py`` says how they are kept.

Equal on every backend to the bit: codes and scales of the fit ``"absmax"``, and what is dequantised. A least-squares
fit sums float32 in any order, so that a few codes may differ, and the error by parts in ten thousand. Products are
summed in float32 or better, in any order. 16-bit x may meet weights, or values of the table, that are rounded to its
dtype: on the CPU bfloat16 x, on a GPU float16 x too.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.formats import Format, weight_format
from lowbit_lightning.kernels.formats import weights as constants
from lowbit_lightning.kernels.reference.int8 import quantize_rowwise


def lowbit_quantize(weight: Tensor, form: str, fit: str) -> tuple[Tensor, Tensor]:
    """``packed`` and ``scales`` of a float weight ``[..., K]``.

    A block with a NaN or infinite value is NaN afterwards; so is its whole row where scales are kept in 8 bits, and in
    int8. Zeros lose their sign. int8 codes are never -128.
    """
    leading, length, f = weight.shape[:-1], weight.shape[-1], weight_format(form)
    rows = weight.reshape(prod(leading), length)
    if f.kind == "int8":
        codes, scales = quantize_rowwise(rows, None)
        packed, scales = codes.view(torch.uint8), scales.unsqueeze(1)
    elif rows.numel() == 0:
        packed = rows.new_zeros(len(rows), f.packed_width(length), dtype=torch.uint8)
        scales = rows.new_zeros(len(rows), f.scales_width(length), dtype=f.scales_dtype)
    else:
        codes, scales = (_quantize_affine if f.is_affine else _quantize_codebook)(rows.float(), f, fit)
        packed = pack(codes, f.bits)
    return packed.reshape(*leading, packed.shape[1]), scales.reshape(*leading, scales.shape[1])


def lowbit_dequantize(packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype) -> Tensor:
    """``table[code] * scale (+ offset)`` ``[..., K]``: float32, an operation rounded at a time, then ``dtype``."""
    f, leading = weight_format(form), packed.shape[:-1]
    rows = prod(leading)
    codes = unpack(packed.reshape(rows, packed.shape[-1]), f.bits, row_length)
    if f.kind == "int8":
        codes = codes ^ 128
    values = f.table(packed.device)[codes.long()]
    scale, offset = decode_scales(scales.reshape(rows, scales.shape[-1]), f)
    values = values * _of_elements(scale, f, row_length)
    if offset is not None:
        values = values + _of_elements(offset, f, row_length)
    return values.to(dtype).reshape(*leading, row_length)


def lowbit_gemv(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``lowbit_matmul`` of a few rows."""
    return lowbit_matmul(x, packed, scales, bias, form)


def lowbit_matmul(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``x @ weight.T (+ bias)``: x ``[M, K]``, result ``[M, N]`` in x's dtype. NaN and infinite values follow the
    arithmetic; a sum in another order may overflow where this one does not."""
    weight = lowbit_dequantize(packed, scales, form, x.shape[-1], torch.float32)
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def lowbit_matmul_backward(dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
    """``dy @ weight``: dy ``[M, N]``, result ``[M, K]`` in dy's dtype."""
    return (dy.float() @ lowbit_dequantize(packed, scales, form, row_length, torch.float32)).to(dy.dtype)


def lowbit_embedding(
    packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
) -> Tensor:
    """Rows ``indices`` of the weight ``[rows, K]``, dequantised: ``[*indices.shape, K]``."""
    flat = indices.flatten()
    rows = packed.index_select(0, flat), scales.index_select(0, flat)
    return lowbit_dequantize(*rows, form, row_length, dtype).reshape(*indices.shape, row_length)


def split_outliers(x: Tensor, packed: Tensor, scales: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """x ``[M, K]`` with zeros in its outlier columns, and these columns' product with an int8 weight ``[N, K]`` in
    float32. Outlier columns have a magnitude of at least ``threshold``; a NaN is none."""
    columns = (x.abs() >= threshold).any(0).nonzero().flatten()
    if not len(columns):
        return x, None
    part = packed[:, columns].view(torch.int8).float() * scales
    return x.index_fill(1, columns, 0.0), x[:, columns].float() @ part.T


# -- codes in bytes --------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[R, K]`` to ``[R, packed_width(K)]``."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], 1)
    per_byte = 8 // bits
    digits = pad(codes, (0, -codes.shape[1] % per_byte)).view(len(codes), -1, per_byte)
    return (digits << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """uint8 ``[R, packed_width(K)]`` to codes ``[R, K]``."""
    if bits == 8:
        return packed
    if bits == 3:
        low = -(-length // 4)
        return unpack(packed[:, :low], 2, length) | unpack(packed[:, low:], 1, length) << 2
    digits = packed.unsqueeze(-1) >> _shifts(bits, packed.device) & (1 << bits) - 1
    return digits.flatten(1)[:, :length]


def _shifts(bits: int, device: torch.device) -> Tensor:
    """How far each element of a byte is shifted: the first one is in the highest bits."""
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=device)


# -- scales in 8 bits ------------------------------------------------------------------------------------------------


def encode_squares(x: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exponent bytes ``[R, 1]`` and codes ``[R, G]``, both uint8, of float32 x, and what they stand for.

    The exponent is the lowest for which the largest magnitude of the row is at most ``largest * 2**(exponent - 127)``;
    ``|code|`` is the root of x in that unit, rounded to nearest, ties to even.
    """
    top = x.abs().amax(1, keepdim=True)
    bits = (top / torch.full_like(top, largest)).view(torch.int32)
    exponent = ((bits + 0x7FFFFF) >> 23).clamp(constants.LOWEST_EXPONENT, constants.HIGHEST_EXPONENT)
    square = x.abs() / _power(exponent)
    root = square.double().sqrt().float().round().clamp(max=largest**0.5)  # torch's root of float32 may be MKL's
    codes = torch.copysign(root, x).int() & 255
    return exponent.to(torch.uint8), codes.to(torch.uint8), torch.copysign(root * root, x) * _power(exponent)


def decode_scales(scales: Tensor, f: Format) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets, float32 ``[R, G]``, of the rows' ``scales``; a format without offsets has None."""
    if f.scale_kind == "float32":
        return scales, None
    heads = 2 if f.is_affine else 1
    unit = _power(scales[:, :heads].int())
    blocks = scales.shape[1] // heads - 1 if heads == 2 else scales.shape[1] - 1
    scale = scales[:, heads : heads + blocks].float() ** 2 * unit[:, :1]
    if not f.is_affine:
        return scale, None
    codes = scales[:, heads + blocks :].contiguous().view(torch.int8).float()
    return scale, codes * codes.abs() * unit[:, 1:]


def _power(exponent: Tensor) -> Tensor:
    """``2**(exponent - 127)``; infinite, so that zero times it is NaN, for 255."""
    return (exponent.int() << 23).view(torch.float32)


# -- fits ------------------------------------------------------------------------------------------------------------


def _of_elements(blocks: Tensor, f: Format, row_length: int) -> Tensor:
    return blocks.repeat_interleave(f.block_length(row_length), 1)[:, :row_length]


def _blocks(rows: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Rows ``[R, K]`` as ``[R, G, block]``, padded with zeros, non-finite values replaced by zero; and a mask of the
    blocks that had any, ``[R, G]``."""
    length = rows.shape[1]
    size = f.block_length(length)
    blocks = pad(rows, (0, -length % size)).view(len(rows), -1, size)
    finite = blocks.isfinite()
    return torch.where(finite, blocks, 0.0), ~finite.all(-1)


def _quantize_codebook(rows: Tensor, f: Format, fit: str) -> tuple[Tensor, Tensor]:
    """Codes ``[R, K]`` and the ``scales`` of float32 rows."""
    x, bad = _blocks(rows, f)
    absmax = x.abs().amax(-1)
    scale = absmax if fit == "absmax" else absmax * _fit_codebook(_normalised(x, absmax), f)
    if f.scale_kind == "float32":
        scales = torch.where(bad, torch.nan, scale)
    else:
        exponent, codes, kept = encode_squares(scale, constants.SCALE_SQUARE)
        scales = _mark(torch.cat([exponent, codes], 1), 1, bad)
        scale = scale if fit == "absmax" else kept
    codes = _nearest(_normalised(x, scale), f)
    codes = torch.where(scales.isnan().unsqueeze(-1), 0, codes) if f.scale_kind == "float32" else codes
    return codes.flatten(1)[:, : rows.shape[1]].contiguous(), scales


def _normalised(x: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 / scale)``, where a scale is at least SMALLEST_DIVISOR in magnitude."""
    divisor = torch.copysign(scale.abs().clamp(min=constants.SMALLEST_DIVISOR), scale)
    return x * (1.0 / divisor).unsqueeze(-1)


def _nearest(y: Tensor, f: Format) -> Tensor:
    """The codes of values in units of their scale; half-way between two values it is the lower one."""
    order = torch.tensor(f.order(), device=y.device)
    ascending = f.table(y.device)[order]
    return order.to(torch.uint8)[torch.bucketize(y, (ascending[:-1] + ascending[1:]) / 2)]


def _fit_codebook(y: Tensor, f: Format) -> Tensor:
    """The scales ``[R, G]`` of blocks y, in [-1, 1], of the least squared error that is found.

    For codes with values c the best scale is ``sum(y c) / sum(c c)``, and ``sum(y c)**2 / sum(c c)`` is what the error
    is then less than ``sum(y y)``.
    """
    table = f.table(y.device)
    best, gain = torch.ones_like(y[..., 0]), torch.full_like(y[..., 0], -1.0)
    for start in (sign * part for part in constants.NARROWER for sign in f.signs):
        scale = torch.full_like(best, start)
        for _ in range(constants.CODEBOOK_ROUNDS):
            c = table[_nearest(_normalised(y, scale), f).long()]
            yc, cc = (y * c).sum(-1), (c * c).sum(-1)
            scale = torch.where(cc > 0, yc / cc, scale)
            better = (cc > 0) & (yc * scale > gain)
            best, gain = torch.where(better, scale, best), torch.where(better, yc * scale, gain)
    return best


def _quantize_affine(rows: Tensor, f: Format, fit: str) -> tuple[Tensor, Tensor]:
    """Codes ``[R, K]`` and the ``scales`` of float32 rows."""
    x, bad = _blocks(rows, f)
    absmax = x.abs().amax(-1)
    y = _normalised(x, absmax)
    position = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(x.shape[1:])
    exists = position < rows.shape[1]
    scale, offset = (_extremes if fit == "absmax" else _fit_affine)(y, exists, f)
    scale_exponent, scale_codes, scale = encode_squares(scale * absmax, constants.SCALE_SQUARE)
    offset = offset * absmax
    if fit == "lsq":  # the best one for the scale that is kept
        offset = _mean(x, exists) - scale * _mean(_levels(x, scale, offset, f), exists)
    offset_exponent, offset_codes, offset = encode_squares(offset, constants.OFFSET_SQUARE)
    codes = (_levels(x, scale, offset, f) + _half(f)).to(torch.uint8)
    scales = torch.cat([scale_exponent, offset_exponent, scale_codes, offset_codes], 1)
    return codes.flatten(1)[:, : rows.shape[1]].contiguous(), _mark(scales, 2, bad)


def _half(f: Format) -> float:
    return (2**f.bits - 1) / 2


def _levels(x: Tensor, scale: Tensor, offset: Tensor, f: Format) -> Tensor:
    """The nearest values of the table, as floats: code - _half(f)."""
    inverse = torch.where(scale < constants.SMALLEST_DIVISOR, 0.0, 1.0 / scale).unsqueeze(-1)
    return ((x - offset.unsqueeze(-1)) * inverse + _half(f)).round().clamp(0, 2**f.bits - 1) - _half(f)


def _mean(x: Tensor, exists: Tensor) -> Tensor:
    return (x * exists).sum(-1) / exists.sum(-1)


def _extremes(y: Tensor, exists: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset ``[R, G]`` that span minimum to maximum."""
    low = torch.where(exists, y, torch.inf).amin(-1)
    high = torch.where(exists, y, -torch.inf).amax(-1)
    return (high - low) * (1 / (2 * _half(f))), (high + low) * 0.5


def _fit_affine(y: Tensor, exists: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset ``[R, G]`` of the least squared error that is found: the regression of y on the levels t of the
    nearest codes. ``cov(t, y)**2 / var(t)`` is what the error is then less than ``var(y)``."""
    widest, middle = _extremes(y, exists, f)
    mean = _mean(y, exists)
    centred = (y - mean.unsqueeze(-1)) * exists
    best, best_offset, gain = widest, middle, torch.full_like(mean, -1.0)
    for part in constants.NARROWER:
        scale, offset = widest * part, middle * part + mean * (1 - part)
        for _ in range(constants.AFFINE_ROUNDS):
            t = _levels(y, scale, offset, f)
            t_mean = _mean(t, exists)
            deviation = (t - t_mean.unsqueeze(-1)) * exists
            covariance, variance = (deviation * centred).sum(-1), (deviation * deviation).sum(-1)
            scale = torch.where(variance > 0, covariance / variance, scale)
            offset = mean - scale * t_mean
            better = (variance > 0) & (covariance * scale > gain)
            best, best_offset = torch.where(better, scale, best), torch.where(better, offset, best_offset)
            gain = torch.where(better, covariance * scale, gain)
    return best, best_offset


def _mark(scales: Tensor, heads: int, bad: Tensor) -> Tensor:
    """The rows that have a bad block: their exponents say NaN, their codes zero."""
    nan = torch.zeros_like(scales[:1])
    nan[:, :heads] = constants.NAN_EXPONENT
    return torch.where(bad.any(1, keepdim=True), nan, scales)
