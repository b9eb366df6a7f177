"""Conversion of optimizer states that bitsandbytes saved into this library's form.

bitsandbytes numbers its states (``state1``, ``state2``; AdEMAMix stacks its two momenta in ``state1``). It quantises
the flattened tensor in blocks of 256, and keeps the ``absmax`` of each block and one map per tensor. Its codes index
the same sorted maps as ours. If its blocks are also ours (in vectors, and in rows that are multiples of the block
size), codes and scales are taken over bit for bit. Otherwise the values are decoded. They are also decoded for
non-negative states of its optimizers with one state, which use the signed map.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.formats import BlockGrid, codebook
from lowbit_lightning.kernels.rules import Rule, State
from lowbit_lightning.state.form import StateFormat, codes_name, scales_name

MARKER = "__bnb_optimizer_quant_state__"
BLOCK_SIZE = 256
_KEYS = ("betas", "eps", "alpha", "t_alpha", "t_beta3")
"""Group keys that bitsandbytes also gives to optimizers that do not use them."""
_IGNORED = {"amsgrad": False, "centered": False, "nesterov": False, "dampening": 0.0}
"""Options that its constructors accept and its steps ignore."""


def is_foreign(entries: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes saved these entries of a parameter."""
    return MARKER in entries or "state1" in entries


def native_groups(saved: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """The checkpoint with the keys of bitsandbytes' groups renamed to this library's.

    ``known``: the keys that the optimizer has. bitsandbytes keeps the momentum of SGD and LARS, and the alpha of
    RMSprop, as the first of ``betas``.
    """

    def native(group: dict[str, Any]) -> dict[str, Any]:
        if not any(is_foreign(saved["state"].get(key, {})) for key in group["params"]):
            return group
        ours = {k: v for k, v in group.items() if k in known or k not in _KEYS}
        ours |= {k: v for k, v in _IGNORED.items() if k in known}
        if "betas" not in known and "betas" in group:
            if "alpha" in known:
                ours |= {"alpha": group["betas"][0], "momentum": 0.0}
            elif "momentum" in known:
                ours["momentum"] = group["betas"][0]
        return ours

    return {**saved, "param_groups": [native(group) for group in saved["param_groups"]]}


def translate(p: Tensor, entries: Mapping[str, Any], rule: Rule) -> tuple[dict[str, Any], StateFormat]:
    """The entries of parameter p under this library's names, and their format.

    Raises:
        ValueError: for states that are missing or do not fit the rule.
    """
    saved = {**entries, **entries.get(MARKER, {})}
    result: dict[str, Any] = {"step": saved.get("step")}
    stacked = rule.name == "ademamix"
    for place, state in enumerate(rule.states):
        number = place if stacked and place else place + 1
        values, absmax, table = (saved.get(f"{part}{number}") for part in ("state", "absmax", "qmap"))
        if stacked and number == 1:
            values, absmax = _layer(values, place, p), _layer(absmax, place, p)
        if not isinstance(values, Tensor) or values.numel() != p.numel():
            raise ValueError(
                f"bitsandbytes' state{number} must have {p.numel()} elements for {state.name}, got "
                f"{getattr(values, 'shape', None)}: was the checkpoint saved by another optimizer?"
            )
        values = values.reshape(p.shape)
        if values.dtype != torch.uint8:
            result[state.name] = values
        elif isinstance(table, Tensor) and isinstance(absmax, Tensor) and absmax.numel() == -(-p.numel() // BLOCK_SIZE):
            result |= _decoded(state, values, absmax.float(), table.float().cpu())
        else:
            raise ValueError(
                f"bitsandbytes' state{number} is quantised, but qmap{number} is missing, or absmax{number} is not one "
                f"value for each {BLOCK_SIZE} elements: {getattr(absmax, 'shape', None)}; there are {sorted(saved)}"
            )
    return result, StateFormat.of(rule, BLOCK_SIZE)


def _layer(value: Any, place: int, p: Tensor) -> Any:
    """One of AdEMAMix's two momenta, or its scales."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != 2:
        return None
    if value.dtype == torch.uint8 and p.numel() % BLOCK_SIZE:
        raise ValueError(
            f"bitsandbytes' AdEMAMix lets the scales of its momenta overlap where the number of elements, here "
            f"{p.numel()}, is not a multiple of {BLOCK_SIZE}: the state cannot be recovered; start from a new one"
        )
    return value[place]


def _decoded(state: State, codes: Tensor, absmax: Tensor, table: Tensor) -> dict[str, Tensor]:
    """Codes and scales if blocks and map are the same as ours; otherwise values."""
    grid = BlockGrid.of(codes.shape, BLOCK_SIZE)
    if grid.in_runs and not state.slow and torch.allclose(table, codebook(state.codebook), rtol=1e-5, atol=1e-10):
        return {codes_name(state.name): codes, scales_name(state.name): absmax.reshape(grid.scales_shape)}
    scales = absmax.cpu().flatten().repeat_interleave(BLOCK_SIZE)[: codes.numel()]
    return {state.name: (table[codes.cpu().int()].flatten() * scales).reshape(codes.shape)}
