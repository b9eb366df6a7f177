"""What the optimizers compute: against torch.optim, the papers in float64, and the error that the 8-bit maps allow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.optimizers import parameters, spread, twins, ulp, updates_beside_a_large_channel, values
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels import formats
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.reference import blockwise

TORCH = {optim.AdamW: torch.optim.AdamW, optim.SGD: torch.optim.SGD}
SHAPES = ((16, 512), (300,), (5, 77), (3,), ())
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
CASES: list[tuple[type, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True}),
    (optim.AdamW, {"maximize": True, "weight_decay": 0.5}),
    (optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0, "lr": 0.02}),
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (optim.SGD, MOMENTUM),
    (optim.SGD, {**MOMENTUM, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {**MOMENTUM, "nesterov": True}),
    (optim.SGD, {**MOMENTUM, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
]


# -- 32 bits: torch.optim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_100_steps_follow_torch(kind: type, options: dict[str, Any]) -> None:
    ours = parameters(*SHAPES)
    theirs = twins(ours)
    a, b = kind(ours, bits=32, **options), TORCH[kind](theirs, **options)
    for _ in range(100):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = spread(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for new, expected in zip(values(ours), values(theirs), strict=True):
        if new.numel() >= 100:  # a few elements can come to lie near zero, where nothing is relative
            assert (new - expected).norm() <= 1e-6 * expected.norm()
        assert (new - expected).norm() <= 1e-6 * max(float(expected.norm()), 100 * options.get("lr", 1e-3))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_one_step_is_torchs_to_the_last_places(kind: type, options: dict[str, Any]) -> None:
    before = torch.randn(256, 256)
    p, q = Parameter(before.clone()), Parameter(before.clone())
    p.grad, q.grad = (g := spread(p)), g.clone()
    kind([p], bits=32, **options).step()
    TORCH[kind]([q], **options).step()
    new, expected = p.detach(), q.detach()
    off = (new - expected).abs() / ulp(torch.maximum(expected.abs(), (expected - before).abs()))
    assert off.max() <= 2


# -- 8 bits: the error that the maps allow -----------------------------------------------------------------------------


def half_steps(x: Tensor, codebook: str) -> Tensor:
    """The largest error of a round trip of x through an 8-bit map: half the gap between the codes beside ``x / scale``.

    From the codebook's sorted values alone. Below the smallest positive code of the unsigned map the error is that
    code at most, since positive values never become zero.
    """
    table = formats.codebook(codebook).double()
    grid = BlockGrid.of(x.shape)
    blocks = x.double().view(grid.rows, grid.blocks_per_row, grid.block_size)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    y = blocks / extreme if table[0] < 0 else blocks / extreme.abs()
    above = torch.bucketize(y, table).clamp(1, len(table) - 1)
    gap = (table[above] - table[above - 1]) / 2
    if table[0] == 0:
        gap = torch.where(above == 1, table[1], gap)
    return (gap * extreme.abs() * (1 + 1e-6)).reshape(x.shape)


def test_second_update_lies_within_the_maps_error() -> None:
    """After one 8-bit step the states are off by half a step of their maps at most; the second update shows no more.

    Each element's update is bounded by interval arithmetic in float64. The bound is nearly reached, and 8 bits spent
    evenly (a linear map) break it on most elements: a worse map would not pass.
    """
    (p,) = parameters((64, 512))
    optimizer = optim.AdamW([p], lr=1e-2, weight_decay=0.0)
    first, second = spread(p), spread(p)
    p.grad = first
    optimizer.step()
    before = p.detach().double()
    p.grad = second
    optimizer.step()
    update = before - p.detach().double()

    m, v = 0.1 * first.double(), 0.001 * first.double().square()

    def bounds(m_error: Tensor, v_error: Tensor) -> tuple[Tensor, Tensor]:
        g = second.double()
        low_m, high_m = (0.9 * (m + sign * m_error) + 0.1 * g for sign in (-1, 1))
        low_v, high_v = (0.999 * (v + sign * v_error).clamp(min=0) + 0.001 * g.square() for sign in (-1, 1))
        ends = torch.stack(
            [
                1e-2 * top / (1 - 0.9**2) / ((bottom / (1 - 0.999**2)).sqrt() + 1e-8)
                for top in (low_m, high_m)
                for bottom in (low_v, high_v)
            ]
        )
        return ends.amin(0), ends.amax(0)

    low, high = bounds(half_steps(m, "dynamic_signed"), half_steps(v, "dynamic_unsigned"))
    slack = 4 * ulp(torch.maximum(before.abs(), update.abs()).float()).double()
    assert ((update >= low - slack) & (update <= high + slack)).all()
    exact = sum(bounds(torch.zeros_like(m), torch.zeros_like(v))) / 2
    used = ((update - exact).abs() / torch.maximum(high - exact, exact - low))[high - low > 100 * slack]
    assert used.max() > 0.9  # the bound is no larger than it must be
    worse = bounds(half_steps(m, "linear"), half_steps(v, "linear_unsigned"))
    assert ((worse[1] - worse[0]) > 2 * (high - low)).float().mean() > 0.5


def updates(steps: int) -> Tensor:
    return updates_beside_a_large_channel(
        partial(optim.AdamW, weight_decay=0.0), partial(torch.optim.AdamW, weight_decay=0.0), rows=64, steps=steps
    )


def test_updates_beside_a_channel_1000_times_larger() -> None:
    ratios = updates(100)
    assert ratios.max() < 1.5
    assert ratios.min() > 1 / 1.5


def test_that_test_finds_second_moments_that_round_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = blockwise._encode

    def nearest(x: Tensor, inverse: Tensor, codebook: str, table: Tensor | None) -> Tensor:
        codes = encode(x, inverse, codebook, table)
        smallest = float(formats.dynamic_map("dynamic_unsigned").low)
        return torch.where(x * inverse < smallest / 2, 0, codes) if codebook == "dynamic_unsigned" else codes

    monkeypatch.setattr(blockwise, "_encode", nearest)
    with kernels.use_backend("reference"):
        assert updates(5).max() > 10


# -- LAMB, after the paper ---------------------------------------------------------------------------------------------


def lamb_step(x: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, options: dict[str, Any]) -> Tensor:
    """Algorithm 2 of You et al., 2020, in float64, phi the identity; m and v are changed in place."""
    lr, eps, decay, (beta1, beta2) = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g * g)
    r = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    direction = r + decay * x
    x_norm, norm = x.norm(), direction.norm()
    trust = x_norm / norm if x_norm > 0 and norm > 0 else 1.0
    return x - lr * trust * direction


def test_lamb_is_the_papers() -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    params = [*parameters((64, 512), (5, 77), (33,)), Parameter(torch.zeros(40, 70)), Parameter(torch.zeros(4))]
    expected = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in expected]
    optimizer = optim.LAMB(params, bits=32, **options)  # type: ignore[arg-type]
    for t in range(1, 21):
        for i, p in enumerate(params):
            p.grad = spread(p) if i < 4 else torch.zeros(4)  # the last: nothing anywhere, no trust ratio
            expected[i] = lamb_step(expected[i], p.grad.double(), *moments[i], t, options)
        optimizer.step()
        for p, x in zip(params, expected, strict=True):
            assert (p.detach() - x).norm() <= 1e-6 * x.norm()
    assert not params[4].any()


def test_8_bit_lambs_first_step_is_the_papers() -> None:
    options = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    (p,) = parameters((64, 512))
    x = p.detach().double()
    p.grad = spread(p)
    expected = lamb_step(x, p.grad.double(), torch.zeros_like(x), torch.zeros_like(x), 1, options)
    optim.LAMB([p], **options).step()  # type: ignore[arg-type]
    assert (p.detach() - expected).norm() <= 1e-6 * expected.norm()


# -- what must not move, and what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [(optim.AdamW, {}), (optim.AdamW, {"amsgrad": True}), (optim.LAMB, {}), (optim.SGD, MOMENTUM)]
)
def test_elements_without_gradient_never_move(kind: type, options: dict[str, Any]) -> None:
    """Beside active ones, in the same blocks: zero encodes to zero exactly (bitsandbytes' CPU path moves them)."""
    p = Parameter(torch.randn(16, 512))
    optimizer = kind([p], **{"weight_decay": 0.0, **options})
    still = torch.rand(16, 512) < 0.5
    still[3] = True
    before = p.detach().clone()
    for _ in range(200):
        p.grad = torch.where(still, 0.0, spread(p))
        optimizer.step()
    assert torch.equal(p.detach()[still], before[still])
    assert (p.detach()[~still] != before[~still]).all()


@pytest.mark.parametrize(("shape", "exact"), [((64, 1024), 1 + 4 / 256), ((301, 513), None), ((4097,), None)])
def test_state_bytes(shape: tuple[int, ...], exact: float | None) -> None:
    (p,) = parameters(shape)
    p.grad = spread(p)
    optimizer = optim.AdamW([p])
    optimizer.step()
    state = {name: x for name, x in optimizer.state[p].items() if name != "step"}
    taken = sum(x.numel() * x.element_size() for x in state.values())
    rows, length = (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
    assert taken == 2 * (rows * length + 4 * rows * -(-length // 256))
    assert exact is None or taken == 2 * exact * p.numel()
    assert set(state) == {"exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}


@pytest.mark.parametrize(
    ("shape", "bits"), [((64, 64), 8), ((65, 63), 32), ((63, 65), 32), ((8, 8, 8, 8), 8), ((64, 8, 9), 8), ((4096,), 8)]
)
def test_which_parameters_get_8_bits(shape: tuple[int, ...], bits: int) -> None:
    """At least ``min_size`` elements in rows of at least 64."""
    (p,) = parameters(shape)
    p.grad = spread(p)
    optimizer = optim.AdamW([p])
    with kernels.use_backend("reference"):
        optimizer.step()
    assert ("exp_avg" in optimizer.state[p]) == (bits == 32)
    assert ("exp_avg_codes" in optimizer.state[p]) == (bits == 8)
