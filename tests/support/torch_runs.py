"""torch's optimizers with their options, and a run with any of them, for the tests of converting from and to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "maximize": False}),
    ("RMSprop", {"lr": 1e-3}),
    ("RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.9}),
    ("Adagrad", {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
]
SHAPES = ((16, 512), (33, 80), (300,))


def name(case: Any) -> str:
    return str(case) if not isinstance(case, dict) else ",".join(f"{k}={v}" for k, v in case.items()) or "defaults"


class Run:
    """A small network that learns a fixed map; ``optimizer`` may be exchanged or changed in mid-run."""

    def __init__(self, kind: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.optimizer: Any = getattr(torch.optim, kind)(self.model.parameters(), **options)
        self.data = torch.Generator().manual_seed(1)
        self.target = torch.randn(64, 64, generator=self.data) / 8

    def loss(self) -> Tensor:
        x = torch.randn(64, 64, generator=self.data)
        return (self.model(x) - x @ self.target).square().mean()

    def steps(self, n: int) -> Tensor:
        losses = []
        for _ in range(n):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)
