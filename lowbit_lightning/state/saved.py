"""A parameter's states as a checkpoint has them: checked, then brought into the form that is asked for.

They come as plain tensors or DTensors of global shapes, in any form, under this library's names or bitsandbytes'.
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
from lowbit_lightning.state.form import MASTER, STEP, Form, StateFormat, codes_name, scales_name

Saved = tuple[Mapping[str, Any], StateFormat | None]
"""The entries of a parameter, and the format of those that are coded."""


def check(p: Tensor, saved: Saved, form: Form) -> Saved:
    """The same under this library's names.

    Raises:
        ValueError: for entries that are missing or malformed: all that ``read`` cannot take.
    """
    entries, coded = saved
    if bitsandbytes.is_foreign(entries):
        entries, coded = bitsandbytes.translate(p, entries, form.rule)
    if not entries:
        return entries, coded
    _step(entries)
    for state in form.rule.states:
        for value in _state(p, state.name, entries, coded):
            shards.check_cut(p, value)
    if form.master and MASTER in entries:
        _tensor(p, entries, MASTER, p.shape)
    return entries, coded


def read(p: Tensor, saved: Saved, form: Form) -> dict[str, Any]:
    """Entries of p in ``form``: the same tensors where nothing changes. What is to be paged comes in host memory.

    Raises:
        ValueError: as ``check``.
    """
    entries, coded = check(p, saved, form)
    if not entries:
        return {}
    kept: Kept = {}
    codings: dict[str, Coding] = {}
    for state in form.rule.states:
        _enter(p, state.name, entries, coded, kept, codings)
    result = blocks.convert(kept, codings, form, shards.local(p).device)
    if form.master and MASTER in entries:
        result[MASTER] = shards.enter(p, entries[MASTER], torch.int8)
    count = _step(entries).to(shards.local(p).device, copy=True)
    known = {STEP, MASTER, *(n for s in form.rule.states for n in (s.name, codes_name(s.name), scales_name(s.name)))}
    others = {name: value for name, value in entries.items() if name not in known}
    paged = {entry.name for entry in form.entries(shards.local(p).shape) if entry.paged}
    if paged:  # what stays near is no memory of the checkpoint
        result = {name: value.to("cpu") if name in paged else value.clone() for name, value in result.items()}
    shapes = {entry.name: entry.shape for entry in form.entries(p.shape)}
    return {
        **others,
        STEP: count,
        **{name: shards.leave(p, value, shapes[name], stays=name in paged) for name, value in result.items()},
    }


def _step(entries: Mapping[str, Any]) -> Tensor:
    step, count = entries.get(STEP), torch.tensor(math.nan)
    if isinstance(step, Tensor) and step.numel() == 1:
        count = shards.full(step).detach().reshape(()).float()
    elif isinstance(step, (int, float)):
        count = torch.tensor(float(step))
    if not count.is_meta and not 0 <= float(count) < math.inf:
        raise ValueError(
            f"the checkpoint's step must be one finite number, 0 or more, got {step!r}; it holds {sorted(entries)}"
        )
    return count


def _state(p: Tensor, name: str, entries: Mapping[str, Any], coded: StateFormat | None) -> tuple[Tensor, ...]:
    """Codes and scales, or the values, as they were saved, checked."""
    if not blocks.is_coded(entries, name):
        if name not in entries:
            raise ValueError(f"the checkpoint holds neither {name} nor {codes_name(name)}: {sorted(entries)}")
        return (_tensor(p, entries, name, p.shape),)
    if coded is None:
        raise ValueError(f"{codes_name(name)} comes without a state_format in its param group; cannot decode")
    codes = _tensor(p, entries, codes_name(name), p.shape)
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{codes_name(name)} must be uint8, got {codes.dtype}: something cast the codes on their way, as torch's "
            "own Optimizer.load_state_dict does; load the checkpoint into a lowbit_lightning optimizer"
        )
    scales = _tensor(p, entries, scales_name(name), BlockGrid.of(p.shape, coded.block_size).scales_shape)
    if scales.dtype != torch.float32:
        raise ValueError(f"{scales_name(name)} must be float32, got {scales.dtype}: something cast it on its way")
    if name not in coded.maps:
        raise ValueError(f"the checkpoint's state_format names no map for {name}: {dict(coded.maps)}")
    return codes, scales


def _tensor(p: Tensor, entries: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    value = entries.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the checkpoint's {name} must be a tensor, got {value!r}; it holds {sorted(entries)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for a parameter of shape {tuple(p.shape)}, got {tuple(value.shape)}"
        )
    return value


def _enter(
    p: Tensor,
    name: str,
    entries: Mapping[str, Any],
    coded: StateFormat | None,
    kept: Kept,
    codings: dict[str, Coding],
) -> None:
    """This rank's part of a saved state, into ``kept``."""
    if not blocks.is_coded(entries, name):
        kept[name] = shards.enter(p, entries[name], torch.float32)
        return
    assert coded is not None
    names, coding = (codes_name(name), scales_name(name)), (coded.maps[name], coded.block_size)
    if shards.keeps_grid(p):
        kept.update((n, shards.enter(p, entries[n])) for n in names)
        codings[name] = coding
    else:  # p's cut goes through blocks
        codes, scales = (shards.full(entries[n]).to(shards.local(p).device) for n in names)
        kept[name] = shards.enter(p, kernels.dequantize_blockwise(codes, scales, *coding))
