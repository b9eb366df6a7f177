"""Half-precision parameters: rounding to nearest against float64, and stochastic rounding against its statistics."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import parameters, spread, twins, values
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim

BFLOAT16_STEP = 2.0**-7  # between bfloat16 numbers in [1, 2)


def adamw_in_float64(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
    """Loshchilov & Hutter, 2019, with torch's defaults; m and v change in place, the new p is returned."""
    m.lerp_(g.double(), 0.1)
    v.mul_(0.999).addcmul_(g.double(), g.double(), value=0.001)
    p = p.double() * (1 - 1e-3 * 0.01)
    return p - 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_parameters_are_rounded_once(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Everything is float32 until the parameter is written: the float64 result rounded, but for ties within an ulp."""
    p = torch.randn(64, 512).to(dtype)
    m, v = torch.zeros(64, 512).double(), torch.zeros(64, 512).double()
    states = [[torch.zeros(64, 512)], [torch.zeros(64, 512)]]
    steps = [torch.zeros(())]
    for t in range(1, 6):
        g = spread(p).to(grad_dtype)
        expected = adamw_in_float64(p, g, m, v, t).to(dtype)
        hyper = [1e-3, 0.9, 0.999, 1e-8, 0.01]
        arguments = kernels.StepArguments("adamw", [p], steps, states, states)
        with kernels.use_backend("reference"):
            kernels.optimizer_step(arguments, [g], kernels.StepScalars(hyper))
        assert p.dtype == dtype
        off = (p.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert off.max() <= 1
        assert (off != 0).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 32])
def test_optimizers_keep_the_parameters_dtype_and_float32_states(dtype: torch.dtype, bits: int) -> None:
    params = parameters((16, 512), (300,), dtype=dtype)
    masters = [Parameter(p.detach().float()) for p in params]
    a, b = optim.AdamW(params, lr=0.05, bits=bits), optim.AdamW(masters, lr=0.05, bits=bits)
    with kernels.use_backend("reference"):
        for _ in range(3):
            for p, q in zip(params, masters, strict=True):
                p.grad = spread(p)
                q.grad = p.grad.float()
            a.step()
            b.step()
    for p, q in zip(params, masters, strict=True):
        assert p.dtype == dtype
        assert {x.dtype for x in a.state[p].values()} <= {torch.float32, torch.uint8}
        for name, x in a.state[p].items():  # weight decay is not in them: they never see the parameter's rounding
            assert torch.equal(x, b.state[q][name])
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # three of them, on the way that three steps go
        assert ((p.detach() - q.detach()).abs() <= 3 * rounding * (q.detach().abs() + 0.2)).all()


def sgd(p: Parameter, *, lr: float = 1.0, **options: int) -> optim.SGD:
    return optim.SGD([p], lr=lr, stochastic_rounding=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stochastic_rounding_is_unbiased(backend: str) -> None:
    """Every column aims at another fraction between two bfloat16 numbers; means lie within 3 standard errors.

    So do signs and exponents: fractions of the step of [1, 2) and of [-4, -2).
    """
    rows, columns = 8192, 16
    fraction = torch.arange(columns) / columns + 1 / 64
    for start, size in ((1.0, BFLOAT16_STEP), (-2.0, -2 * BFLOAT16_STEP)):
        p = Parameter(torch.full((rows, columns), start, dtype=torch.bfloat16))
        p.grad = (-size * fraction).to(torch.bfloat16).expand(rows, columns).contiguous()
        exact = -p.grad[0].double() / size  # what bfloat16 keeps of the fraction
        with kernels.use_backend(backend):
            sgd(p, seed=3).step()
        up = (p.detach().double() - start) / size
        assert set(up.unique().tolist()) == {0.0, 1.0}
        error = (exact * (1 - exact) / rows).sqrt()
        assert ((up.mean(0) - exact).abs() <= 3 * error).all()
        whole = (exact * (1 - exact)).sum().div(rows * columns**2).sqrt()
        assert (up.mean() - exact.mean()).abs() <= 3 * whole


def test_rounding_to_nearest_loses_what_stochastic_rounding_keeps() -> None:
    """100 steps of a hundredth of half a bfloat16 step each."""
    start = torch.ones(64, 64, dtype=torch.bfloat16)
    nearest, stochastic = Parameter(start.clone()), Parameter(start.clone())
    a = optim.SGD([nearest], lr=1.0)
    b = sgd(stochastic)
    with kernels.use_backend("reference"):
        for _ in range(100):
            nearest.grad = torch.full_like(start, -BFLOAT16_STEP / 128)
            stochastic.grad = nearest.grad.clone()
            a.step()
            b.step()
    assert torch.equal(nearest.detach(), start)
    gained = (stochastic.detach().double().mean() - 1) / (100 * BFLOAT16_STEP / 128)
    error = (100 / 128 * (1 - 1 / 128) / 4096) ** 0.5 / (100 / 128)
    assert abs(gained - 1) <= 4 * error


def rounded(p: Parameter, backend: str, **options: int) -> list[Tensor]:
    """The parameter after each of three steps."""
    q = twins([p])[0]
    optimizer = optim.AdamW([q], stochastic_rounding=True, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    result = []
    with kernels.use_backend(backend):
        for _ in range(3):
            q.grad = torch.randn(q.shape, generator=generator).to(torch.bfloat16)
            optimizer.step()
            result.append(values([q])[0])
    return result


def test_backends_round_alike() -> None:
    (p,) = parameters((37, 300), dtype=torch.bfloat16)
    for a, b in zip(rounded(p, "reference"), rounded(p, "cpu"), strict=True):
        assert torch.equal(a, b)


def test_random_words_depend_on_seed_parameter_and_step() -> None:
    p = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    half = torch.full_like(p, -BFLOAT16_STEP / 2)

    def ups(ordinal: int = 0, steps: int = 1, **options: int) -> Tensor:
        params = [Parameter(p.detach().clone()) for _ in range(ordinal + 1)]
        optimizer = optim.SGD(params, lr=1.0, stochastic_rounding=True, **options)  # type: ignore[arg-type]
        for _ in range(steps):
            params[-1].data = p.detach().clone()
            params[-1].grad = half
            optimizer.step()
        return params[-1].detach() > 1

    with kernels.use_backend("reference"):
        first = ups()
        assert torch.equal(first, ups())
        for other in (ups(seed=1), ups(seed=2**32), ups(ordinal=1), ups(steps=2)):
            # two independent coins agree half the time: 2048 of 4096, standard deviation 32
            assert abs(int((first == other).sum()) - 2048) < 4 * 32
