"""The two forms of an optimizer state in ``optimizer.state[p]``, and the ways between them.

The map follows from whether the state can be negative. A state of another form, or of another block size, is converted
when it is loaded; ``StateFormat`` is what a checkpoint says about its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, BlockGrid, dynamic_map
from lowbit_lightning.kernels.rules import State
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import StateFormat, codes_name, scales_name


def create(
    p: Tensor, state: State, bits: int, block_size: int, value: float = 0.0, spread: bool = False
) -> dict[str, Tensor]:
    """Entries of a state for the parameter p (a tensor or a DTensor), keyed by name; all elements are ``value``.

    ``spread``: see ``filled``.
    """
    if bits == 32:
        return {state.name: filled(p, value, torch.float32, spread)}
    code = 255 if value else dynamic_map(state.codebook).zero_code  # the code of 1.0
    local = shards.local(p)
    scales = torch.full(
        BlockGrid.of(local.shape, block_size).scales_shape, value, dtype=torch.float32, device=local.device
    )
    shape = BlockGrid.of(p.shape, block_size).scales_shape
    return {
        codes_name(state.name): filled(p, code, torch.uint8, spread),
        scales_name(state.name): shards.like(p, scales, shape),
    }


def filled(p: Tensor, value: float, dtype: torch.dtype, spread: bool = False) -> Tensor:
    """A tensor like p, of ``dtype``, full of ``value``. ``spread``: this rank's part of it, one number on the CPU."""
    local = shards.local(p)
    if spread:
        return torch.full((), value, dtype=dtype, device="cpu").expand(local.shape)
    return shards.like(p, torch.full(local.shape, value, dtype=dtype, device=local.device), p.shape)


def is_coded(entries: Mapping[str, Any], name: str) -> bool:
    """Whether the state ``name`` is in its 8-bit form."""
    return codes_name(name) in entries


def block_size_of(p: Tensor, entries: Mapping[str, Any], name: str, likely: int) -> int:
    """The block size of the 8-bit state ``name``, which its scales tell: ``likely``, if they fit it.

    Raises:
        ValueError: for scales that fit no block size.
    """
    scales = entries.get(scales_name(name))
    shape = tuple(scales.shape) if isinstance(scales, Tensor) else None
    sizes = [2**i for i in range(MIN_BLOCK_SIZE.bit_length() - 1, MAX_BLOCK_SIZE.bit_length())]
    shapes = {size: BlockGrid.of(p.shape, size).scales_shape for size in (likely, *sizes)}
    for size, fitting in shapes.items():
        if fitting == shape:
            return size
    raise ValueError(
        f"{scales_name(name)} must have one of the shapes {sorted(set(shapes.values()))}, by block size, for a "
        f"parameter of shape {tuple(p.shape)}, got {shape}: assign scales that fit the codes, or load a checkpoint"
    )


def convert(
    p: Tensor, state: State, entries: Mapping[str, Tensor], saved: StateFormat | None, bits: int, block_size: int
) -> dict[str, Tensor]:
    """The state's entries in the wanted form, from entries in any form; the same tensors where nothing changes.

    ``saved`` describes coded entries. Raises ValueError if they are missing, malformed, or ``saved`` is.
    """
    check(p, state, entries, saved)
    if is_coded(entries, state.name):
        assert saved is not None
        codes, scales = _saved_codes(p, state.name, entries, saved)
        if bits == 8 and saved.block_size == block_size and saved.maps.get(state.name) == state.codebook:
            return _coded(p, state, placed(p, codes), placed(p, scales), block_size)
        values = _decoded(p, state.name, codes, scales, saved)
    else:
        values = placed(p, entries[state.name], torch.float32)
    if bits == 32:
        return {state.name: shards.like(p, values, p.shape)}
    return _coded(p, state, *kernels.quantize_blockwise(values, state.codebook, block_size), block_size)


def check(p: Tensor, state: State, entries: Mapping[str, Any], saved: StateFormat | None) -> None:
    """Raise ValueError for what ``convert`` cannot take."""
    if is_coded(entries, state.name):
        if saved is None:
            raise ValueError(f"{codes_name(state.name)} comes without a state_format in its param group; cannot decode")
        found: tuple[Tensor, ...] = _saved_codes(p, state.name, entries, saved)
        if state.name not in saved.maps:
            raise ValueError(f"the checkpoint's state_format names no map for {state.name}: {dict(saved.maps)}")
    elif state.name in entries:
        found = (checked(p, entries, state.name, p.shape),)
    else:
        raise ValueError(f"the checkpoint holds neither {state.name} nor {codes_name(state.name)}: {sorted(entries)}")
    for value in found:
        shards.check_cut(p, value)


def _saved_codes(p: Tensor, name: str, entries: Mapping[str, Any], saved: StateFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales as they were saved, checked."""
    codes = checked(p, entries, codes_name(name), p.shape)
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{codes_name(name)} must be uint8, got {codes.dtype}: something cast the codes on their way, as torch's "
            "own Optimizer.load_state_dict does; load the checkpoint into a lowbit_lightning optimizer"
        )
    scales = checked(p, entries, scales_name(name), BlockGrid.of(p.shape, saved.block_size).scales_shape)
    if scales.dtype != torch.float32:
        raise ValueError(f"{scales_name(name)} must be float32, got {scales.dtype}: something cast it on its way")
    return codes, scales


def _decoded(p: Tensor, name: str, codes: Tensor, scales: Tensor, saved: StateFormat) -> Tensor:
    """This rank's float32 values of saved codes."""
    if shards.keeps_grid(p):
        return kernels.dequantize_blockwise(placed(p, codes), placed(p, scales), saved.maps[name], saved.block_size)
    device = shards.local(p).device
    whole = [shards.full(x).to(device) for x in (codes, scales)]  # p's cut goes through blocks
    return placed(p, kernels.dequantize_blockwise(whole[0], whole[1], saved.maps[name], saved.block_size))


def _coded(p: Tensor, state: State, codes: Tensor, scales: Tensor, block_size: int) -> dict[str, Tensor]:
    return {
        codes_name(state.name): shards.like(p, codes, p.shape),
        scales_name(state.name): shards.like(p, scales, BlockGrid.of(p.shape, block_size).scales_shape),
    }


def checked(p: Tensor, entries: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A saved tensor of this name and global shape."""
    value = entries.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the checkpoint's {name} must be a tensor, got {value!r}; it holds {sorted(entries)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for a parameter of shape {tuple(p.shape)}, got {tuple(value.shape)}"
        )
    return value


def placed(p: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part of a saved tensor, contiguous, on p's device."""
    return shards.part_of(p, value).to(device=shards.local(p).device, dtype=dtype).contiguous()
