"""Optimizer states as bitsandbytes saves them, in this library's form.

bitsandbytes numbers its states (``state1``, ``state2``), quantises the flattened tensor in blocks of 256 and keeps a
block's ``absmax`` and, per tensor, the map. Its codes index the same sorted maps as ours. Where its blocks are ours
(rows that are multiples of the block size, or vectors) codes and scales are taken as they are, to the bit; elsewhere
the values are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.formats import BlockGrid, codebook
from lowbit_lightning.kernels.rules import Rule
from lowbit_lightning.state import blocks
from lowbit_lightning.state.blocks import StateFormat

MARKER = "__bnb_optimizer_quant_state__"
BLOCK_SIZE = 256


def is_foreign(entries: Mapping[str, Any]) -> bool:
    """Whether a parameter's saved entries are bitsandbytes'."""
    return MARKER in entries or "state1" in entries


def translate(p: Tensor, entries: Mapping[str, Any], rule: Rule) -> tuple[dict[str, Any], StateFormat]:
    """The entries of parameter p in this library's names, and their format.

    Raises:
        ValueError: for a rule whose states bitsandbytes lays out otherwise (more than two), or a missing part.
    """
    if len(rule.states) > 2:
        raise ValueError(
            f"states of rule {rule.name!r} cannot be taken from bitsandbytes: it stacks more than two in one tensor"
        )
    saved = {**entries, **entries.get(MARKER, {})}
    result: dict[str, Any] = {"step": saved.get("step", 0)}
    for i, state in enumerate(rule.states, start=1):
        values, absmax = saved.get(f"state{i}"), saved.get(f"absmax{i}")
        if not isinstance(values, Tensor) or values.numel() != p.numel():
            raise ValueError(
                f"bitsandbytes' state{i} must have {p.numel()} elements, got {getattr(values, 'shape', None)}"
            )
        values = values.reshape(p.shape)
        if values.dtype != torch.uint8:
            result[state.name] = values
            continue
        if not isinstance(absmax, Tensor) or f"qmap{i}" not in saved:
            raise ValueError(
                f"bitsandbytes' state{i} is quantised, but absmax{i} or qmap{i} is missing: {sorted(saved)}"
            )
        table, grid = saved[f"qmap{i}"].float().cpu(), BlockGrid.of(p.shape, BLOCK_SIZE)
        same_blocks = grid.rows <= 1 or grid.row_length % BLOCK_SIZE == 0
        if same_blocks and torch.allclose(table, codebook(state.codebook), rtol=1e-4, atol=1e-9):
            result[blocks.codes_name(state.name)] = values
            result[blocks.scales_name(state.name)] = absmax.float().reshape(grid.scales_shape)
        else:
            decoded = table[values.cpu().int()].flatten()
            scales = absmax.float().cpu().repeat_interleave(BLOCK_SIZE)[: p.numel()]
            result[state.name] = (decoded * scales).reshape(p.shape)
    return result, StateFormat.of(rule, BLOCK_SIZE)
