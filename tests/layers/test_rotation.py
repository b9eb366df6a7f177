"""Int8 products whose operands are rotated along what they contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.int8_models import Block, K, N, assert_equal, called, counted, gradients, layer, swapped
from torch import Tensor, nn

from lowbit_lightning import convert, kernels
from lowbit_lightning.callbacks.sample import Sample
from lowbit_lightning.layers import Int8Conv2d, Int8Linear, Products
from lowbit_lightning.layers.product import HIGH, INT8, ROTATED

ROTATION: dict[str, Any] = {"rotation": "hadamard"}


def test_what_the_settings_mean() -> None:
    assert Products(rotation="hadamard", forward="high").kinds == (HIGH, ROTATED, ROTATED)
    assert Products(grad_weight="hadamard").kinds == (INT8, INT8, ROTATED)
    assert str(Products(**ROTATION)) == "int8 (forward, grad_input, grad_weight, rotated)"
    assert str(Products(forward="hadamard")) == "int8 (forward, grad_input, grad_weight, forward rotated)"
    with pytest.raises(ValueError, match="rotation must be 'none' or 'hadamard', got 'dct'"):
        Products(rotation="dct")  # type: ignore[arg-type]
    report = convert.swap_linears(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), **ROTATION)
    assert str(report).startswith("int8 (forward, grad_input, grad_weight, rotated) in 1 of 2 layers")


@pytest.mark.parametrize("rows", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_what_theory_says(dtype: torch.dtype, rows: int) -> None:
    """Of each product: uniform within half a step of the scales of the rotated operands."""
    linear = Int8Linear(200, 256, bias=False, dtype=dtype, **ROTATION)
    x = (torch.randn(rows, 200) * torch.exp(torch.randn(200))).to(dtype).requires_grad_()
    dy = torch.randn(rows, 256).to(dtype)
    with counted(3):
        y = linear(x)
        y.backward(dy)
    x64, w64, dy64 = x.detach().double(), linear.weight.detach().double(), dy.double()
    assert x.grad is not None
    assert linear.weight.grad is not None
    for found, a, b in ((y, x64, w64), (x.grad, dy64, w64.T), (linear.weight.grad, dy64.T, x64.T)):
        ra, rb = (kernels.hadamard(t.float().contiguous(), 1).double() for t in (a, b))
        a_scale, b_scale = ra.abs().amax(1, keepdim=True) / 127, rb.abs().amax(1, keepdim=True) / 127
        variance = a_scale**2 * b.square().sum(1) + (b_scale**2).T * a.square().sum(1, keepdim=True)
        error = (found.detach().double() - a @ b.T).square().mean()
        extra = (torch.finfo(dtype).eps * (a @ b.T)).square().mean() / 12
        assert error == pytest.approx((variance / 12).mean().item() + extra.item(), rel=0.1)


def outlying(*shape: int) -> Tensor:
    return torch.randn(*shape).index_fill_(1, torch.tensor([3]), 50.0)


def test_outliers_cost_less() -> None:
    """One large feature costs the others 10 dB less, as the product and as LowBitMonitor see it."""
    x, errors, seen = outlying(96, 256), [], []
    for rotation in ("none", "hadamard"):
        torch.manual_seed(0)
        linear = Int8Linear(256, 64, bias=False, rotation=rotation)
        with torch.no_grad():
            linear.weight[:, 3] = 0  # what the outlier itself gives would hide the rest
        sample = Sample({"linear": linear})
        y = linear(x)
        slots, values = sample.result()
        sample.remove()
        exact = x.double() @ linear.weight.double().T
        errors.append(((y - exact).norm() / exact.norm()).item())
        seen.append({slot.side: value.item() for slot, value in zip(slots, values[:, 0], strict=True)}[0])
    assert errors[0] > 3 * errors[1]
    assert seen[1] > seen[0] + 10


def test_what_runs() -> None:
    linear, x = layer(**ROTATION), torch.randn(48, K, requires_grad=True)
    kernels.reset_calls()
    linear(x).sum().backward()
    forms = {"quantize_rowwise": 3, "quantize_colwise": 3}  # of x, w and dy
    assert called() == {"hadamard": 6, "int8_matmul": 3, **forms}
    linear.products = Products(grad_weight="hadamard")
    kernels.reset_calls()
    linear(x).sum().backward()
    assert called() == {"hadamard": 2, "int8_matmul": 3, "quantize_rowwise": 3, "quantize_colwise": 3}


def test_compiled_equals_eager() -> None:
    linear, x = layer(**ROTATION), torch.randn(2, 24, K)
    expected = gradients(linear, x)
    assert_equal(gradients(torch.compile(linear, fullgraph=True, backend="aot_eager"), x), expected)


@pytest.mark.parametrize("settings", [{}, {"save_inputs": "high"}, {"gradient_rounding": "stochastic"}])
def test_a_block_is_what_it_is_in_high_precision(settings: dict[str, Any]) -> None:
    block, x = swapped(Block(), **ROTATION, **settings), torch.randn(2, 24, K)
    plain = copy.deepcopy(block)
    convert.restore(plain)
    for found, exact in zip(gradients(block, x), gradients(plain, x), strict=True):
        assert (found - exact).norm() < 0.05 * exact.norm() + 1e-6


def test_saving_in_int8_and_restoring_give_the_same_gradients() -> None:
    x, dy, found = torch.randn(40, K), torch.randn(40, N), []
    for save_inputs in ("int8", "high"):
        torch.manual_seed(0)
        linear = layer(save_inputs=save_inputs, **ROTATION)
        linear(x).backward(dy)
        found.append(linear.weight.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_higher_derivatives_and_transforms() -> None:
    """Of a gradient: an input that was saved in int8 is turned back."""
    torch.manual_seed(0)
    linear, x = layer(**ROTATION), torch.randn(40, K, requires_grad=True)
    y = linear(x)
    dx, dw = torch.autograd.grad(y.square().sum(), [x, linear.weight], create_graph=True)
    exact = 2 * (x @ linear.weight.T + linear.bias)
    assert (dx - exact @ linear.weight).norm() < 0.05 * dx.norm()
    assert (dw - exact.T @ x).norm() < 0.05 * dw.norm()
    dx.square().sum().backward()
    assert x.grad is not None
    tangent = torch.func.jvp(lambda x: linear(x), (x.detach(),), (torch.ones(40, K),))[1]
    assert (tangent - torch.ones(40, K) @ linear.weight.T).norm() < 0.05 * tangent.norm()


def test_convolutions_of_one_pixel_are_rotated() -> None:
    x = torch.randn(2, 32, 6, 6)
    for kernel, kinds, rotations in ((1, (ROTATED,) * 3, 3), (3, (INT8,) * 3, 0)):
        conv = Int8Conv2d(32, 24, kernel, **ROTATION)
        assert conv.kinds == kinds
        kernels.reset_calls()
        conv(x)
        assert called().get("hadamard", 0) == rotations
