"""The planner's bytes of optimizer states, of any shape and optimizer, paged or not, against real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ranks import being_rank
from support.optimizers import FAMILY
from support.planned_memory import Odd, on_meta, own, states_of, stepped
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lowbit_lightning import memory, optim
from lowbit_lightning.state.pages import Entries, Pager

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILY},
    "momentum": ("SGD", {"momentum": 0.9}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
    "centered": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "small blocks": ("AdamW", {"block_size": 32, "min_size": 100}),
    "32 bits": ("Lion", {"bits": 32}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_odd_shapes(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    taken = states_of(stepped(getattr(optim, kind)(Odd().parameters(), **options)))
    assert memory.plan(on_meta(Odd), optimizer=kind, **options).states == taken


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax"])
def test_states_of_torchs_optimizers(kind: str) -> None:
    cls = getattr(torch.optim, kind)
    taken = states_of(stepped(cls(p for p in Odd().parameters() if p.requires_grad)))
    assert memory.plan(on_meta(Odd), optimizer=kind, bits=None).states == taken
    assert memory.plan(on_meta(Odd), optimizer=cls).states == taken


@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    min_size=st.integers(0, 5000),
    block_size=st.sampled_from([32, 64, 256]),
)
@settings(max_examples=40, deadline=None)
def test_states_of_any_shape(shape: list[int], min_size: int, block_size: int) -> None:
    module = nn.ParameterList([torch.zeros(shape)])
    options = {"min_size": min_size, "block_size": block_size}
    taken = states_of(stepped(optim.AdamW(module.parameters(), **options)))  # type: ignore[arg-type]
    planned = memory.plan(module, **options)  # type: ignore[arg-type]
    assert planned.states == taken == sum(planned.state_parts.values())


def test_an_instance_is_planned_with_its_own_groups() -> None:
    model = Odd()
    grouped = optim.group_parameters(model, {"tall*": {"bits": 32}, "few*": {"block_size": 64}})
    optimizer = optim.AdamW(grouped)
    assert memory.plan(model, optimizer=optimizer).states == states_of(stepped(optimizer))


def pager_of(optimizer: optim.LowBitOptimizer) -> Pager:
    (pager,) = {e.pager for e in optimizer.state.values() if isinstance(e, Entries)}
    return pager


def page_tensors(optimizer: optim.LowBitOptimizer) -> dict[str, int]:
    """What a paged optimizer holds: its near memory and its file, by the pager's own tensors, and all other states."""
    entries, pager = list(optimizer.state.values()), pager_of(optimizer)
    rest = [e[name] for e in entries for name in e if not (isinstance(e, Entries) and e.is_paged(name))]
    return {
        "pages": sum({slot.memory.data_ptr(): slot.memory.nbytes for slot in pager._slots}.values()),
        "disk": pager._slab.nbytes,
        "rest": sum(own(x).nbytes for x in rest if isinstance(x, Tensor)),
    }


PAGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("Adam", "AdamW", "Adagrad", "Lion", "LAMB", "LARS", "AdEMAMix")},
    "32 bits": ("AdamW", {"bits": 32}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "some resident": ("AdamW", {"resident": "100KiB"}),
    "most resident": ("AdamW", {"bits": 32, "resident": 1_200_000}),
    "all resident": ("RMSprop", {"resident": "1GiB"}),
    "small blocks": ("AdamW", {"block_size": 32, "min_size": 100}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")
@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT")
@pytest.mark.parametrize("name", PAGED)
def test_paged_states(name: str, page_dir: Path) -> None:
    kind, options = PAGED[name]
    optimizer = getattr(optim, kind)(Odd().parameters(), paged="disk", page_dir=str(page_dir), **options)
    taken = page_tensors(stepped(optimizer))  # type: ignore[arg-type]
    planned = memory.plan(on_meta(Odd), optimizer=kind, paged="disk", **options)
    assert planned.paged_out == {"disk": taken["disk"]}
    assert planned.state_parts["pages"] == taken["pages"] == optimizer.page_statistics().near_bytes
    assert planned.states == taken["pages"] + taken["rest"]
    on_host = memory.plan(on_meta(Odd), optimizer=kind, paged=True, **options)
    assert (on_host.states, on_host.paged_out) == (planned.states, {"host memory": taken["disk"]})


@pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")
@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT")
@pytest.mark.parametrize("bits", [8, 32])
def test_paged_shards(bits: int, page_dir: Path) -> None:
    planned = memory.plan(on_meta(Odd), world_size=3, strategy="sharded", paged="disk", bits=bits)
    twin = memory.plan(Odd(), world_size=3, strategy="sharded", paged="disk", bits=bits, optimizer=torch.optim.AdamW)
    with being_rank(0, (3,)) as mesh:
        model = Odd()
        fully_shard(model, mesh=mesh)
        optimizer = optim.AdamW(model.parameters(), bits=bits, paged="disk", page_dir=str(page_dir))
        taken = page_tensors(stepped(optimizer))  # type: ignore[arg-type]
    assert planned.paged_out == twin.paged_out == {"disk": taken["disk"]}
    assert planned.states == twin.states == taken["pages"] + taken["rest"]


@pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")
@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT")
@pytest.mark.parametrize("bits", [8, 32])
def test_a_tenth_stays_near(bits: int, page_dir: Path) -> None:
    """With a budget of a tenth, near memory is at most the budget and three chunks, here and in the plan."""
    model = nn.ModuleList(nn.Linear(512, 512) for _ in range(40))
    states = 40 * 512 * 513 * 2 * (1 if bits == 8 else 4)
    budget, largest = states // 10, 2**20
    optimizer = optim.AdamW(model.parameters(), bits=bits, paged="disk", resident=budget, page_dir=str(page_dir))
    taken = page_tensors(stepped(optimizer))  # type: ignore[arg-type]
    planned = memory.plan(model, bits=bits, paged="disk", resident=budget)
    scales_and_steps = planned.state_parts.get("scales", 0) + planned.state_parts["steps"]
    assert taken["pages"] == planned.state_parts["pages"]
    assert taken["pages"] <= budget + 3 * max(c.moves.nbytes for c in pager_of(optimizer).chunks if not c.resident)
    assert taken["pages"] < states / 2
    assert taken["rest"] == scales_and_steps + (planned.state_parts.get("32-bit", 0))
    assert states <= taken["disk"] < 1.01 * states + largest
