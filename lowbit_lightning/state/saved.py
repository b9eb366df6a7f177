"""Reading a parameter's states from a checkpoint: they are checked, and converted to the form that is asked for.

The saved states are plain tensors or DTensors of global shapes. They may be in any form, under this library's names or
those of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.state import bitsandbytes, blocks, shards
from lowbit_lightning.state.blocks import Coding, Kept
from lowbit_lightning.state.form import MASTER, STEP, Form, StateFormat, codes_name, is_coded, names_of, scales_name


def read(p: Tensor, entries: Mapping[str, Any], coded: StateFormat | None, form: Form) -> dict[str, Any]:
    """Entries of p in ``form``. Entries that do not change keep their tensors; paged ones are returned in host memory.

    ``coded``: the format of the coded entries.

    Raises:
        ValueError: for entries that are missing or malformed.
    """
    if bitsandbytes.is_foreign(entries):
        entries, coded = bitsandbytes.translate(p, entries, form.rule)
    if not entries:
        return {}
    made, codings = Kept(), dict[str, Coding]()
    device, count = shards.local(p).device, _step(entries)
    for state in form.rule.states:
        _enter(p, state.name, entries, coded, made, codings)
    made = blocks.convert(made, codings, form, device)
    if form.master and MASTER in entries:
        made[MASTER] = shards.enter(p, _tensor(p, entries, MASTER, p.shape), torch.int8)
    known = {STEP, MASTER, *(name for state in form.rule.states for name in names_of(state.name))}
    others = {name: value for name, value in entries.items() if name not in known}
    paged = {entry.name for entry in form.entries(shards.local(p).shape) if entry.paged}
    if paged:  # entries that stay near are copies: they must not keep the checkpoint's memory alive
        made = {name: to_host(value) if name in paged else value.clone() for name, value in made.items()}
    shapes = {entry.name: entry.shape for entry in form.entries(p.shape)}
    wrapped = {name: shards.leave(p, value, shapes[name], stays=name in paged) for name, value in made.items()}
    return {**others, STEP: count.to(device, copy=True), **wrapped}


def to_host(value: Tensor) -> Tensor:
    return value.to("cpu")


def _step(entries: Mapping[str, Any]) -> Tensor:
    step, count = entries.get(STEP), torch.tensor(math.nan, dtype=torch.float32)
    if isinstance(step, Tensor) and step.numel() == 1:
        count = shards.full(step).detach().reshape(()).float()
    elif isinstance(step, (int, float)):
        count = torch.tensor(float(step), dtype=torch.float32)
    if not count.is_meta and not 0 <= float(count) < math.inf:
        raise ValueError(
            f"the checkpoint's step must be one finite number, 0 or more, got {step!r}; it holds {sorted(entries)}"
        )
    return count


def _enter(
    p: Tensor, name: str, entries: Mapping[str, Any], coded: StateFormat | None, made: Kept, codings: dict[str, Coding]
) -> None:
    """Put this rank's part of a saved state into ``made``, and its coding, if it stays coded, into ``codings``."""
    if not is_coded(entries, name):
        if name not in entries:
            raise ValueError(f"the checkpoint holds neither {name} nor {codes_name(name)}: {sorted(entries)}")
        made[name] = shards.enter(p, _tensor(p, entries, name, p.shape), torch.float32)
        return
    if coded is None:
        raise ValueError(f"{codes_name(name)} comes without a state_format in its param group; cannot decode")
    codes = _tensor(p, entries, codes_name(name), p.shape)
    scales = _tensor(p, entries, scales_name(name), BlockGrid.of(p.shape, coded.block_size).scales_shape)
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{codes_name(name)} must be uint8, got {codes.dtype}: something cast the codes on their way, as torch's "
            "own Optimizer.load_state_dict does; load the checkpoint into a lowbit_lightning optimizer"
        )
    if scales.dtype != torch.float32:
        raise ValueError(f"{scales_name(name)} must be float32, got {scales.dtype}: something cast it on its way")
    if name not in coded.maps:
        raise ValueError(f"the checkpoint's state_format names no map for {name}: {dict(coded.maps)}")
    damaged = (
        coded.maps[name] == "dynamic_unsigned" and not scales.is_meta and not bool((shards.local(scales) >= 0).all())
    )
    if damaged:
        raise ValueError(f"{scales_name(name)} of a state without negative values must be 0 or more: it is damaged")
    coding = coded.maps[name], coded.block_size
    if shards.keeps_grid(p):
        made |= {codes_name(name): shards.enter(p, codes), scales_name(name): shards.enter(p, scales)}
        codings[name] = coding
    else:  # the cuts between the ranks' parts of p go through blocks
        codes, scales = (shards.full(x).to(shards.local(p).device) for x in (codes, scales))
        made[name] = shards.enter(p, kernels.dequantize_blockwise(codes, scales, *coding))


def _tensor(p: Tensor, entries: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    value = entries.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the checkpoint's {name} must be a tensor, got {value!r}; it holds {sorted(entries)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for a parameter of shape {tuple(p.shape)}, got {tuple(value.shape)}"
        )
    return value
