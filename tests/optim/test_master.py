"""bfloat16 training with a 24-bit master copy, against a float32 master and plain bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning import optim


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def train(dtype: torch.dtype, **options: Any) -> tuple[float, optim.AdamW, nn.Module]:
    """Final loss, in float32, of a regression whose updates are far below bfloat16's last place."""
    net = model(dtype)
    optimizer = optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(64, 64, generator=generator) / 8

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 64, generator=generator)
        return x, torch.sin(x @ teacher)

    for _ in range(400):
        x, y = batch()
        loss = (net(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = batch()
    with torch.no_grad():
        return (net.float()(x) - y).square().mean().item(), optimizer, net


def test_master_copy_trains_as_float32_does() -> None:
    """The rival keeps a float32 master and computes in bfloat16: gradients are those of the rounded weights."""
    expected = train_with_float32_master()
    with_master = train(torch.bfloat16, bits=32, master="bf16+8")[0]
    without = train(torch.bfloat16, bits=32)[0]
    assert abs(with_master / expected - 1) < 1e-3
    assert abs(without / expected - 1) > 1e-2


def train_with_float32_master() -> float:
    net, masters = model(torch.bfloat16), [p.detach().float() for p in model(torch.bfloat16).parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(64, 64, generator=generator) / 8
    for _ in range(400):
        x = torch.randn(256, 64, generator=generator)
        (net(x.bfloat16()).float() - torch.sin(x @ teacher)).square().mean().backward()
        for p, master in zip(net.parameters(), masters, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(net.parameters(), masters, strict=True):
                p.copy_(master)
    x = torch.randn(256, 64, generator=generator)
    with torch.no_grad():
        return (net.float()(x) - torch.sin(x @ teacher)).square().mean().item()


def test_master_copy_in_checkpoints_and_mixed_groups() -> None:
    params = [torch.randn(16, 300).bfloat16(), torch.randn(16, 300)]
    optimizers = []
    for _ in range(2):
        optimizers.append(optim.AdamW([nn.Parameter(p.clone()) for p in params], lr=1e-4, master="bf16+8"))

    def step(optimizer: optim.AdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()

    first, second = optimizers
    step(first, 1)
    bf16, fp32 = first.param_groups[0]["params"]
    assert first.state[bf16]["master_remainder"].dtype == torch.int8
    assert first.state[bf16]["master_remainder"].any()
    assert "master_remainder" not in first.state[fp32]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for ours, theirs in zip(second.param_groups[0]["params"], (bf16, fp32), strict=True):
            ours.copy_(theirs)
    step(first, 2)
    step(second, 2)
    for ours, theirs in zip(second.param_groups[0]["params"], (bf16, fp32), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in first.state[theirs].items():
            assert torch.equal(second.state[ours][name], value), name


def test_bad_masters_are_named() -> None:
    p = [nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match=r"master must be None or \"bf16\+8\", got 'fp32'"):
        optim.AdamW(p, master="fp32")
    with pytest.raises(ValueError, match="leave stochastic_rounding out"):
        optim.AdamW(p, master="bf16+8", stochastic_rounding=True)
    with pytest.warns(UserWarning, match="master has no effect"):
        optim.AdamW([nn.Parameter(torch.zeros(4))], master="bf16+8")
