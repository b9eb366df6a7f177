"""The two doors of the store: DTensors that enter become local tensors, and local tensors that leave become DTensors.

No other file of the states uses ``torch.distributed``.

The block grid belongs to the parameter, and a cut along dimension 0 never cuts a block. So if a parameter is sharded as
``Shard(0)``, its codes and scales are ``Shard(0)`` on the same mesh. Any number of ranks can read what any other number
of ranks wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, with any placement."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; other tensors are returned unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """The whole DTensor, gathered from the ranks that share it; other tensors are returned unchanged."""
    return _on_mesh(x).full_tensor() if isinstance(x, DTensor) else x


def _on_mesh(x: DTensor) -> DTensor:
    """x with its local part on the mesh's device, where collectives work: a paged state may lie in host memory."""
    part = x.to_local()
    return x if part.device.type == x.device_mesh.device_type else leave(x, part, x.shape)  # type: ignore


def enter(p: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part of a tensor, as ``part_of`` cuts it, contiguous, on p's device."""
    return part_of(p, value).to(device=local(p).device, dtype=dtype).contiguous()


def moved(p: Tensor, value: Any) -> Any:
    """A copy of an entry of p on p's device. A DTensor stays a DTensor."""
    if not isinstance(value, Tensor):
        return value
    part = local(value).to(local(p).device, copy=True)
    return leave(p, part, value.shape) if is_sharded(value) else part


def leave(p: Tensor, part: Tensor, shape: Sequence[int], stays: bool = False) -> Tensor:
    """A DTensor of global ``shape`` with p's placements, made from this rank's part. For a plain p: the part itself.

    ``stays``: the part is not moved to the mesh's device. It may lie in the host memory of a GPU's rank.
    """
    if not isinstance(p, DTensor):
        return part
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    stays = stays and part.device.type != p.device_mesh.device_type
    made = DTensor.from_local(
        part.to("meta") if stays else part,  # from_local moves all but this to the mesh's device
        *(p.device_mesh, p.placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )
    return DTensor(part, made._spec, requires_grad=False) if stays else made  # type: ignore[call-arg]


def part_of(p: Tensor, value: Tensor) -> Tensor:
    """This rank's part of ``value``, cut as p is.

    ``value``: a DTensor, or a plain tensor that every rank has; of p's shape, or with one row for each row of p.

    Raises:
        ValueError: for a plain tensor where p is neither replicated nor sharded in plain chunks.
    """
    if isinstance(value, DTensor):
        if not isinstance(p, DTensor):
            return full(value)
        if value.placements != p.placements:  # a gradient may be Partial, a saved state replicated
            value = _on_mesh(value).redistribute(p.device_mesh, p.placements)
        return value.to_local()
    if not isinstance(p, DTensor):
        return value
    part = value
    for mesh_dim, placement in enumerate(p.placements):
        if type(placement) is not Shard and not isinstance(placement, Replicate):
            raise ValueError(
                f"a plain tensor cannot be cut as a parameter placed as {p.placements}; load the checkpoint as "
                "DTensors, by torch.distributed.checkpoint"
            )
        if type(placement) is Shard:
            pieces = part.chunk(p.device_mesh.size(mesh_dim), placement.dim)
            rank = p.device_mesh.get_local_rank(mesh_dim)
            part = pieces[rank] if rank < len(pieces) else part.narrow(placement.dim, 0, 0)
    return part if part is value else part.clone()  # a view would keep all of the value in memory


def _row_cut(p: DTensor) -> int | None:
    """The mesh dimension that p's rows are sharded over, if p is sharded in no other way; otherwise None."""
    cuts = [i for i, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
    if len(cuts) != 1:
        return None
    placement = p.placements[cuts[0]]
    return cuts[0] if type(placement) is Shard and placement.dim == 0 else None


def keeps_grid(p: Tensor) -> bool:
    """Whether p's placement cuts no block: p is plain, replicated, or a matrix that is cut once along dimension 0.

    With any other placement (Shard(1), strided or nested shards, a sharded vector) the state stays in 32 bits.
    """
    if not isinstance(p, DTensor) or all(isinstance(placement, Replicate) for placement in p.placements):
        return True
    return _row_cut(p) is not None and p.ndim >= 2


def first_index(p: Tensor) -> int:
    """The global index of this rank's first element if p is cut once along dimension 0; otherwise 0."""
    cut = _row_cut(p) if isinstance(p, DTensor) else None
    if cut is None:
        return 0
    assert isinstance(p, DTensor)
    share = -(-p.shape[0] // p.device_mesh.size(cut))  # torch.chunk's
    return min(p.shape[0], share * p.device_mesh.get_local_rank(cut)) * prod(p.shape[1:])


def mark_changed(params: Sequence[Tensor]) -> None:
    """Bump the version counters of DTensors whose local parts a kernel has written: autograd looks at theirs."""
    changed = [p for p in params if isinstance(p, DTensor)]
    if changed:
        torch.autograd.graph.increment_version(changed)


def sum_over_shards(params: Sequence[Tensor], sums: Tensor) -> Tensor:
    """``sums[i]`` added up over the ranks that hold different parts of ``params[i]``; in place.

    A collective: every rank of a mesh calls it with the same parameters in the same order.
    """
    for group, indices in _groups(params).items():
        runs = [sums[first : last + 1] for first, last in _runs(indices)]  # an index list would wait for the host
        part = torch.cat(runs)
        dist.all_reduce(part, group=group)
        for run, summed in zip(runs, part.split([len(run) for run in runs]), strict=True):
            run.copy_(summed)
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
                if not isinstance(placement, Replicate):
                    groups.setdefault(p.device_mesh.get_group(mesh_dim), []).append(i)
    return groups


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    firsts = [i for i, before in zip(indices, (None, *indices), strict=False) if before is None or i != before + 1]
    lasts = [i for i, after in zip(indices, (*indices[1:], None), strict=True) if after is None or after != i + 1]
    return list(zip(firsts, lasts, strict=True))
