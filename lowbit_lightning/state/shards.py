"""DTensors in, local shards out: what the state store knows of ``torch.distributed``.

The block grid belongs to the parameter: cutting along dimension 0 never cuts a block. So a parameter that is sharded
as ``Shard(0)`` has codes and scales that are ``Shard(0)`` too, on the same mesh, and any number of ranks reads what
any other wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(p: Tensor, part: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor of global ``shape``, placed as p is, from this rank's part; the part itself for a plain p."""
    if not isinstance(p, DTensor):
        return part
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def part_of(p: Tensor, value: Tensor) -> Tensor:
    """This rank's part, as p is placed, of a tensor of global shape: a DTensor, or a plain tensor that every rank
    has."""
    if isinstance(value, DTensor):
        if not isinstance(p, DTensor):
            return value.full_tensor()
        return value.redistribute(p.device_mesh, p.placements).to_local()
    if not isinstance(p, DTensor):
        return value
    for mesh_dim, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            pieces = value.chunk(p.device_mesh.size(mesh_dim), placement.dim)
            rank = p.device_mesh.get_local_rank(mesh_dim)
            value = pieces[rank] if rank < len(pieces) else value.narrow(placement.dim, 0, 0)
    return value


def keeps_grid(p: Tensor) -> bool:
    """Whether p's placement cuts no block: plain, replicated, or cut once along dimension 0 of at least two.

    Anything else (Shard(1), strided or nested shards, a sharded vector) keeps its state in 32 bits.
    """
    if not isinstance(p, DTensor):
        return True
    cuts = [placement for placement in p.placements if not isinstance(placement, Replicate)]
    return not cuts or (len(cuts) == 1 and type(cuts[0]) is Shard and cuts[0].dim == 0 and p.ndim >= 2)


def first_index(p: Tensor) -> int:
    """The global index of this rank's first element, for a placement that ``keeps_grid``; 0 otherwise."""
    if not isinstance(p, DTensor) or not keeps_grid(p):
        return 0
    rows = p.shape[0] if p.ndim else 1
    for mesh_dim, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            share = -(-rows // p.device_mesh.size(mesh_dim))  # torch.chunk's
            return min(rows, share * p.device_mesh.get_local_rank(mesh_dim)) * prod(p.shape[1:])
    return 0


def sum_over_shards(params: Sequence[Tensor], sums: Tensor) -> Tensor:
    """``sums[i]`` added up over the ranks that hold different parts of ``params[i]``; in place.

    A collective: every rank of a mesh calls it with the same parameters in the same order.
    """
    for group, indices in _groups(params).items():
        part = sums[indices]
        dist.all_reduce(part, group=group)
        sums[indices] = part
    return sums


def any_rank(params: Sequence[Tensor], flag: Tensor) -> Tensor:
    """The largest ``flag`` (one float) of all ranks that hold parts of ``params``; in place. A collective, as
    above."""
    for group in _groups(params):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return flag


def _groups(params: Sequence[Tensor]) -> dict[dist.ProcessGroup, list[int]]:
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, DTensor):
            for mesh_dim, placement in enumerate(p.placements):
                if isinstance(placement, Shard):
                    groups.setdefault(p.device_mesh.get_group(mesh_dim), []).append(i)
    return groups
