"""A model, its twin that reuses nothing, and the comparison that the tests of reused weights share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import kernels
from lowbit_lightning.layers import Int8Linear, invalidate

WIDTH, LAYERS = 64, 3


class Model(nn.Module):
    """``Int8Linear`` layers behind an embedding of the input, so that every layer's input needs a gradient."""

    def __init__(self, reuse: bool, tied: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(WIDTH))
        layers = [Int8Linear(WIDTH, WIDTH, cache_weights=reuse) for _ in range(LAYERS)]
        if tied:
            layers[-1].weight = layers[0].weight
        self.layers, self.reentrant = nn.ModuleList(layers), reentrant

    def forward(self, x: Tensor) -> Any:
        x = x * self.embedding
        for layer in self.layers:
            x = x + layer(x).tanh() if self.reentrant is None else self.checkpointed(layer, x)
        return x

    def checkpointed(self, layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(lambda x: x + layer(x).tanh(), x, use_reentrant=self.reentrant)


def quantised_weights() -> int:
    """How many int8 forms of weights were made in a training pass: all forms, less two of x and two of dy."""
    forms = {"quantize_rowwise": 1, "quantize_colwise": 1, "quantize_both": 2}
    calls = {op: count for (op, _), count in kernels.calls().items()}
    assert calls.pop("int8_matmul") == 3 * LAYERS
    return sum(forms.get(op, 0) * count for op, count in calls.items()) - 4 * LAYERS


def window(model: nn.Module, micro_batches: int = 2, between: Callable[[], None] = lambda: None) -> int:
    """Forward and backward of some micro-batches; returns how many forms of weights were made."""
    made = 0
    for i in range(micro_batches):
        kernels.reset_calls()
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(i))
        model(x.to(next(model.parameters()).device)).square().mean().backward()
        made += quantised_weights()
        if i == 0:
            between()
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**dict(model.named_parameters()), **gradients}


def assert_same(one: nn.Module, two: nn.Module) -> None:
    a, b = state(one), state(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs: a stale form was used"


def twins(**settings: Any) -> tuple[Model, Model]:
    torch.manual_seed(1)
    one = Model(True, **settings)
    two = Model(False, **settings)
    two.load_state_dict(one.state_dict())
    return one, two


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    """For files that import it: no optimizer of an earlier test is known, and nothing is left in the store."""
    gc.collect()
    invalidate()
    yield
    invalidate()


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that owns the model's weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(8, WIDTH, device=next(model.parameters()).device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def edit_in_place(model: Model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def write_behind_every_counter(model: Model) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)
