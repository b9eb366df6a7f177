"""Conversion between the two forms of a state: float32 values, and uint8 codes with float32 scales.

All tensors here are local. This file does not know what a parameter is, or where its other parts are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, BlockGrid, dynamic_map
from lowbit_lightning.state.form import Entry, Form, codes_name, is_coded, scales_name

Kept = dict[str, Tensor]
"""This rank's part of a parameter's entries."""
Coding = tuple[str, int]
"""Codebook and block size of a coded state."""


def filled(entry: Entry, device: torch.device, spread: bool = False) -> Tensor:
    """An entry before the first step, of ``entry.shape`` and ``entry.dtype``.

    ``spread``: the result is an expanded view of one number on the CPU, which takes no memory.
    """
    if spread:
        return torch.full((), entry.value, dtype=entry.dtype, device="cpu").expand(entry.shape)
    return torch.full(entry.shape, entry.value, dtype=entry.dtype, device=device)


def block_size_of(shape: tuple[int, ...], entries: Mapping[str, object], name: str, likely: int) -> int:
    """The block size of the 8-bit state ``name``, found from the shape of its scales. ``likely`` is tried first.

    ``shape``: the shape of the parameter, or of the part of it that the entries belong to.

    Raises:
        ValueError: for scales that fit no block size.
    """
    scales = entries.get(scales_name(name))
    found = tuple(scales.shape) if isinstance(scales, Tensor) else None
    sizes = [2**i for i in range(MIN_BLOCK_SIZE.bit_length() - 1, MAX_BLOCK_SIZE.bit_length())]
    shapes = {size: BlockGrid.of(shape, size).scales_shape for size in (likely, *sizes)}
    for size, fitting in shapes.items():
        if fitting == found:
            return size
    raise ValueError(
        f"{scales_name(name)} must have one of the shapes {sorted(set(shapes.values()))}, by block size, for a "
        f"parameter of shape {tuple(shape)}, got {found}: assign scales that fit the codes, or load a checkpoint"
    )


def convert(kept: Mapping[str, Tensor], codings: Mapping[str, Coding], form: Form, device: torch.device) -> Kept:
    """The states in ``form``, made from entries in any form.

    A state that does not change keeps its tensors. New tensors lie on ``device``. ``codings`` names the codebook and
    block size of each state that is coded now. The states of an element are encoded together, as in a step: if one of
    them is not finite, all of them become 0. (If only an overflowed second moment became 0 and the momentum stayed, the
    next update would be unbounded.)
    """
    wanted = {
        state.name: (state.codebook, form.block_size) if bits == 8 else None
        for state, bits in zip(form.rule.states, form.bits, strict=True)
        if state.name in kept or is_coded(kept, state.name)
    }
    held = {name: codings[name] if is_coded(kept, name) else None for name in wanted}
    changed = {name for name in wanted if wanted[name] != held[name]}
    values = {name: _values(kept, name, held[name], device) for name in wanted if name in changed or not held[name]}
    lost = None
    if any(wanted[name] for name in changed):
        lost = torch.stack([~x.isfinite().to(device) for x in values.values()]).any(0)
    result: Kept = {}
    for name, coding in wanted.items():
        if coding is None:
            result[name] = values[name] if lost is None else values[name].to(device).masked_fill(lost, 0.0)
        elif name in changed:
            assert lost is not None
            codes, scales = kernels.quantize_blockwise(values[name].to(device).masked_fill(lost, 0.0), *coding)
            result |= {codes_name(name): codes, scales_name(name): scales}
        else:
            codes = kept[codes_name(name)]
            if lost is not None:
                codes = codes.to(device).masked_fill(lost, dynamic_map(coding[0]).zero_code)
            result |= {codes_name(name): codes, scales_name(name): kept[scales_name(name)]}
    return result


def _values(kept: Mapping[str, Tensor], name: str, coding: Coding | None, device: torch.device) -> Tensor:
    if coding is None:
        return kept[name]  # where it is: it may stay as it is
    codes, scales = kept[codes_name(name)].to(device), kept[scales_name(name)].to(device)
    return kernels.dequantize_blockwise(codes, scales, *coding)
