"""A checkpoint of Lightning, split into tensors under flat keys, for ``torch.distributed.checkpoint``, and the rest.

The keys are ``state_dict.NAME``, and for example ``optimizer_0.state.3.exp_avg_codes``: an entry of the state of
parameter 3 of the first optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from lowbit_lightning.state import shards

State = dict[str, Any]


def split(checkpoint: State) -> tuple[dict[str, Tensor], State]:
    """The tensors of a checkpoint by flat key, and everything else. Tied weights are stored once."""
    tensors = {}
    weights: State = {}
    names: dict[int, str] = {}  # the first name of each tensor
    tied: dict[str, str] = {}
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor):
            weights[name] = value
        elif id(value) in names:
            tied[name] = names[id(value)]
        else:
            names[id(value)] = name
            tensors[f"state_dict.{name}"] = value
    optimizers = []
    for number, saved in enumerate(checkpoint.get("optimizer_states", [])):
        state: State = {}
        for key, entries in saved["state"].items():
            state[key] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
            for entry in entries.keys() - state[key].keys():
                tensors[f"optimizer_{number}.state.{key}.{entry}"] = entries[entry]
        optimizers.append({**saved, "state": state})
    rest = {**checkpoint, "state_dict": weights, "tied": tied}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = optimizers
    return tensors, rest


def join(tensors: dict[str, Tensor], rest: State) -> State:
    """The checkpoint from the two parts that ``split`` returned. ``rest`` is changed."""
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    tied = rest.pop("tied")
    rest["state_dict"] = {**rest["state_dict"], **weights, **{name: weights[first] for name, first in tied.items()}}
    for key, value in tensors.items():
        if key.startswith("optimizer_"):
            optimizer, _, number, entry = key.split(".", 3)
            state = rest["optimizer_states"][int(optimizer.removeprefix("optimizer_"))]["state"]
            state[int(number)][entry] = value
    return rest


def room(metadata: Metadata, model: nn.Module | None, optimizers: list[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Tensors to load into, by key: one for each saved tensor that is wanted.

    ``model``: None if weights are not wanted. ``optimizers``: empty if their states are not wanted.
    """
    owners: dict[str, Tensor] = {}
    if model is not None:
        owners.update((f"state_dict.{name}", x) for name, x in model.state_dict().items() if isinstance(x, Tensor))
    for i, optimizer in enumerate(optimizers):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        owners.update((f"optimizer_{i}.state.{j}", p) for j, p in enumerate(params))
    for key, saved in metadata.state_dict_metadata.items():
        if isinstance(saved, BytesStorageMetadata):
            continue
        assert isinstance(saved, TensorStorageMetadata)
        is_state = key.startswith("optimizer_")
        if is_state and model is not None and not optimizers:
            continue
        owner = owners.get(".".join(key.split(".", 3)[:3]) if is_state else key)
        yield key, _room_like(owner, saved.size, saved.properties.dtype)


def _room_like(owner: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of global shape ``size``: a DTensor placed as its owner if both have the same rows; otherwise a whole
    tensor."""
    if isinstance(owner, DTensor) and size and size[0] == owner.shape[0] and is_cut_by_rows(owner):
        local = owner.to_local()
        return shards.leave(owner, torch.zeros((local.shape[0], *size[1:]), dtype=dtype, device=local.device), size)
    return torch.zeros(size, dtype=dtype)


def is_cut_by_rows(p: DTensor) -> bool:
    return all(isinstance(place, Replicate) or (type(place) is Shard and place.dim == 0) for place in p.placements)
