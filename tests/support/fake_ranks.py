"""A process that is any rank of any world: torch's fake process group, whose collectives carry nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def being_rank(rank: int, mesh_shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=rank, world_size=prod(mesh_shape), store=FakeStore())
    try:
        yield init_device_mesh("cpu", mesh_shape)
    finally:
        dist.destroy_process_group()
