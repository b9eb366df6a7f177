"""Every transform of ``torch.func``, forward-mode AD and higher derivatives, against plain linear layers.

Each is run on a small network once with ``nn.Linear`` and once after ``swap_linears``; the two must agree to the error
of int8, and to that of float32 where all products are "high". Gradients that are missing or zero are far off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.int8_models import matmuls
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from lowbit_lightning import kernels
from lowbit_lightning.convert import dequantize, quantize, swap_linears

# torch's own: forward-mode AD decomposes an op for the first time; linearize meets a constant
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

WIDTH, HIDDEN, ROWS, COPIES = 32, 48, 6, 3
HIGH = {"forward": "high", "grad_input": "high", "grad_weight": "high"}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {},
    "forward high": {"forward": "high"},
    "all high": HIGH,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def loss_of(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def dual(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(inputs(ROWS, WIDTH), inputs(WIDTH, ROWS).T))
        return tuple(forward_ad.unpack_dual(y))


def of_weights(model: nn.Module) -> Any:
    """The tangent of the output along a change of every parameter."""
    parameters = dict(model.named_parameters())
    change = {name: torch.cos(p * 100) for name, p in parameters.items()}
    return jvp(lambda p: functional_call(model, p, (inputs(ROWS, WIDTH),)), (parameters,), (change,))


def ensemble(model: nn.Module) -> Any:
    """vmap over the weights and over the inputs of several models at once."""
    parameters, buffers = stack_module_state([model] * COPIES)  # type: ignore[arg-type]
    parameters = {n: (p * torch.linspace(1, 2, COPIES).view(-1, *[1] * (p.ndim - 1))) for n, p in parameters.items()}
    return vmap(lambda p, b, x: functional_call(model, (p, b), (x,)))(parameters, buffers, inputs(COPIES, ROWS, WIDTH))


def ensemble_on_one_input(model: nn.Module) -> Any:
    parameters, buffers = stack_module_state([model] * COPIES)  # type: ignore[arg-type]
    x = inputs(ROWS, WIDTH)
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)


def gradient_penalty(model: nn.Module) -> Any:
    """The gradients of the size of a gradient (Gulrajani et al., 2017), by plain autograd."""
    x = inputs(ROWS, WIDTH).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    weights = [p for p in model.parameters() if p.ndim == 2]
    return torch.autograd.grad((slope.norm(dim=1) - 1).square().sum(), [x, *weights])


def second_gradient(model: nn.Module) -> Any:
    x = inputs(ROWS, WIDTH).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((slope.norm(dim=1) - 1).square().sum(), x)


def mean_flow(model: nn.Module) -> Any:
    """The gradients of a loss with a jvp in it (Geng et al., 2025), by plain autograd around the transform."""
    x = inputs(ROWS, WIDTH)
    slope = jvp(model, (x,), (torch.ones_like(x),))[1]
    return torch.autograd.grad((slope - x).square().sum(), [p for p in model.parameters() if p.ndim == 2])


def of_second_order(model: Any) -> Any:
    x, loss = inputs(ROWS, WIDTH), loss_of(model)
    return hessian(lambda bias: loss({**dict(model.named_parameters()), "0.bias": bias}, x))(model[0].bias)


def along(model: nn.Module) -> Any:
    """A Hessian times a vector, forward over reverse."""
    slope = grad(lambda x: model(x).square().sum())
    return jvp(slope, (inputs(ROWS, WIDTH),), (inputs(WIDTH, ROWS).T,))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "jvp": lambda m: jvp(m, (inputs(ROWS, WIDTH),), (inputs(WIDTH, ROWS).T,)),
    "jvp of weights": of_weights,
    "dual numbers": dual,
    "linearize": lambda m: linearize(m, inputs(ROWS, WIDTH))[1](inputs(WIDTH, ROWS).T),
    "jacfwd": lambda m: jacfwd(m)(inputs(WIDTH)),
    "jacrev": lambda m: jacrev(m)(inputs(WIDTH)),
    "vjp": lambda m: vjp(m, inputs(ROWS, WIDTH))[1](inputs(WIDTH, ROWS).T),
    "grad": lambda m: grad(lambda x: m(x).square().sum())(inputs(ROWS, WIDTH)),
    "grad of weights": lambda m: grad(loss_of(m))(dict(m.named_parameters()), inputs(ROWS, WIDTH)),
    "vmap": lambda m: vmap(m)(inputs(COPIES, ROWS, WIDTH)),
    "vmap, one row": lambda m: vmap(m)(inputs(ROWS, WIDTH)),
    "vmap along another axis": lambda m: vmap(m, in_dims=1, out_dims=2)(inputs(ROWS, COPIES, WIDTH)),
    "vmap of vmap": lambda m: vmap(vmap(m))(inputs(2, COPIES, ROWS, WIDTH)),
    "gradients of each sample": lambda m: vmap(grad(loss_of(m)), (None, 0))(
        dict(m.named_parameters()), inputs(COPIES, ROWS, WIDTH)
    ),
    "ensemble": ensemble,
    "ensemble on one input": ensemble_on_one_input,
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(inputs(WIDTH)),
    "hessian, reverse over forward": lambda m: jacrev(jacfwd(lambda x: m(x).square().sum()))(inputs(WIDTH)),
    "hessian of weights": of_second_order,
    "Hessian-vector product": along,
    "gradient penalty": gradient_penalty,
    "second gradient": second_gradient,
    "jvp in a loss": mean_flow,
}


OF_INPUTS = [
    "jvp",
    "dual numbers",
    "linearize",
    "jacfwd",
    "jacrev",
    "vjp",
    "grad",
    "vmap",
    "hessian",
    "hessian, reverse over forward",
    "Hessian-vector product",
    "second gradient",
]
"""Those that differentiate in the input, as layers with frozen weights in low bits allow."""


def relative(actual: Any, expected: Any) -> float:
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_that_of_a_plain_network(name: str, settings: dict[str, Any]) -> None:
    plain, swapped = network().eval(), network().train(name != "jvp")  # evaluation takes the same way
    swap_linears(swapped, output_layer=None, **settings)
    expected = TRANSFORMS[name](plain)
    assert all(leaf.norm() > 0.01 for leaf in tree_leaves(expected))
    kernels.reset_calls()
    error = relative(TRANSFORMS[name](swapped), expected)
    assert error < (1e-5 if settings is HIGH else 0.05)
    assert matmuls() > 0 if settings == {} else matmuls() == 0 or settings is not HIGH


@pytest.mark.parametrize("weights", ["nf4", "int8"])
@pytest.mark.parametrize("name", OF_INPUTS)
def test_a_transform_through_low_bit_weights_is_that_through_what_they_stand_for(name: str, weights: str) -> None:
    model = network()
    quantize(model, weights, output_layer=None, threshold=6.0 if weights == "int8" else 0.0)
    expected = TRANSFORMS[name](dequantize(copy.deepcopy(model)))
    assert relative(TRANSFORMS[name](model), expected) < (0.02 if weights == "int8" else 1e-5)


def test_a_second_derivative_into_an_input_that_was_kept_in_int8_is_refused() -> None:
    """The gradient of a weight depends on the layer's input, of which the backward has only int8 columns."""
    x = inputs(ROWS, WIDTH)
    cases: list[dict[str, Any]] = [{}, {"save_inputs": "high"}]
    for settings in cases:
        model = network()
        swap_linears(model, output_layer=None, **settings)
        slopes = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        size = sum(slope.square().sum() for slope in slopes)
        if not settings:
            with pytest.raises(RuntimeError, match="save_inputs='int8' keeps only in int8: use save_inputs='high'"):
                size.backward()  # type: ignore[union-attr]
            continue
        second = torch.autograd.grad(size, list(model.parameters()))  # type: ignore[arg-type]
        plain = network()
        slopes = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()), create_graph=True)
        exact = torch.autograd.grad(sum(s.square().sum() for s in slopes), list(plain.parameters()))  # type: ignore
        assert relative(second, exact) < 0.05


def test_first_gradients_cost_what_they_did() -> None:
    """Transforms quantise each operand anew; plain training must not take their way."""
    model = network()
    swap_linears(model, output_layer=None)
    kernels.reset_calls()
    model(inputs(ROWS, WIDTH).requires_grad_()).sum().backward()
    assert matmuls() == 6
    assert sum(count for (op, _), count in kernels.calls().items() if op.startswith("quantize")) == 2 * 4
