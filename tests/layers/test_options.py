"""The options of int8 layers: what each of them quantises, keeps and rounds, and the errors that theory gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.int8_models import (
    GPT,
    IDS,
    LINEARS,
    OPTIONS,
    TOKENS,
    WIDTH,
    Block,
    assert_equal,
    called,
    gradients,
    matmuls,
    products,
    swapped,
)
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.layers import Int8Linear, Products
from lowbit_lightning.precision import Int8MixedPrecision


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_input": "high"}, {"forward": "high"}])
def test_saving_in_int8_changes_no_number(options: dict[str, Any], autocast: bool) -> None:
    block, x = Block(), torch.randn(2, TOKENS, WIDTH)
    results = []
    for save_inputs in ("int8", "high"):
        swapped(block, save_inputs=save_inputs, **options)
        kernels.reset_calls()
        results.append(gradients(block, x, autocast))
        assert matmuls() == LINEARS * products(options)
    assert_equal(*results)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_what_is_quantised_and_how_often(options: dict[str, Any]) -> None:
    """x, w and dy: both forms by one op where both are wanted at once."""
    p = Products(**options)
    layer = Int8Linear(WIDTH, WIDTH, **options)
    kernels.reset_calls()
    layer(torch.randn(8, WIDTH, requires_grad=True)).sum().backward()
    forward, dx, dw = (name in p.int8 for name in ("forward", "grad_input", "grad_weight"))
    at_once = p.save_inputs == "int8"
    expected = {
        "quantize_both": (forward and dw and at_once) + (dx and dw),
        "quantize_rowwise": (forward and not (dw and at_once)) + forward + (dx and not dw),
        "quantize_colwise": (dw and not (forward and at_once)) + dx + (dw and not dx),
        "int8_matmul": products(options),
    }
    assert called() == {op: count for op, count in expected.items() if count}


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    layer = Int8Linear(WIDTH, WIDTH)
    kernels.reset_calls()
    with torch.no_grad():
        layer(torch.randn(8, WIDTH))
    layer.weight.requires_grad_(False)
    layer(torch.randn(8, WIDTH))
    assert called() == {"quantize_rowwise": 4, "int8_matmul": 2}


def theory(a: Tensor, b: Tensor) -> float:
    """The expected relative error of ``a @ b.T`` where both have been rounded to multiples of their rows' absmax / 127.

    Rounding errors are uniform: of mean 0 and variance s^2 / 12. Those of different elements are independent.
    """
    s, t = ((m.abs().amax(1) / 127).square() / 12 for m in (a, b))
    variance = a.square().sum(1).unsqueeze(1) * t + s.unsqueeze(1) * b.square().sum(1)
    variance = variance + a.shape[1] * s.unsqueeze(1) * t
    return float(variance.sum().sqrt() / (a @ b.T).norm())


@pytest.mark.parametrize("data", ["normal", "uniform", "outliers"])
def test_errors_are_those_that_theory_gives(data: str) -> None:
    draw = torch.rand if data == "uniform" else torch.randn
    x, w, dy = draw(256, 512), draw(128, 512), draw(256, 128)
    if data == "outliers":
        x[:, :4] *= 20
    layer = Int8Linear(512, 128, bias=False)
    layer.weight = nn.Parameter(w)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    x64, w64, dy64 = (t.detach().double() for t in (x, w, dy))
    pairs = {
        "forward": (y, x64, w64),
        "grad_input": (x.grad, dy64, w64.T),
        "grad_weight": (layer.weight.grad, dy64.T, x64.T),
    }
    for name, (result, a, b) in pairs.items():
        assert result is not None
        exact = a @ b.T
        error = float((result.detach().double() - exact).norm() / exact.norm())
        assert error == pytest.approx(theory(a, b), rel=0.1), name


def test_stochastic_rounding_of_gradients() -> None:
    """Governed by torch's seed, without bias, and only in the backward."""
    layer = Int8Linear(WIDTH, WIDTH, gradient_rounding="stochastic")
    plain = Int8Linear(WIDTH, WIDTH)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(32, WIDTH), torch.randn(32, WIDTH)

    def run(module: Int8Linear) -> list[Tensor]:
        given = x.clone().requires_grad_()
        module.zero_grad()
        y = module(given)
        y.backward(dy)
        assert given.grad is not None
        assert module.weight.grad is not None
        return [y.detach(), given.grad, module.weight.grad.clone()]

    torch.manual_seed(3)
    first, second = run(layer), run(layer)
    torch.manual_seed(3)
    assert_equal(run(layer), first)
    nearest = run(plain)
    assert torch.equal(first[0], nearest[0])
    for a, b, c in zip(first[1:], second[1:], nearest[1:], strict=True):
        assert not torch.equal(a, b)
        assert not torch.equal(a, c)

    count = 200
    runs = [run(layer)[1:] for _ in range(count)]
    for i, (w, name) in enumerate(((layer.weight, "grad_input"), (x, "grad_weight"))):
        # Only dy is random: the expectation is the product of the exact dy with the quantised other operand.
        q, scales = kernels.quantize_colwise(w.detach())
        other = (q.double() * scales.double().unsqueeze(1)).T
        expected = (dy.double() if i == 0 else dy.double().T) @ other
        mean = torch.stack([r[i].double() for r in runs]).mean(0)
        deviation = torch.stack([r[i].double() for r in runs]).std(0) / count**0.5
        # 0.8 if each element had a seed of its own; here all move together with one.
        assert ((mean - expected).abs() / deviation).mean().item() < 1.2, name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_backends_agree_to_the_bit(rounding: str) -> None:
    block, x = swapped(Block(), gradient_rounding=rounding), torch.randn(2, TOKENS, WIDTH)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(5)
        kernels.reset_calls()
        with kernels.use_backend(backend):
            results.append(gradients(block, x))
        assert {name for _, name in kernels.calls()} == {backend}
        assert matmuls() == 3 * LINEARS
    assert_equal(*results)


def test_options_are_validated() -> None:
    for name, value in (("save_inputs", "int4"), ("gradient_rounding", "up")):
        with pytest.raises(ValueError, match=rf"{name} must be .* or .*, got '{value}'"):
            Products(**{name: value})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="gradient_rounding='stochastic' does nothing where"):
        Int8MixedPrecision(gradient_rounding="stochastic", grad_input="high", grad_weight="high")
    with pytest.raises(
        ValueError, match=r"overrides\['\*\.down'\]=.* grad_weight must be 'int8', 'hadamard' or 'high'"
    ):
        Int8MixedPrecision(overrides={"*.down": {"grad_weight": "fp8"}})


# -- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def saved_by(module: nn.Module, found: dict[int, int]) -> Iterator[None]:
    """Collects {address: bytes} of the memory that the linear layers save for the backward, but for weights."""
    contexts: list[Any] = []
    shapes = {shape for p in module.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_: Any) -> None:
        contexts.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    handles = [h for m in linears for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    yield
    for handle in handles:
        handle.remove()


def test_nothing_new_is_kept_of_a_weight() -> None:
    """The backward gets the parameter itself, which FSDP2 may free and gather again, and quantises it there."""
    layer, kept = Int8Linear(WIDTH, 2 * WIDTH), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(8, WIDTH, requires_grad=True))
    assert sum(t.data_ptr() == layer.weight.data_ptr() for t in kept) == 1
    others = {(t.dtype, tuple(t.shape)) for t in kept if t.data_ptr() != layer.weight.data_ptr()}
    assert others == {(torch.int8, (WIDTH, 8)), (torch.float32, (WIDTH,))}  # the input's columns


def test_inputs_are_kept_in_a_byte() -> None:
    """Of a GPT of 12 layers, against bf16-mixed: what its linear layers keep for the backward."""
    tokens = torch.randint(16, (4, 250))
    kept = {}
    for name in ("bf16-mixed", "int8", "high"):
        model = GPT(12)
        if name != "bf16-mixed":
            swapped(model, save_inputs=name)
        found: dict[int, int] = {}
        with saved_by(model.blocks, found), torch.autocast("cpu", torch.bfloat16):
            y = model(tokens)
        kept[name] = sum(found.values())
        kernels.reset_calls()
        y.float().mean().backward()
        assert matmuls() == (0 if name == "bf16-mixed" else 2 * 12 * LINEARS)
    features = 12 * (3 * WIDTH + 4 * WIDTH)  # inputs of qkv, proj, up and down
    assert kept["bf16-mixed"] == kept["high"] == 2 * 1000 * features
    assert kept["int8"] == (1000 + 4) * features  # a byte each, and a scale for each column
    assert kept["int8"] <= 0.6 * kept["bf16-mixed"]
