"""Plans of models with low-bit weights: bytes of what the model really holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit_lightning import memory, quantize
from lowbit_lightning.convert import empty_parameters


def model(weights: str) -> nn.Sequential:
    """Frozen low-bit layers, with something that trains."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(192, 301), nn.Linear(301, 192)) for _ in range(2)), nn.Linear(192, 8))
    net.requires_grad_(False)
    quantize(net, weights)
    return net.requires_grad_(False).append(nn.Linear(8, 4))


@pytest.mark.parametrize("weights", ["int8", "nf4", "nf4-dq", "int3"])
def test_parameters_to_the_byte(weights: str) -> None:
    net = model(weights)
    plan = memory.plan(net, strategy="single")
    assert plan.parameters == sum(p.nbytes for p in net.parameters())
    assert plan.buffers == sum(b.nbytes for b in net.buffers())
    assert plan.gradients == sum(p.nbytes for p in net.parameters() if p.requires_grad)
    with empty_parameters():
        empty = model(weights)
    assert memory.plan(empty, strategy="single").parameters == plan.parameters


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_shards_and_gathers(precision: str) -> None:
    """Packed weights are cut by rows and travel packed, whatever high precision is gathered in."""
    net = model("nf4")
    plan = memory.plan(net, strategy="sharded", world_size=2, precision=precision)
    assert plan.parameters == sum(p.nbytes // p.shape[0] * -(-p.shape[0] // 2) for p in net.parameters())
    width = 2 if precision == "bf16-mixed" else 4
    blocks = {id(p) for block in list(net)[:2] for p in block.parameters()}
    expected = 0
    for p in net.parameters():
        padded = 2 * -(-p.shape[0] // 2) * (p.numel() // p.shape[0])
        size = padded * (width if p.dtype is torch.float32 else 1)
        expected += size * (2 if id(p) in blocks else 1)
    assert plan.communication["all_gather"] == expected
