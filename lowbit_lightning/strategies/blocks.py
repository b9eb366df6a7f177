"""What of a model to shard together, and how to do it: FSDP2's ``fully_shard`` on repeated blocks and the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

Policy = Callable[[str, nn.Module], bool]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_blocks(module: nn.Module) -> list[str]:
    """The names of a model's repeated blocks: the outermost modules that have children and parameters, and stand in a
    ``ModuleList``, ``ModuleDict`` or ``Sequential`` beside another of their class."""
    found: list[str] = []
    for name, container in module.named_modules():
        if not isinstance(container, _CONTAINERS) or any(name.startswith(f"{block}.") for block in found):
            continue
        kinds = Counter(type(child) for child in container.children())
        for child_name, child in container.named_children():
            if kinds[type(child)] > 1 and any(child.children()) and any(True for _ in child.parameters()):
                found.append(f"{name}.{child_name}" if name else child_name)
    return found


def chosen_blocks(module: nn.Module, policy: Policy | None) -> list[str]:
    """What the policy says yes to, or the repeated blocks; innermost first, since that is how they are sharded.

    Modules that share a parameter with something outside of them are left to the root.
    """
    if policy is None:
        names = repeated_blocks(module)
    else:
        names = [name for name, child in module.named_modules() if name and policy(name, child)]
        if not names:
            raise ValueError(
                "policy chose no module to shard; it is asked policy(name, module) for each of the model's "
                f"{sum(1 for _ in module.modules())} modules, by names as in model.named_modules()"
            )
    owners: dict[Tensor, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        owners.setdefault(p, []).append(name)
    shared = [users for users in owners.values() if len(users) > 1]

    def stands_alone(block: str) -> bool:
        inside = ([user.startswith(f"{block}.") for user in users] for users in shared)
        return all(all(users) or not any(users) for users in inside)

    return sorted(filter(stands_alone, names), key=lambda name: -name.count("."))


def shard(
    module: nn.Module, names: list[str], mesh: DeviceMesh, reshard_after_forward: bool | int, **options: Any
) -> None:
    """``fully_shard`` the named modules and the root, in place. The root's own parameters stay gathered between
    forward and backward."""
    for name in names:
        fully_shard(module.get_submodule(name), mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, **options)


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
