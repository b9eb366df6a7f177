"""A layer, a transformer block, a small GPT, and the counts and comparisons that the tests of int8 layers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers import Int8Linear, Products

WIDTH, HEADS, TOKENS = 64, 4, 24
LINEARS = 4  # of a block
K, N = 64, 48  # features into and out of a single layer


def layer(**settings: Any) -> Int8Linear:
    return Int8Linear(K, N, **settings)


class Block(nn.Module):
    """Of a transformer; every linear layer's input needs a gradient, since a norm with weights comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, blocks: int, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 16)
        self.reentrant = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = self.tokens(tokens)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def swapped(module: nn.Module, **settings: Any) -> Any:
    convert.swap_linears(module, output_layer="head" if isinstance(module, GPT) else None, **settings)
    return module


def called() -> dict[str, int]:
    """Calls of each op, on whatever backend."""
    calls: Counter[str] = Counter()
    for (op, _), count in kernels.calls().items():
        calls[op] += count
    return dict(calls)


def matmuls() -> int:
    return called().get("int8_matmul", 0)


@contextmanager
def counted(expected: int) -> Iterator[None]:
    """The block runs so many int8 products, no more and no fewer."""
    before = matmuls()
    yield
    assert matmuls() - before == expected


def gradients(module: Any, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    x = x.clone().requires_grad_(x.is_floating_point())
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.float().square().mean().backward()
    found = [p.grad.clone() for p in module.parameters()]
    return [y.detach(), *([] if x.grad is None else [x.grad]), *found]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {i} differs by {(a - b).abs().max()}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"save_inputs": "high"},
    {"grad_weight": "high"},
    {"grad_input": "high"},
    {"forward": "high"},
    {"forward": "high", "save_inputs": "high", "grad_input": "high"},
]
IDS = ["-".join(f"{k}={v}" for k, v in options.items()) or "default" for options in OPTIONS]


def products(options: dict[str, Any]) -> int:
    return len(Products(**options).int8)
