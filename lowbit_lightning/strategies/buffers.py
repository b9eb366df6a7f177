"""Buffers of a sharded model: FSDP2 cuts and casts parameters, but not buffers.

Equal on all ranks
    Each rank updates buffers from its own batches (BatchNorm's running statistics), so they would drift apart. As under
    DDP, all ranks use the buffers of rank 0: every rank takes them before the next forward.

Computed with in their own dtype
    Parameters may be gathered in bfloat16 while buffers stay in float32. Most operations promote, or are cast by
    autocast. A few, such as batch_norm, instance_norm and lerp, take one dtype only. So a module that owns both sees
    its own parameters in the wider dtype during its forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

_BUCKET = 256 * 2**20  # bytes that travel in one broadcast, as in DDP


def share(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0; a collective. DTensors do not change."""
    local = [b.detach() for b in module.buffers() if not isinstance(b, DTensor)]
    if local and dist.get_world_size() > 1:
        dist._broadcast_coalesced(dist.group.WORLD, local, _BUCKET, 0)  # type: ignore[arg-type]


def widen(module: nn.Module) -> None:
    """Let all modules that own parameters and buffers compute with both in the wider of their dtypes.

    Call it before ``fully_shard``, whose own hooks then enclose these.
    """
    for child in module.modules():
        dtypes = {b.dtype for b in child.buffers(recurse=_computes_with_children(child)) if b.is_floating_point()}
        if dtypes and any(p.is_floating_point() for p in child.parameters(recurse=False)):
            wide = _Wide(functools.reduce(torch.promote_types, dtypes))
            child.register_forward_pre_hook(wide.enter, prepend=True)  # old spectral_norm has a hook that computes
            child.register_forward_hook(wide.leave, always_call=True)


def check_layer_sync(module: nn.Module, layer_sync: LayerSync | None) -> None:
    """For a module that is sharded already, in which no layer can be replaced any more.

    Raises:
        ValueError: for BatchNorm layers that ``Trainer(sync_batchnorm=True)`` would have to replace.
    """
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    left = [name for name, m in norms.items() if not isinstance(m, nn.SyncBatchNorm)]
    if left and isinstance(layer_sync, TorchSyncBatchNorm):
        raise ValueError(
            f"sync_batchnorm=True, but the model is sharded already, and {left} are not SyncBatchNorm: convert them in "
            "configure_model, before fully_shard, by nn.SyncBatchNorm.convert_sync_batchnorm"
        )


def _computes_with_children(module: nn.Module) -> bool:
    """A parametrization holds the parameter; the buffers are its children's, as spectral_norm's are."""
    return isinstance(module, ParametrizationList)


class _Wide:
    """Replaces a module's own parameters by wider copies while its forward runs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._given: list[dict[str, nn.Parameter | None]] = []

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self._given.append(dict(module._parameters))
        own: dict[str, Any] = module._parameters
        own.update({name: self._widened(p) for name, p in own.items()})

    def leave(self, module: nn.Module, inputs: Any, result: Any) -> None:
        if self._given:  # else an earlier hook has failed
            module._parameters.update(self._given.pop())

    def _widened(self, p: Tensor | None) -> Tensor | None:
        if p is None or not p.is_floating_point():
            return p
        return p.to(torch.promote_types(p.dtype, self._dtype))
