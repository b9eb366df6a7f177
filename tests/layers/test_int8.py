"""Int8Linear: its three products against float64, what each option switches, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.int8_models import K, N, counted, layer, matmuls
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.callbacks.sample import Sample
from lowbit_lightning.layers import Int8Linear
from lowbit_lightning.layers.int8 import fewest_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product_bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """What int8 with one scale per row may be off by, element for element, in ``a @ b.T`` rounded to ``dtype``.

    Each element of a and b is off by at most half its row's scale (layers.py derives the rest); scales, their product
    and the result are rounded once each.
    """
    a, b = a.double(), b.double()
    a_scale, b_scale = a.abs().amax(1, keepdim=True) / 127, b.abs().amax(1, keepdim=True).T / 127
    half = 0.5 * (1 + 1e-5)
    quantised = half * (a.abs().sum(1, keepdim=True) * b_scale + b.abs().sum(1, keepdim=True).T * a_scale)
    quantised = quantised + a.shape[1] * half**2 * a_scale * b_scale
    return quantised + (torch.finfo(dtype).eps + 1e-6) * ((a @ b.T).abs() + quantised)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = (actual.double() - expected).abs() - bound
    if excess.max() > 0:
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(f"at {where}: {actual[where]} should be {expected[where]} up to {bound[where]}")


# -- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_products_against_float64(dtype: torch.dtype, device: str) -> None:
    linear = layer(dtype=dtype, device=device)
    x = (torch.randn(40, K) * torch.logspace(-2, 2, 40).unsqueeze(1)).to(device, dtype).requires_grad_()
    dy = torch.randn(40, N).to(device, dtype)
    with counted(3):
        y = linear(x)
        y.backward(dy)
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    assert (y.dtype, x.grad.dtype, linear.weight.grad.dtype) == (dtype, dtype, dtype)

    x64, w64, b64, dy64 = (
        x.detach().double(),
        linear.weight.detach().double(),
        linear.bias.detach().double(),
        dy.double(),
    )
    bias_rounding = torch.finfo(dtype).eps * b64.abs()
    assert_within(y.detach(), x64 @ w64.T + b64, product_bound(x64, w64, dtype) + bias_rounding)
    assert_within(x.grad, dy64 @ w64, product_bound(dy64, w64.T, dtype))
    assert_within(linear.weight.grad, dy64.T @ x64, product_bound(dy64.T, x64.T, dtype))
    torch.testing.assert_close(linear.bias.grad.double(), dy64.sum(0), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_error_is_that_of_eight_bits() -> None:
    """Neither the bound's worst case nor suspiciously exact: about 1 % of the norm on normal data."""
    linear = Int8Linear(512, 128)
    nn.init.normal_(linear.weight)
    x = torch.randn(256, 512)
    exact = nn.functional.linear(x, linear.weight, linear.bias)
    error = ((linear(x) - exact).norm() / exact.norm()).item()
    assert 0.005 < error < 0.02


@pytest.mark.parametrize("product", ["forward", "grad_input", "grad_weight"])
def test_each_product_switches_alone(product: str) -> None:
    linear = layer(**{product: "high"})
    x = torch.randn(16, K, requires_grad=True)
    dy = torch.randn(16, N)
    kernels.reset_calls()
    y = linear(x)
    y.backward(dy)
    assert matmuls() == 2
    grad, weight_grad = x.grad, linear.weight.grad
    assert grad is not None
    assert weight_grad is not None
    exact = {
        "forward": (y, nn.functional.linear(x, linear.weight, linear.bias)),
        "grad_input": (grad, dy @ linear.weight),
        "grad_weight": (weight_grad, dy.T @ x),
    }
    for name, (actual, expected) in exact.items():
        relative = ((actual - expected).norm() / expected.norm()).item()
        assert (relative < 1e-6) == (name == product), f"{name}: off by {relative}"


@pytest.mark.parametrize(
    ("needs_input", "needs_weight", "expected"), [(True, True, 3), (False, True, 2), (True, False, 2)]
)
def test_count_of_products(needs_input: bool, needs_weight: bool, expected: int) -> None:
    linear = layer()
    linear.weight.requires_grad_(needs_weight)
    kernels.reset_calls()
    linear(torch.randn(8, K, requires_grad=needs_input)).sum().backward()
    assert matmuls() == expected
    assert (linear.weight.grad is not None) == needs_weight


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [None, -1, 0])
def test_evaluation_runs_in_int8_where_that_pays(context: Any, dtype: torch.dtype, more: int | None) -> None:
    """Few rows don't pay for quantising a weight. Passes that train run in int8, whatever their rows."""
    linear = layer(dtype=dtype)
    rows = 1 if more is None else fewest_rows(linear.weight) + more
    x = torch.randn(rows, K).to(dtype)
    trained = linear(x).detach()
    with context(), counted(1):
        assert torch.equal(linear(x), trained)  # as the first pass of a reentrant checkpoint
    linear.eval()
    with counted(1):
        assert torch.equal(linear(x.requires_grad_()), trained)
    x = x.detach()
    pays = more == 0
    with context(), counted(pays):
        y = linear(x)
    assert torch.equal(y, trained if pays else nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K), (2, 0, K), (1, 1, 1, K)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    linear = layer()
    x = torch.randn(*shape, requires_grad=True)
    with counted(3 if x.numel() else 0):
        y = linear(x)
        assert y.shape == (*shape[:-1], N)
        y.sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert x.grad.shape == x.shape
    rows = x.detach().reshape(-1, K) if x.numel() else torch.zeros(0, K)
    if x.numel():
        assert torch.equal(y.reshape(-1, N), linear(rows))
    else:
        assert not linear.weight.grad.any()
        assert not linear.bias.grad.any()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors() -> None:
    """As nn.Linear takes them: jagged ones by all their rows at once, the older kind part by part."""
    linear = layer()
    parts = [torch.randn(n, K) for n in (3, 1, 5)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    with counted(1):
        y = linear(jagged)
    assert (y.layout, tuple(y.shape)[::2]) == (torch.jagged, (3, N))
    for part, own in zip(parts, y.unbind(), strict=True):
        assert torch.equal(linear(part), own)
    y.values().square().sum().backward()
    dense = torch.cat(parts).requires_grad_()
    linear(dense).square().sum().backward()
    assert torch.equal(jagged.grad.values(), dense.grad)  # type: ignore[union-attr, arg-type]
    turned = torch.nested.nested_tensor([p.unflatten(-1, (4, -1)) for p in parts], layout=torch.jagged).transpose(1, 2)
    for narrow in (Int8Linear(K // 4, N), nn.Linear(K // 4, N)):
        with pytest.raises(ValueError, match="contiguous"):
            narrow(turned)
    strided = linear(torch.nested.nested_tensor(parts))
    assert all(torch.equal(a, linear(b)) for a, b in zip(strided.unbind(), parts, strict=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_hooks_see_a_nested_input_once_and_the_monitor_measures_its_rows(layout: torch.layout) -> None:
    linear, parts = layer(), [torch.randn(n, K) for n in (3, 5)]
    found = []
    for x in (torch.nested.nested_tensor(parts, layout=layout, requires_grad=True), torch.cat(parts).requires_grad_()):
        sample, calls = Sample({"layer": linear}), list[Any]()
        handle = linear.register_forward_hook(lambda *seen, calls=calls: calls.append(seen))
        y = linear(x)
        (torch.cat(y.unbind()) if y.is_nested else y).square().sum().backward()
        handle.remove()
        sample.remove()
        assert len(calls) == 1
        found.append(sample.result()[1])
    assert torch.equal(*found)
    assert len(found[0]) == 6


def test_no_bias_and_strided_operands() -> None:
    linear = layer(bias=False)
    x, dy = torch.randn(K, 24).T, torch.randn(N, 24).T
    x.requires_grad_()
    with counted(3):
        y = linear(x)
        y.backward(dy)
    dense = x.detach().contiguous().requires_grad_()
    other = copy.deepcopy(linear)
    other.weight.grad = None
    other(dense).backward(dy.contiguous())
    assert torch.equal(y, other(dense))
    assert torch.equal(x.grad, dense.grad)  # type: ignore[arg-type]
    assert torch.equal(linear.weight.grad, other.weight.grad)  # type: ignore[arg-type]


def test_a_bad_row_shows_and_harms_no_other() -> None:
    linear = layer()
    x = torch.randn(4, K)
    clean = linear(x)
    x[1, 3] = float("inf")
    y = linear(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("large", ["x", "dy", "both sides of a weight"])
def test_large_values_give_what_their_size_allows(large: str) -> None:
    """2 ** 118 (3e35) times an operand is 2 ** 118 times the result, up to float32's rounding, where that holds it."""
    factor, linear = 2.0**118, layer(bias=False)
    x, dy = torch.randn(40, K), torch.randn(40, N)

    def passed(x: Tensor, dy: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        x = x.clone().requires_grad_()
        linear.weight.grad = None
        with torch.no_grad():
            linear.weight.mul_(weight)
        y = linear(x)
        y.backward(dy)
        with torch.no_grad():
            linear.weight.div_(weight)
        return y.detach(), x.grad, linear.weight.grad  # type: ignore[return-value]

    y, dx, dw = passed(x, dy, 1.0)
    if large == "x":
        expected = (y * factor, dx, dw * factor)
        actual = passed(x * factor, dy, 1.0)
    elif large == "dy":
        expected = (y, dx * factor, dw * factor)
        actual = passed(x, dy * factor, 1.0)
    else:
        expected = (y * factor * 2**-60, dx * 2**-60, dw * factor)
        actual = passed(x * factor, dy, 2.0**-60)
    for a, b in zip(actual, expected, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    linear = layer(device=device)
    x = torch.randn(8, K, requires_grad=True, device=device)
    kernels.reset_calls()
    with torch.autocast(device, dtype):
        y = linear(x)
    y.float().sum().backward()
    assert matmuls() == 3
    assert y.dtype == dtype
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert (x.grad.dtype, linear.weight.grad.dtype) == (torch.float32, torch.float32)
    exact = x.double() @ linear.weight.double().T + linear.bias
    assert ((y - exact).norm() / exact.norm()).item() < 0.03


# -- misuse ----------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    linear = layer()
    with pytest.raises(ValueError, match=r"input must be of shape \[\.\.\., 64\], got \(4, 63\)"):
        linear(torch.randn(4, 63))
    with pytest.raises(ValueError, match="input must be of shape"):
        linear(torch.tensor(1.0))
    with pytest.raises(
        TypeError, match=r"must have the weight's dtype, torch\.float32, outside autocast, got .*bfloat16"
    ):
        linear(torch.randn(4, K, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="must have the weight's dtype"):
        linear(torch.ones(4, K, dtype=torch.int64))
    with pytest.raises(ValueError, match="input is on meta but the weight on cpu"):
        linear(torch.randn(4, K, device="meta"))
    with pytest.raises(TypeError, match=r"int8 layer must be float32, float16 or bfloat16, got torch\.float64"):
        layer().double()(torch.randn(4, K).double())
    with pytest.raises(ValueError, match="grad_input must be 'int8', 'hadamard' or 'high', got 'int4'"):
        layer(grad_input="int4")


def test_the_meta_device() -> None:
    with torch.device("meta"):
        layer, x = Int8Linear(64, 96), torch.randn(8, 64, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == (8, 96)
    assert y.device.type == "meta"
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_operands_on_other_devices_are_refused() -> None:
    a, scales = torch.ones(8, 64, dtype=torch.int8), torch.ones(8)
    with pytest.raises(ValueError, match=r"b_scales is on meta but a on cpu"):
        kernels.int8_matmul(a, a, scales, scales.to("meta"))
