"""Transformers' ``Conv1D`` in int8: the numbers of an ``Int8Linear`` with the transposed weight; in place, and back."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from support.int8_models import counted
from support.transformers_like import GPT2, Conv1D
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit_lightning import kernels
from lowbit_lightning.convert import restore, swap_linears
from lowbit_lightning.layers import Int8Layer, Int8Linear

NX, NF = 64, 96


def twins() -> tuple[Any, Int8Linear]:
    torch.manual_seed(0)
    plain = Conv1D(NF, NX)
    linear = Int8Linear(NX, NF)
    with torch.no_grad():
        linear.weight.copy_(plain.weight.T)
        linear.bias.copy_(plain.bias.normal_())
    swapped = nn.Sequential(plain)
    swap_linears(swapped, output_layer=None)
    return swapped[0], linear


def gradients(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])


@pytest.mark.parametrize("autocast", [False, True])
def test_it_computes_as_a_linear_layer_does(autocast: bool) -> None:
    conv, linear = twins()
    x = torch.randn(5, 7, NX)
    with counted(6), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = gradients(conv, x), gradients(linear, x)
    assert actual[2].shape == conv.weight.shape
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b.T if i == 2 else b), f"result {i}"


def test_its_weight_is_quantised_without_a_copy() -> None:
    """By rows where a linear layer does so by columns, for it is stored transposed."""
    conv, linear = twins()
    x = torch.randn(5, NX)
    counts = []
    for layer in (conv, linear):
        kernels.reset_calls()
        gradients(layer, x)
        counts.append(kernels.calls())
    assert counts[0] == counts[1]


def test_in_place_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2()
    names = [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(512, (2, 16))
    exact = model(tokens)
    report = swap_linears(model)
    assert list(report.swapped) == names
    assert report.skipped["lm_head"].startswith("output layer")
    layer: Any = model.transformer.h[0].attn.c_attn
    assert all(isinstance(layer, kind) for kind in (Conv1D, Int8Layer))
    with counted(len(names)):
        assert ((model(tokens) - exact).norm() / exact.norm()).item() < 0.05
    assert list(model.state_dict()) == list(before)

    library = ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    assert torch.equal(again(torch.ones(4, NX)), layer(torch.ones(4, NX)))
    assert type(copy.deepcopy(layer)) is type(layer)

    assert list(restore(model)) == names
    assert {type(model.get_submodule(name)) for name in names} == {Conv1D}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_trains() -> None:
    torch.manual_seed(0)
    model = GPT2()
    swap_linears(model)
    tokens = torch.arange(64).view(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
