"""Attentions and encoders in int8, their inputs, and all that they compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import convert
from lowbit_lightning.layers import Products

E, HEADS, N, L, S = 64, 4, 3, 5, 7
HIGH = Products("high", "high", "high")


def int8(module: nn.Module, **settings: Any) -> Any:
    """A copy in int8."""
    module = copy.deepcopy(module)
    convert.swap_linears(module, output_layer=None, **settings)
    return module


def inputs(kind: str, batch_first: bool = True, kdim: int = E, single: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: one tensor ("self"), two ("memory") or three ("apart")."""

    def made(length: int, width: int) -> Tensor:
        shape = (length, width) if single else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, requires_grad=True)

    query = made(L, E)
    if kind == "self":
        return query, query, query
    key = made(S, kdim)
    return query, key, key if kind == "memory" else made(S, kdim)


def results(module: Any, given: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output, weights, and the gradients of all distinct inputs and parameters."""
    torch.manual_seed(1)  # of dropout
    y, weights = module(*given, **options)
    leaves = [*dict.fromkeys(given), *module.parameters()]
    target = torch.linspace(-1, 1, y.numel()).view_as(y)
    found = torch.autograd.grad((y * target).sum() + (0 if weights is None else weights.square().sum()), leaves)
    return [y.detach(), *([] if weights is None else [weights.detach()]), *found]


def encoder(layers: int = 2, **settings: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 2 * E, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, layers)
