"""The shards' index arithmetic against torch.chunk and DTensor's own, for every rank, in one process.

torch's fake process group lets this process be any rank of any world; nothing is sent. What is sent is tested on real
ranks in ``tests/state/test_sharded.py``.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ranks import being_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import Form
from lowbit_lightning.state.store import Store

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def chunk(x: Tensor, pieces: int, index: int, dim: int) -> Tensor:
    parts = x.chunk(pieces, dim)
    return parts[index] if index < len(parts) else x.narrow(dim, 0, 0)


def cut(x: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            x = chunk(x, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim), placement.dim)
    return x


def sharded(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    part = cut(whole, mesh, placements).contiguous()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


@given(shape=shapes, world=st.integers(1, 7), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_cut_as_torch_cuts_them(shape: tuple[int, ...], world: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    whole = torch.arange(prod(shape)).view(shape)
    with being_rank(rank, (world,)) as mesh:
        p = sharded(whole, mesh, (Shard(0),))
        part = shards.part_of(p, whole)
        local_shape, offset = compute_local_shape_and_global_offset(shape, mesh, (Shard(0),))
        assert torch.equal(part, chunk(whole, world, rank, 0))
        assert torch.equal(part, shards.local(p))
        assert part.shape == tuple(local_shape)
        assert shards.first_index(p) == offset[0] * prod(shape[1:])
        assert not part.numel() or shards.first_index(p) == int(part.flatten()[0])
        assert shards.keeps_grid(p) == (len(shape) >= 2)
        assert shards.leave(p, part, shape).shape == whole.shape


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mesh_shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    placements=st.tuples(*[st.sampled_from([Replicate(), Shard(0), Shard(1)])] * 2),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_two_mesh_dimensions(
    shape: tuple[int, int], mesh_shape: tuple[int, int], placements: tuple[Placement, ...], data: st.DataObject
) -> None:
    """Replicated and sharded (HSDP) keeps the grid; shards of shards, and shards along rows, do not."""
    rank = data.draw(st.integers(0, prod(mesh_shape) - 1))
    whole = torch.arange(prod(shape)).view(shape)
    cuts = [x for x in placements if isinstance(x, Shard)]
    rows_once = cuts == [Shard(0)]
    with being_rank(rank, mesh_shape) as mesh:
        p = sharded(whole, mesh, placements)
        part = shards.part_of(p, whole)
        assert torch.equal(part, cut(whole, mesh, placements))
        assert shards.keeps_grid(p) == (rows_once or not cuts)
        first = int(part.flatten()[0]) if part.numel() else whole.numel()
        assert shards.first_index(p) == (first if rows_once else 0)


@given(rows=st.integers(1, 12), length=st.integers(1, 200), pieces=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_cutting_rows_cuts_no_block(rows: int, length: int, pieces: int) -> None:
    """Quantising the pieces is cutting what is quantised: principle 1."""
    x = torch.randn(rows, length)
    codes, scales = kernels.quantize_blockwise(x, "dynamic_signed", 32)
    for i in range(pieces):
        mine = kernels.quantize_blockwise(chunk(x, pieces, i, 0).contiguous(), "dynamic_signed", 32)
        assert torch.equal(mine[0], chunk(codes, pieces, i, 0))
        assert torch.equal(mine[1], chunk(scales, pieces, i, 0))


def test_strided_shards_stay_in_32_bits_and_take_no_plain_tensor() -> None:
    """FSDP2 over tensor parallelism: which rows a rank has is torch's affair."""
    with being_rank(1, (2, 2)) as mesh:
        placements = (_StridedShard(0, split_factor=2), Shard(0))
        local = torch.zeros(2, 100)
        p = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size((8, 100)), stride=(100, 1))
        assert not shards.keeps_grid(p)
        assert shards.first_index(p) == 0
        with pytest.raises(ValueError, match=r"a plain tensor cannot be cut as a parameter placed as .*_StridedShard"):
            shards.part_of(p, torch.zeros(8, 100))
        assert len(shards._groups([p])) == 2  # both cuts count where norms are summed


def test_replicated_parameters_have_no_group_to_sum_over() -> None:
    with being_rank(1, (3,)) as mesh:
        p = sharded(torch.zeros(4, 100), mesh, (Replicate(),))
        assert shards.keeps_grid(p)
        assert not shards._groups([p])


def test_a_plain_tensor_is_its_own_part() -> None:
    p = nn.Parameter(torch.zeros(4, 100))
    x = torch.ones(4, 100)
    assert shards.part_of(p, x) is x
    assert shards.leave(p, x, x.shape) is x
    assert shards.full(x) is x
    assert shards.first_index(p) == 0
    assert shards.keeps_grid(p)


@given(shape=shapes, world=st.integers(1, 5), data=st.data())
@settings(max_examples=30, deadline=None)
def test_states_are_created_where_the_parameter_is(shape: tuple[int, ...], world: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    with being_rank(rank, (world,)) as mesh:
        p = sharded(torch.zeros(shape), mesh, (Shard(0),))
        bits = 8 if shards.keeps_grid(p) else 32
        form = Form(rules.get("lion"), (bits,), 32)
        state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        given = Store(state).give(p, form, lambda: [(p, form)])
        assert given.kept.keys() == state[p].keys()
        assert not any(isinstance(x, DTensor) for x in given.kept.values())
        state[p].pop("step")
        for name, x in state[p].items():
            assert isinstance(x, DTensor)
            assert x.placements == p.placements
            wanted = BlockGrid.of(shape, 32).scales_shape if name.endswith("scales") else shape
            assert tuple(x.shape) == tuple(wanted)
            assert x.to_local().shape[0] == p.to_local().shape[0]


def test_what_lies_beside_its_mesh_is_gathered_there() -> None:
    """A paged state's part is in host memory, where the group of a GPU's mesh has no collectives."""
    with being_rank(0, (2,)):
        mesh = init_device_mesh("meta", (2,))
        owner = DTensor.from_local(torch.zeros(2, 3, device="meta"), mesh, (Shard(0),), run_check=False)
        value = shards.leave(owner, torch.zeros(2, 3), owner.shape, stays=True)
        assert shards.local(value).device.type == "cpu"
        whole = shards.full(value)
        assert (tuple(whole.shape), whole.device.type) == ((4, 3), "meta")
        same = DTensor.from_local(torch.zeros(4, 3, device="meta"), mesh, (Replicate(),), run_check=False)
        assert shards.part_of(same, value).device.type == "meta"
