"""What every op means, in plain torch, on any device: slow, obviously right, and the yardstick of the other backends.

All arithmetic is float32 with one rounding per operation, in the order written, so that another backend that does
the same agrees to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.formats import SMALLEST_SCALE, BlockGrid

TINY_ROW = 2.0**-120
"""A row whose largest magnitude is below this counts as zero in the int8 ops."""


# -- block-wise quantisation -----------------------------------------------------------------------------------------


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of x's shape, and scales, float32 ``[rows, blocks_per_row]``, of a contiguous float tensor.

    ``codebook``: ``"dynamic_signed"``, ``"dynamic_unsigned"`` or ``"custom"``, whose sorted ``values`` end at 1.0.

    A block's scale is its value of largest magnitude: with its sign where the codebook has negative values but no -1
    (of two equal extremes the positive one counts), the largest positive value where the codebook has no negative
    ones, the magnitude otherwise; raised to 2**-126 unless zero. A value becomes the code nearest to ``x * (1 /
    scale)``, the lower one on a tie; zero becomes zero; under a codebook without negative values a positive value
    becomes at least the first positive code. Non-finite values count as zero and do not enter the scale.
    """
    grid = BlockGrid.of(x.shape, block_size)
    blocks = _to_blocks(x.float(), grid)
    blocks = torch.where(blocks.isfinite(), blocks, 0.0)
    scales = _block_scales(blocks, *_signs(codebook, values))
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    codes = _encode(blocks, inverse.unsqueeze(-1), codebook, values)
    return _from_blocks(codes, grid).reshape(x.shape), scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """``codebook[code] * scale`` in float32, rounded to ``dtype``; of the codes' shape."""
    grid = BlockGrid.of(codes.shape, block_size)
    table = (formats.codebook(codebook) if values is None else values).to(codes.device)
    table = torch.nn.functional.pad(table, (0, 256 - table.numel()))
    decoded = table[_to_blocks(codes, grid).int()] * scales.unsqueeze(-1)
    return _from_blocks(decoded, grid).reshape(codes.shape).to(dtype)


def _signs(codebook: str, values: Tensor | None) -> tuple[bool, bool]:
    """Whether the codebook has negative values, and whether the scale carries the sign."""
    if values is None:
        return codebook == "dynamic_signed", codebook == "dynamic_signed"
    lowest = float(values[0])
    return lowest < 0, -1 < lowest < 0


def _to_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """[rows, blocks_per_row, block_size], short blocks padded with zeros."""
    padding = grid.blocks_per_row * grid.block_size - grid.row_length
    rows = torch.nn.functional.pad(x.reshape(grid.rows, grid.row_length), (0, padding))
    return rows.view(grid.rows, grid.blocks_per_row, grid.block_size)


def _from_blocks(blocks: Tensor, grid: BlockGrid) -> Tensor:
    return blocks.flatten(1)[:, : grid.row_length].contiguous()


def _of_elements(scales: Tensor, grid: BlockGrid) -> Tensor:
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


# -- optimizer step --------------------------------------------------------------------------------------------------


def optimizer_step(arguments: StepArguments, norms: Tensor | None) -> None:
    """One step of ``arguments.rule``, in place, on parameters, states, scales and step counts.

    ``norms``: float64 ``[n, len(rule.norms)]``, sums of squares, as ``optimizer_norms`` returns them (summed over
    ranks by the caller); None for rules without norms.

    Per element: ``g * (unscale * clip)``, negated if ``maximize``; codes looked up in their codebook; the rule, which
    multiplies them by their blocks' scales; the parameter rounded to its dtype (to nearest, or stochastically); states
    encoded. An element any of whose new 8-bit states is not finite has them all encoded as zero, and enters no scale.
    Its parameter is what the rule made of it: non-finite, as in torch.
    """
    if arguments.skip is not None and bool(arguments.skip != 0):
        return
    rule = rules.get(arguments.rule)
    for i, p in enumerate(arguments.params):
        arguments.steps[i].add_(1)
        step = float(arguments.steps[i])
        scalars = rule.compute_scalars(_hyper(arguments), step, _roots(norms, i))
        values = rule.run("direction", _operands(arguments, rule, i), scalars, p.device)
        values = rule.run("finish", values, scalars, p.device)
        _store_states(arguments, rule, i, values)
        if arguments.remainders:
            split_master(values["p"], p, arguments.remainders[i])
        elif arguments.stochastic_rounding and p.dtype == torch.bfloat16:
            words = random_words(
                arguments.seed, arguments.ordinals[i], int(step), arguments.offsets[i], p.numel(), p.device
            )
            p.copy_(round_stochastically(values["p"], words.view(p.shape)))
        else:
            p.copy_(values["p"])


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """Sums of squares of the values that the rule names in ``norms``: float64 ``[n, len(rule.norms)]``.

    The order of summation is fixed: the float32 squares of a block (padded with zeros) are folded in halves (element
    j and j + half) in float32; the blocks' sums, in order, are folded the same way in float64 in groups of 256 until
    one is left.
    """
    rule = rules.get(arguments.rule)
    result = torch.zeros(len(arguments.params), len(rule.norms), dtype=torch.float64, device=arguments.device)
    for i, p in enumerate(arguments.params):
        scalars = rule.compute_scalars(_hyper(arguments), float(arguments.steps[i]) + 1, None)
        values = rule.run("direction", _operands(arguments, rule, i), scalars, p.device)
        for k, name in enumerate(rule.norms):
            result[i, k] = _square_sum(values[name], arguments.grid(i))
    return result


def _hyper(arguments: StepArguments) -> list[float]:
    if arguments.lr is None:
        return arguments.hyper
    return [float(arguments.lr), *arguments.hyper[1:]]


def _roots(norms: Tensor | None, i: int) -> tuple[float, ...] | None:
    return None if norms is None else tuple(float(x) ** 0.5 for x in norms[i])


def _operands(arguments: StepArguments, rule: rules.Rule, i: int) -> dict[str, Tensor]:
    """p, g, the states and their scales of parameter i, float32."""
    factor = torch.ones((), dtype=torch.float32, device=arguments.device)
    for value in (arguments.unscale, arguments.clip):
        if value is not None:
            factor = factor * value.reshape(())
    g = arguments.grads[i].float() * (-factor if arguments.maximize else factor)
    p = arguments.params[i]
    operands = {"p": join_master(p, arguments.remainders[i]) if arguments.remainders else p.float(), "g": g}
    for s, state in enumerate(rule.states):
        stored, scale = arguments.states[s][i], torch.ones((), dtype=torch.float32, device=arguments.device)
        if stored.dtype == torch.uint8:
            stored = formats.codebook(state.codebook).to(arguments.device)[stored.int()]
            scale = _of_elements(arguments.scales[s][i], arguments.grid(i)).view(p.shape)
        operands |= {state.name: stored, f"{state.name}_scale": scale}
    return operands


def _store_states(arguments: StepArguments, rule: rules.Rule, i: int, values: dict[str, Tensor]) -> None:
    coded = [s for s in range(len(rule.states)) if arguments.states[s][i].dtype == torch.uint8]
    finite = torch.ones(arguments.params[i].shape, dtype=torch.bool, device=arguments.device)
    for s in coded:
        finite &= values[rule.states[s].name].isfinite()
    for s, state in enumerate(rule.states):
        if s not in coded:
            arguments.states[s][i].copy_(values[state.name])
            continue
        new = torch.where(finite, values[state.name], 0.0)
        codes, scales = quantize_blockwise(new, state.codebook, None, arguments.block_size)
        arguments.states[s][i].copy_(codes)
        arguments.scales[s][i].copy_(scales)


def _square_sum(x: Tensor, grid: BlockGrid) -> Tensor:
    blocks = _to_blocks(x * x, grid)
    sums = _fold_halves(blocks).flatten().double()
    while sums.numel() > 1:
        sums = _fold_halves(torch.nn.functional.pad(sums, (0, -sums.numel() % 256)).view(-1, 256))
    return sums.sum()


def _fold_halves(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


# -- the 24-bit master copy of a bfloat16 parameter
# --------------------------------------------------------------------


def join_master(p: Tensor, remainder: Tensor) -> Tensor:
    """float32 whose upper 24 bits are the bfloat16 p's, followed by eight zeros, plus the int8 remainder."""
    return ((p.view(torch.int16).int() << 16) + (remainder.int() << 8)).view(torch.float32)


def split_master(x: Tensor, p: Tensor, remainder: Tensor) -> None:
    """Store float32 x as bfloat16 p, the nearest, and int8 remainder: x rounded to 24 bits, ties to even.

    Where x is not finite the remainder is zero.
    """
    bits = x.view(torch.int32).long()
    master = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    upper = (master + 0x80) >> 8
    finite = x.isfinite()
    p.copy_(torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16)))
    remainder.copy_(torch.where(finite, master - (upper << 8), 0))


# -- random words ----------------------------------------------------------------------------------------------------


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


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """float32 to bfloat16: up with the probability of the remainder. Non-finite values are rounded to nearest."""
    bits = ((x.view(torch.int32).long() + words) >> 16).to(torch.int16)
    return torch.where(x.isfinite(), bits.view(torch.bfloat16), x.to(torch.bfloat16))


# -- int8 ------------------------------------------------------------------------------------------------------------


def quantize_rowwise(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` of a float matrix ``[R, C]``.

    ``q = round(y)`` with ``y = x * (127 / absmax)``, and ``scale = absmax / 127``. Without a seed to nearest, ties to
    even. With one at random, without bias: ``|q| = floor(|y| + u)`` with ``u = (word + 1/2) / 2**16`` of the element's
    random word (parameter 0, step 0, the element's index in x); the extreme of a row stays 127 or -127.

    A row with absmax below 2**-120 counts as zero (q = 0, scale = 0). A row with a non-finite value has q = 0 and scale
    NaN, so that whatever is computed from it shows it.
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


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``: ``a`` int8 ``[M, K]``, ``b`` int8 ``[N, K]``, result
    ``[M, N]``.

    The sum over K is exact (int32); it is converted to float32 and scaled left to right.
    """
    exact = (a.double() @ b.double().T).float()
    result = exact * a_scales.unsqueeze(1) * b_scales
    return (result if bias is None else result + bias.float()).to(out_dtype)
