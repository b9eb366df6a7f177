"""Int8Linear in everything that wraps, copies, compiles or recomputes a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.int8_models import K, N, assert_equal, counted, layer
from support.optimizers import COPIES, copied
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import kernels
from lowbit_lightning.layers import Int8Linear, Products
from lowbit_lightning.layers.product import DITHERED, HIGH, INT8, NEAREST, ROTATED, STOCHASTIC

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def backward_of(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return y.detach(), *grads


@pytest.mark.parametrize("products", [{}, {"forward": "high", "grad_weight": "high"}])
def test_compiled_equals_eager(products: Any) -> None:
    module = nn.Sequential(layer(**products), nn.Identity(), Int8Linear(N, K))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (8, 24):
        x = torch.randn(batch, 3, K)
        expected = backward_of(module, x)
        with counted(4 if products else 6):
            actual = backward_of(compiled, x)
        assert_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is first imported
def test_compiled_by_inductor_equals_eager() -> None:
    module = nn.Sequential(layer(), nn.GELU(), Int8Linear(N, K))
    x = torch.randn(8, 3, K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = backward_of(module, x)
        actual = backward_of(torch.compile(module, fullgraph=True), x)
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.02


@pytest.mark.parametrize("save_int8", [True, False])
@pytest.mark.parametrize("rounding", [NEAREST, DITHERED, STOCHASTIC])
def test_ops_pass_opcheck(save_int8: bool, rounding: int) -> None:
    x, weight, bias = torch.randn(6, K, requires_grad=True), torch.randn(N, K, requires_grad=True), torch.randn(N)
    forward = torch.ops.lowbit_lightning.int8_linear.default
    # Two runs of stochastic rounding differ, which opcheck takes for a fault: its other checks remain.
    checks = CHECKS[:2] if rounding == STOCHASTIC else CHECKS
    for arguments in (
        (x, weight, bias, INT8, INT8, INT8, save_int8),
        (x, weight, bias, ROTATED, ROTATED, ROTATED, save_int8),
        (x, weight, None, HIGH, INT8, INT8 if save_int8 else HIGH, save_int8),
    ):
        torch.library.opcheck(forward, (*arguments, rounding), test_utils=checks)
    dy, saved = torch.randn(6, N), kernels.quantize_colwise(x.detach())
    backward = torch.ops.lowbit_lightning.int8_linear_backward.default
    dtypes = torch.bfloat16, torch.float32
    w = weight.detach()
    for operands in ((w, None, *saved), (w, x.detach(), None, None), (None, None, *saved), (w, None, None, None)):
        for kind in INT8, ROTATED:
            torch.library.opcheck(backward, (dy, *operands, *dtypes, kind, kind, rounding), test_utils=CHECKS[:2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    module = nn.Sequential(layer(), nn.GELU(), Int8Linear(N, K))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.module, x, use_reentrant=reentrant)

    x = torch.randn(8, K)
    expected = backward_of(module, x)
    again = x.clone().requires_grad_()
    module.zero_grad()
    with counted(8):  # the forward runs twice
        y = Checkpointed()(again)
        y.square().sum().backward()
    assert_equal((y, again.grad, *(p.grad for p in module.parameters())), expected)  # type: ignore[arg-type]


def test_gradients_accumulate() -> None:
    linear = layer()
    first, second = torch.randn(8, K), torch.randn(8, K)
    parts = [backward_of(linear, x)[2] for x in (first, second)]
    with counted(2 * 2):  # the inputs need no gradient
        for x in (first, second):
            linear(x).square().sum().backward()
    assert torch.equal(linear.weight.grad, parts[0] + parts[1])  # type: ignore[arg-type]


def test_tied_weights_sum_their_gradients() -> None:
    one, two = Int8Linear(K, K), Int8Linear(K, K)
    two.weight = one.weight
    x = torch.randn(8, K)
    with counted(2 * 2):
        (one(x).sum() + two(x).sum()).backward()
    assert one.weight.grad is two.weight.grad
    assert torch.allclose(one.weight.grad, 2 * backward_sum(one, x))  # type: ignore[arg-type]


def backward_sum(linear: Int8Linear, x: Tensor) -> Tensor:
    return torch.autograd.grad(linear(x).sum(), linear.weight)[0]


def test_a_graph_that_is_kept_and_gradients_asked_for_one_by_one() -> None:
    linear, x = layer(), torch.randn(8, K, requires_grad=True)
    expected = backward_of(linear, x)
    with counted(1):
        loss = linear(x).square().sum()
    with counted(2 + 2):
        first, second = (torch.autograd.grad(loss, [x, linear.weight], retain_graph=True) for _ in range(2))
    with counted(2 + 2):  # torch doesn't tell an op that only one of its gradients is asked for
        (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
        (dw,) = torch.autograd.grad(loss, linear.weight)
    for found in (first, second, (dx, dw)):
        assert_equal(found, expected[1:3])


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    """As with nn.Linear."""
    linear = layer()
    y = linear(torch.randn(8, K, requires_grad=True))
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies() -> None:
    linear = layer(grad_weight="high")
    x = torch.randn(4, K)
    for twin in (copied(linear, how) for how in COPIES):
        assert type(twin) is Int8Linear
        assert twin.products == Products(grad_weight="high")
        with counted(2 * 2):
            assert_equal(backward_of(twin, x), backward_of(linear, x))


def test_state_dict_is_that_of_a_linear() -> None:
    plain, linear = nn.Linear(K, N), layer()
    assert list(linear.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(linear.state_dict())
    linear.load_state_dict(plain.state_dict())
    assert "int8 (forward, grad_input, grad_weight)" in repr(linear)
