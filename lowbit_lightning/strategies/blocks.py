"""Which modules of a model are sharded together, and how: FSDP2's ``fully_shard`` on repeated blocks and the root."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def needs_torch(version: str, what: str, why: str) -> None:
    """Raise RuntimeError for what an older torch cannot do, before it fails half-way or in silence."""
    if torch.__version__ < version:
        raise RuntimeError(f"{what} needs torch {version} or newer, this is {torch.__version__}: {why}")


def shard(
    module: nn.Module,
    names: list[str],
    mesh: DeviceMesh,
    reshard_after_forward: bool | int,
    reshard_root: bool = False,
    **options: Any,
) -> None:
    """``fully_shard`` the named modules and the root, in place. The root's own parameters stay gathered between
    forward and backward, unless ``reshard_root``."""
    whole = [name for name, p in module.named_parameters() if not p.is_floating_point()]
    if whole:
        needs_torch("2.8", f"sharding the low-bit weight {whole[0]}", "fully_shard takes no integers before")
    for name in names:
        fully_shard(module.get_submodule(name), mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_root, **options)
    if reshard_root and torch.__version__ < "2.8":  # there FSDP2 keeps a root gathered (pytorch/pytorch#154704)
        module.register_forward_hook(lambda root, *_: root.reshard())
    average_gradients(module, mesh)
    _keep_dtypes(module)


def _keep_dtypes(module: nn.Module) -> None:
    """Let gradients of parameters that are frozen in the first forward have the dtypes of others when they train later.

    FSDP2 notes in the first forward in which dtype a part's gradients are reduced and kept, but only if a parameter of
    the part needs a gradient then. A part that is unfrozen later, or had no turn (``toggle_optimizer``), would reduce
    its gradients in the dtype that they were gathered in, and could not assign them.
    """
    for part in (child for child in module.modules() if isinstance(child, FSDPModule)):
        state: Any = part._get_fsdp_state()  # FSDP2 has no public way to the groups of parameters
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is not None:
                group._init_mp_dtypes = partial(_note_dtypes, group)


def _note_dtypes(group: Any) -> None:
    type(group)._init_mp_dtypes(group)
    dtypes = {(p.orig_dtype, p.reduce_dtype) for p in group.fsdp_params if p.orig_dtype.is_floating_point}
    if group._orig_dtype is None and len(dtypes) == 1:
        ((group._orig_dtype, group._reduce_dtype),) = dtypes


def average_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let the gradients of a sharded module be means over the ranks under gloo too.

    FSDP2 asks reduce_scatter for the average. gloo of torch 2.7 and 2.8 gives the sum, and says nothing
    (pytorch/pytorch#162338). Where a small collective shows that, the sum is divided after it.
    """
    ranks = mesh.size(mesh.ndim - 1)
    if mesh.device_type != "cpu" or ranks == 1 or torch.__version__ >= "2.13":
        return
    found, group = torch.empty(1, dtype=torch.float32), mesh.get_group(mesh.ndim - 1)
    dist.reduce_scatter_tensor(found, torch.ones(ranks, dtype=torch.float32), op=dist.ReduceOp.AVG, group=group)
    if found.item() != 1:
        for part in (child for child in module.modules() if isinstance(child, FSDPModule)):
            part.set_all_reduce_hook(lambda total: total.div_(ranks))  # type: ignore[arg-type, return-value]


def roots(module: nn.Module) -> list[str]:
    """The names of the outermost submodules that can be called and have parameters: what a LightningModule calls in a
    step of manual optimization, each sharded as a separate model.

    Raises:
        ValueError: for parameters of the module itself, or of two of these: nothing would gather them.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"under manual optimization lowbit_sharded gathers the parameters of the modules that a step calls; "
            f"{', '.join(own)} of {type(module).__name__} itself would stay cut: put it into a module"
        )
    found = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [f"{name}.{inner}" for inner in roots(child)]
        elif any(True for _ in child.parameters()):
            found.append(name)
    users: dict[Tensor, str] = {}
    for name in found:
        for p in module.get_submodule(name).parameters():
            if users.setdefault(p, name) != name:
                raise ValueError(
                    f"under manual optimization lowbit_sharded gathers {users[p]} and {name} one by one, but they "
                    "share a parameter: put both into one module that the step calls, or use automatic optimization"
                )
    return found


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(child, FSDPModule) for child in module.modules())


def on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _tensors(module))


def start_equal(module: nn.Module, device: torch.device) -> None:
    """Give every rank the parameters and buffers of rank 0, one at a time: ranks need not share a seed."""
    for tensor in _tensors(module):
        values = tensor.detach().to(device).contiguous()
        dist.broadcast(values, src=0)
        tensor.detach().copy_(values)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
