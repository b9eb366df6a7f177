"""Every optimizer paged on a GPU, and a trace of a step: no call in it waits or allocates. `make gpu` runs it."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import FAMILY
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile, record_function

from lowbit_lightning import optim

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
SHAPES = ((640, 700), (300,), (1280, 512), (5, 33), (3000, 256), (64, 64))
WAITS = ("Synchronize", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cuMemAlloc", "cuMemFree")


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(GPU)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def trained(optimizer: torch.optim.Optimizer, steps: int = 6) -> list[Tensor]:
    """Parameters and states behind some steps whose gradients are on the device at once: nothing waits in between."""
    params = optimizer.param_groups[0]["params"]
    for number in range(steps):
        generator = torch.Generator(GPU).manual_seed(number)
        for p in params:
            p.grad.normal_(generator=generator)
        optimizer.step()
    return [*params, *(value for p in params for _, value in sorted(dict(optimizer.state[p]).items()))]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", FAMILY)
def test_paged_is_unpaged_to_the_bit(kind: str, bits: int) -> None:
    make, options = getattr(optim, kind), {**FAMILY[kind], "lr": 0.01, "bits": bits}
    expected = trained(make(parameters(), **options))
    for resident in (0, "1MiB", "1GiB"):
        found = trained(make(parameters(), paged=True, resident=resident, **options))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.cpu(), theirs.cpu()), (resident, tuple(ours.shape))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_step_does_not_wait_and_does_not_allocate(bits: int) -> None:
    params = parameters(((4096, 4096),) * 8)
    optimizer = optim.AdamW(params, bits=bits, paged=True)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function("measured"):
            optimizer.step()
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.synchronize()  # this one, and the profiler's own, are behind what is measured
    events = recorded.events()
    assert events is not None
    measured = next(e for e in events if e.name == "measured").time_range
    inside = [e.name for e in events if measured.start <= e.time_range.start <= measured.end]
    assert any("emcpy" in name for name in inside), "the trace shows no copies"
    assert [name for name in inside if any(part in name for part in WAITS)] == []
    assert after == before
