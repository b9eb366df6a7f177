"""The optimizers in a CUDA graph: warm-up, capture, replay, against the same steps one by one. `make gpu` runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.optimizers import FAMILY
from torch import Tensor, nn
from torch.nn import Parameter

from lowbit_lightning import optim

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
SHAPES = ((64, 700), (300,), (128, 512), (5, 33))


class Run:
    """An optimizer on a GPU whose gradients, learning rate and scale stay where they are."""

    def __init__(self, kind: str, bits: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.randn(shape).to(GPU)) for shape in SHAPES]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.lr = torch.tensor(0.01, device=GPU)
        self.optimizer = getattr(optim, kind)(self.params, lr=self.lr, bits=bits, **options)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
        self.scaler.scale(torch.zeros((), device=GPU))

    def prepare(self, number: int) -> None:
        """Gradients of a step, scaled; the third overflows. The rate changes as a scheduler changes it."""
        generator = torch.Generator().manual_seed(number)
        for i, p in enumerate(self.params):
            g = torch.randn(p.shape, generator=generator) * 1024
            if number % 4 == 3 and i == 1:
                g[7] = torch.inf
            p.grad.copy_(g)  # type: ignore[union-attr]
        self.lr.fill_(0.01 / (1 + number))
        self.scaler._scale.fill_(1024.0)  # type: ignore[union-attr]

    def step(self) -> None:
        """Unscaled, clipped, and skipped after an overflow, all on the device."""
        self.optimizer.clip_next_step(0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(x for p in self.params for x in self.optimizer.state[p].values())]


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of one step, after a warm-up of two on a side stream, as torch asks for."""
    side = torch.cuda.Stream(GPU)
    side.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(side):
        for number in range(2):
            run.prepare(number)
            run.step()
    torch.cuda.current_stream(GPU).wait_stream(side)
    torch.cuda.synchronize(GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step()
    return graph


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", FAMILY)
def test_replays_are_steps(kind: str, bits: int) -> None:
    """Bit for bit; other work between replays takes whatever memory is free."""
    loop, graphed = Run(kind, bits, **FAMILY[kind]), Run(kind, bits, **FAMILY[kind])
    for number in range(2):
        loop.prepare(number)
        loop.step()
    graph = captured(graphed)
    for number in range(2, 9):
        loop.prepare(number)
        loop.step()
        graphed.prepare(number)
        junk = [torch.full((1 << 14,), 7, device=GPU) for _ in range(20)]
        graph.replay()
        assert len(junk) == 20
    torch.cuda.synchronize(GPU)
    for i, (x, y) in enumerate(zip(loop.tensors(), graphed.tensors(), strict=True)):
        assert torch.equal(x, y), f"tensor {i} of shape {tuple(x.shape)}"
    assert float(loop.optimizer.state[loop.params[0]]["step"]) == 7, "of 9 steps, two were skipped"


def test_a_whole_training_step_in_a_graph() -> None:
    """Forward, backward and step together; the loss goes on falling as without a graph."""

    def build() -> tuple[nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(GPU)
        return model, optim.AdamW(model.parameters(), lr=3e-3), torch.randn(128, 64, device=GPU)

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    plain, graphed = build(), build()
    losses = [float(step(*plain)) for _ in range(23)]
    side = torch.cuda.Stream(GPU)
    side.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*graphed)
    torch.cuda.current_stream(GPU).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*graphed)
    replayed = []
    for _ in range(20):
        graph.replay()
        replayed.append(float(loss))
    assert replayed == pytest.approx(losses[3:], rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]


def test_the_step_of_a_scaler_synchronises_nothing() -> None:
    run = Run("AdamW", 8)
    for number in range(2):
        run.prepare(number)
        run.step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
