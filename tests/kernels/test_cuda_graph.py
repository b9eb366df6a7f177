"""CUDA graphs, as far as the emulator sees them: the launches of one step, run again, are a graph's replays.

A replay gives kernels the arguments of the capture: the same addresses, the same scalars by value. What changes from
step to step has to be in device memory then, and whatever the host keeps for later steps may not be needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.backend import emulated
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels.cuda import launch, table

SHAPES = ((16, 512), (5, 700), (300,))


class Touches(TorchDispatchMode):
    """What the host does to tensors between launches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradient(shape: tuple[int, ...], number: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def build(make: Callable[..., Any]) -> tuple[list[Parameter], Any, dict[str, Tensor]]:
    """Parameters with gradients that stay where they are, and what a step reads from the device."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    device = {"lr": torch.tensor(0.0), "grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    optimizer = make(params, lr=device["lr"])
    optimizer.found_inf = device["found_inf"]
    return params, optimizer, device


def before_step(number: int, params: list[Parameter], device: dict[str, Tensor]) -> None:
    """Every third step is skipped; the rate changes as a scheduler changes it."""
    for i, p in enumerate(params):
        p.grad.copy_(gradient(p.shape, 10 * number + i))  # type: ignore[union-attr]
    device["lr"].fill_(0.1 / (1 + number))
    device["found_inf"].fill_(float(number % 3 == 2))


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Adagrad", "Lion", "AdEMAMix"])
def test_replays_are_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up, a capture, and replays with other steps between them, against a loop."""

    def make(params: list[Parameter], lr: Tensor) -> Any:
        options: dict[str, Any] = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
        return getattr(optim, kind)(params, lr=lr, **options)

    loop, graph = build(make), build(make)
    with emulated() as launches:
        for number in range(2):  # warm-up
            for params, optimizer, device in (loop, graph):
                before_step(number, params, device)
                optimizer.step()
        with monkeypatch.context() as capture:
            capture.setattr(table, "_capturing", lambda device: True)
            first = len(launches)
            before_step(2, graph[0], graph[2])
            graph[1].step()  # run, too, where a capture would only record; it is skipped, so that this changes nothing
            nodes = launches[first:]
        for number in range(2, 7):
            before_step(number, loop[0], loop[2])
            loop[1].step()  # with tables of its own
            table.forget()
            before_step(number, graph[0], graph[2])
            for node in nodes:
                launch.run(node)
    for p, q in zip(loop[0], graph[0], strict=True):
        assert torch.equal(p, q)
        for key, x in loop[1].state[p].items():
            assert torch.equal(x, graph[1].state[q][key]), key
    assert float(loop[1].state[loop[0][0]]["step"]) == 5, "of 7 steps, two were skipped"


def test_a_captured_table_is_the_graphs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, _ = build(optim.AdamW)
    with emulated() as launches:
        optimizer.step()
        kept = dict(table._tables)
        monkeypatch.setattr(table, "_capturing", lambda device: True)
        first = len(launches)
        optimizer.step()
        assert dict(table._tables) == kept, "a table in the graph's memory is no table for later steps"
        nodes = launches[first:]
        assert nodes[0].kernel == "write_words", "the graph sends its table itself"
        (target,) = (a for a in nodes[0].arguments if isinstance(a, Tensor))
        assert all(target.data_ptr() != t.data_ptr() for t in kept.values())


@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
@pytest.mark.parametrize("clip", [False, True])
def test_between_launches_nothing_waits_for_the_device(kind: str, clip: bool) -> None:
    """No value is read from a tensor, and no tensor is made from the host's: either would end a capture."""
    _, optimizer, device = build(getattr(optim, kind))
    optimizer.grad_scale = device["grad_scale"]
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = True
    with emulated():
        for _ in range(2):  # the first makes states and plans
            optimizer.clip_next_step(1.0 if clip else None)
            with Touches() as touches:
                optimizer.step()
    assert "stack" in touches.seen, "the search for infinities is seen here"
    assert not touches.seen & {"_local_scalar_dense", "lift_fresh", "is_nonzero", "item", "nonzero", "tolist"}
    with Touches() as touches:
        torch.tensor([1, 2])
        float(device["lr"])
    assert {"lift_fresh", "_local_scalar_dense"} <= touches.seen
    assert kernels.calls()
