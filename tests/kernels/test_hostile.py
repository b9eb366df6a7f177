"""What ops make of NaN, infinities, overflow and damaged states, on every backend: what the reference says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulator.backend import emulated
from support.step_case import StepCase
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.rules.rule import exponential, power

HYPER = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "alpha": 0.99, "beta3": 0.9999, "momentum": 0.9}
HYPER |= {"log_beta1": math.log(0.9), "log_beta3": math.log(0.9999), "t_alpha": 10.0, "t_beta3": 10.0}
NAN, INF = math.nan, math.inf
on_every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "cuda in the emulator"])


@pytest.fixture
def chosen(backend: str) -> Iterator[None]:
    with emulated() if backend.startswith("cuda") else kernels.use_backend(backend):
        yield


def fresh(rule: str, bits: list[int], shape: tuple[int, ...] = (1, 300), **hyper: float) -> StepCase:
    """One parameter of ones, with states of zeros."""
    states, scales = [], []
    for state, b in zip(rules.get(rule).states, bits, strict=True):
        zero = formats.dynamic_map(state.codebook).zero_code
        states.append([torch.full(shape, zero, dtype=torch.uint8) if b == 8 else torch.zeros(shape)])
        scales.append([torch.zeros(BlockGrid.of(torch.Size(shape), 256).scales_shape if b == 8 else (0,))])
    values = [{**HYPER, **hyper}.get(name, 0.0) for name in rules.get(rule).hyper]
    return StepCase(rule, [torch.ones(shape)], [torch.zeros(shape)], [torch.zeros(())], states, scales, values)


def step(a: StepCase, g: float, at: tuple[int, int] = (0, 7)) -> None:
    """One step with gradients of 1e-3, and g at one place."""
    a.grads = [torch.full(a.params[0].shape, 1e-3)]
    a.grads[0][at] = g
    a.step()


# -- functions of the rules ------------------------------------------------------------------------------------------


def test_maximum_and_sign_are_torchs() -> None:
    specials = torch.tensor([NAN, INF, -INF, 0.0, 1.0, -2.0, 1e-45])
    a, b = torch.meshgrid(specials, specials, indexing="ij")
    found = rules.get("adam_amsgrad").run(
        "direction",
        {
            **{name: torch.zeros(()) for name in ("p", "g", "exp_avg", "exp_avg_scale", "exp_avg_sq_scale")},
            **{"exp_avg_sq": b, "max_exp_avg_sq": a, "max_exp_avg_sq_scale": torch.ones(())},
            "exp_avg_sq_scale": torch.ones(()),
        },
        {"weight_decay": 0.0, "rest1": 0.0, "rest2": 0.0, "beta1": 0.0, "beta2": 1.0},
        torch.device("cpu"),
    )["max_exp_avg_sq"]
    assert torch.equal(found.nan_to_num(nan=-7.0), torch.maximum(a, b).nan_to_num(nan=-7.0))
    assert torch.sign(torch.tensor(NAN)) == 0


@on_every_backend
@pytest.mark.usefixtures("chosen")
def test_a_momentum_that_is_nan_has_no_sign() -> None:
    a = fresh("lion", [32])
    a.states[0][0][0, 3] = NAN
    step(a, 1.0)
    assert a.params[0][0, 3] == 1.0
    step(a, NAN)
    assert a.params[0].isnan().nonzero().tolist() == [[0, 7]], "a gradient that is not finite shows"


def test_powers_of_step_counts_that_are_none_end() -> None:
    for n in (-1.0, -INF, NAN, -1e30):
        assert math.isnan(power(0.9, n))
    assert power(0.9, INF) == power(0.9, 1e30) == 0.0
    assert power(0.5, 3.0) == 0.125
    with np.errstate(over="ignore"):
        assert exponential(INF) == INF
    assert exponential(-INF) == 0.0
    assert math.isnan(exponential(NAN))


@on_every_backend
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("count", [-5.0, -1.0, -INF, NAN, INF, 1e30])
@pytest.mark.parametrize("rule", ["adamw", "ademamix"])
def test_steps_with_a_count_that_is_none_end(count: float, rule: str) -> None:
    a = fresh(rule, [32 if state.slow else 8 for state in rules.get(rule).states])
    a.steps[0].fill_(count)
    step(a, 1.0)
    assert bool(a.params[0].isnan().all()) == (not count >= 0), "a damaged count shows"


# -- finite gradients whose squares overflow --------------------------------------------------------------------------


@on_every_backend
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("rule", "bits"),
    [("ademamix", [8, 32, 8]), ("adamw", [32, 8]), ("adamw_amsgrad", [32, 32, 8]), ("rmsprop_momentum", [8, 32])],
)
def test_no_state_of_a_huge_gradient_outlives_the_others(rule: str, bits: list[int]) -> None:
    with_32_bits = fresh(rule, [32 for _ in bits])
    mixed = fresh(rule, bits)
    for number in range(8):
        for a in (with_32_bits, mixed):
            step(a, 7e20 if number == 2 else 1e-3)
        if number == 2:
            for state, scales, b in zip(mixed.states, mixed.scales, bits, strict=True):
                value = state[0][0, 7] if b == 32 else scales[0][0, 0].isfinite()
                assert float(value) in (0.0, 1.0), "reset, and out of the scale"
    assert with_32_bits.params[0].isfinite().all()
    assert (mixed.params[0] - 1).abs().max() < 2
    others = torch.arange(300) != 7
    close = (mixed.params[0] - with_32_bits.params[0])[0, others].abs().max()
    assert close < 0.02, "neighbours do not notice"


@on_every_backend
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("bits", [8, 32])
def test_centered_rmsprop_with_an_overflow_is_torchs(bits: int) -> None:
    theirs = torch.ones(1, 300, requires_grad=True)
    optimizer = torch.optim.RMSprop([theirs], lr=0.01, centered=True)
    a = fresh("rmsprop_centered", [bits, bits])
    for g in (1e-3, 1e22):
        step(a, g)
        theirs.grad = a.grads[0].clone()
        optimizer.step()
    assert a.params[0].isfinite().all()
    assert a.params[0][0, 7] == pytest.approx(theirs[0, 7].item(), rel=1e-3)


# -- states that no training gives -----------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.usefixtures("chosen")
def test_a_negative_scale_of_a_state_without_negative_values_counts_as_zero() -> None:
    a = fresh("adagrad", [8])
    a.states[0][0].fill_(200)
    a.scales[0][0].fill_(-1.0)
    step(a, 2.0)
    scales, codes = a.scales[0][0], a.states[0][0]
    assert scales[0].tolist() == [pytest.approx(4.0 + float(formats.codebook("dynamic_unsigned")[200]) * -1), 0.0]
    assert codes[0].nonzero().tolist() == [[7]]


@pytest.mark.parametrize("build", [kernels.quantize_rowwise, kernels.quantize_colwise, kernels.quantize_both])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_matrices_without_elements(build: Callable[..., Any], shape: tuple[int, int]) -> None:
    with kernels.use_backend("cpu"):
        found = build(torch.zeros(shape))
    with kernels.use_backend("reference"):
        for x, y in zip(found, build(torch.zeros(shape)), strict=True):
            assert torch.equal(x, y)


# -- int8 products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@on_every_backend
@pytest.mark.usefixtures("chosen")
def test_a_sum_of_zero_has_no_sign(k: int) -> None:
    a, b = torch.zeros(2, k, dtype=torch.int8), torch.full((2, k), -5, dtype=torch.int8)
    y = kernels.int8_matmul(a, b, torch.tensor([1.0, -1.0]), torch.ones(2))
    assert torch.equal(y.signbit(), torch.tensor([[False, False], [True, True]]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # the emulator would take minutes
@pytest.mark.usefixtures("chosen")
def test_the_longest_sum_of_minus_128() -> None:
    k = kernels.int8_product.LONGEST_INT8_SUM + 1

    def ones(rows: int) -> Tensor:
        return torch.full((rows, k), -128, dtype=torch.int8)

    y = kernels.int8_matmul(ones(2), ones(3), torch.ones(2), torch.ones(3))
    assert torch.equal(y, torch.full((2, 3), k * 128.0**2))
