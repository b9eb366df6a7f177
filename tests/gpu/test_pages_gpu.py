"""Paged states on a GPU: the numbers of unpaged ones, nothing allocated, nobody waiting. `make gpu` runs it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lowbit_lightning import optim
from lowbit_lightning.state.pages import Entries, cuda, layout

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
SHAPES = [(96, 300), (700, 256), (5000,), (33,), (2000, 512), (3, 100, 64), (1_500_001,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(GPU, dtype)) for shape in SHAPES]


def steps(params: list[Parameter], optimizer: Any, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator(GPU).manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device=GPU).to(p.dtype)
        optimizer.step()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK", 200_000)
    monkeypatch.setattr(layout, "SMALLEST", 4096)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("resident", [0, "500KB"])
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("AdamW", torch.float32, {}),
        ("AdamW", torch.float32, {"bits": 32}),
        ("LAMB", torch.float32, {}),
        ("AdEMAMix", torch.bfloat16, {"stochastic_rounding": True}),
        ("AdamW", torch.bfloat16, {"master": "bf16+8"}),
    ],
)
def test_equal_to_the_bit(kind: str, dtype: torch.dtype, options: dict[str, Any], resident: int | str) -> None:
    plain, paged = parameters(dtype), parameters(dtype)
    theirs = getattr(optim, kind)(plain, **options)
    ours = getattr(optim, kind)(paged, paged=True, resident=resident, **options)
    for numbers in (range(4), range(4, 8)):
        steps(plain, theirs, numbers)
        steps(paged, ours, numbers)
        assert all(isinstance(ours.state[p], Entries) for p in paged)
        saved, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
        for key, entries in expected.items():
            for name, value in entries.items():
                assert torch.equal(saved[key][name].cpu(), value.cpu()), (key, name)
    assert all(torch.equal(p, q) for p, q in zip(plain, paged, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_a_steady_step_neither_allocates_nor_waits() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, paged=True, resident="300KB")
    steps(params, optimizer, range(3))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_reserved() == reserved
    statistics = optimizer.page_statistics()
    assert statistics is not None
    assert statistics.near_bytes <= 300_000 + 3 * 200_000


def test_states_stay_in_host_memory() -> None:
    """Ten times the ring: what a step leaves on the device is the budget, the ring and the scales."""
    p = Parameter(torch.zeros(20_000, 10_240, device=GPU))
    p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = optim.AdamW([p], paged=True)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    scales = 2 * 4 * p.numel() // 256
    assert torch.cuda.max_memory_allocated() - before <= 3 * layout.CHUNK + scales + (4 << 20)
    saved = optimizer.state_dict()["state"][0]
    assert saved["exp_avg_codes"].device.type == "cpu"
    assert torch.cuda.max_memory_allocated() - before <= 3 * layout.CHUNK + scales + (4 << 20)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # beside threads, from 3.12
def test_the_slab_is_no_burden_to_a_fork() -> None:
    """A child finds none of it; the parent's copies go on."""
    params, plain = parameters(), parameters()
    ours, theirs = optim.AdamW(params, paged=True), optim.AdamW(plain)
    steps(params, ours, range(2))
    codes = ours.state[params[4]]["exp_avg_codes"]
    child = os.fork()
    if not child:
        os._exit(int(codes.numpy().any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    steps(params, ours, range(2, 4))
    steps(plain, theirs, range(4))
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_memory_that_cannot_be_pinned_is_an_error_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = cuda.CudaTransport(GPU)
    slab = transport.allocate(1 << 20)
    monkeypatch.setattr(cuda, "aligned", lambda _: slab)
    with pytest.raises(RuntimeError, match="pinned host memory"):  # it is pinned already
        cuda.CudaTransport(GPU).allocate(1 << 20)
    assert torch.arange(4, device=GPU).sum() == 6


@pytest.mark.usefixtures("small_chunks")
def test_kernels_from_two_streams_in_one_chunk() -> None:
    """Parameters that share a chunk, updated one by one from streams in turns, as backward may."""
    results = []
    for paged in (False, True):
        params = [Parameter(torch.ones(64, 256, device=GPU)) for _ in range(12)]
        optimizer = optim.AdamW(params, lr=0.1, paged=paged)
        sides = [torch.cuda.Stream(GPU) for _ in range(2)]
        for number in range(4):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, float(i + number))
            torch.cuda.synchronize()
            for i, p in enumerate(params):
                with torch.cuda.stream(sides[i % 2]):
                    optimizer.step_parameter(p, optimizer.param_groups[0], i)
                p.grad = None
            torch.cuda.synchronize()
            optimizer.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
