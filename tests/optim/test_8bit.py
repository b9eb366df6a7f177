"""The whole family in 8 bits against itself in 32: real training, hard states, what must not move, what it costs."""

from __future__ import annotations

import copy
import sysconfig
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.optimizers import parameters, spread, step, twins, updates_beside_a_large_channel, values
from torch import Tensor, nn
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels import rules

MIX = {"t_alpha": 200, "t_beta3": 200}
FAMILY: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 2e-3}),
    ("Adam", {"lr": 2e-3, "amsgrad": True}),
    ("AdamW", {"lr": 2e-3}),
    ("RMSprop", {"lr": 1e-3}),
    ("RMSprop", {"lr": 5e-4, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 1e-2}),
    ("Lion", {"lr": 3e-4}),
    ("LAMB", {"lr": 1e-2}),
    ("LARS", {"lr": 0.3, "trust_coefficient": 1e-2}),
    ("AdEMAMix", {"lr": 3e-4}),
    ("AdEMAMix", {"lr": 3e-4, **MIX}),
]


def name(case: Any) -> str:
    return str(case) if not isinstance(case, dict) else ",".join(f"{k}={v}" for k, v in case.items()) or "defaults"


# -- training on real text ---------------------------------------------------------------------------------------------

CONTEXT = 8


@cache
def text() -> Tensor:
    """Python source from the standard library, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [(folder / f"{module}.py").read_bytes() for module in ("argparse", "ast", "inspect", "tarfile", "typing")]
    return torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).long()


def batch(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    start = torch.randint(0, len(text()) - CONTEXT - 1, (size, 1), generator=generator)
    window = text()[start + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


def loss_after_200_steps(kind: str, bits: int, seed: int, **options: Any) -> float:
    """Of a small language model over bytes, on 4096 windows that are the same for all."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 128), nn.GELU(), nn.LayerNorm(128)]
    model = nn.Sequential(*layers, nn.Linear(128, 256))
    optimizer = getattr(optim, kind)(model.parameters(), bits=bits, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        x, y = batch(generator, 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = batch(torch.Generator().manual_seed(99), 4096)
        return float(nn.functional.cross_entropy(model(x), y))


@pytest.mark.parametrize(("kind", "options"), FAMILY, ids=name)
def test_loss_after_200_steps_is_that_of_32_bits(kind: str, options: dict[str, Any]) -> None:
    for seed in (0, 1):
        full = loss_after_200_steps(kind, 32, seed, **options)
        low = loss_after_200_steps(kind, 8, seed, **options)
        assert full < 3.6  # it has learned: 5.5 at the start
        assert abs(low / full - 1) < 0.01


# -- hard states -------------------------------------------------------------------------------------------------------

SECOND_MOMENTS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"weight_decay": 0.0}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {}),
    ("LAMB", {"weight_decay": 0.0}),
    ("AdEMAMix", {"weight_decay": 0.0}),
    ("AdEMAMix", {"weight_decay": 0.0, "t_alpha": 20, "t_beta3": 20}),
]


@pytest.mark.parametrize(("kind", "options"), SECOND_MOMENTS, ids=name)
def test_updates_beside_a_channel_1000_times_larger(kind: str, options: dict[str, Any]) -> None:
    cls = getattr(optim, kind)
    ratios = updates_beside_a_large_channel(
        partial(cls, **options), partial(cls, bits=32, **options), rows=256, steps=60
    )
    assert ratios.max() < 1.5
    assert ratios.min() > 1 / 1.5


@pytest.mark.parametrize(
    ("kind", "state", "options", "tolerance"),
    [
        ("Adagrad", "sum", {}, 0.1),
        ("AdamW", "exp_avg_sq", {"betas": (0.9, 0.9999)}, 0.1),
        ("Lion", "exp_avg", {}, 0.15),
        ("AdEMAMix", "exp_avg_slow", {}, 1e-6),
    ],
)
def test_states_do_not_stand_still(kind: str, state: str, options: dict[str, Any], tolerance: float) -> None:
    """After 3000 steps, where a step's share of a sum or slow mean has become less than the maps resolve.

    A block's extreme is stored exactly, and the others keep their ratio to it. AdEMAMix's slow momentum, of changing
    sign, would be off by half: it is kept in 32 bits.
    """
    (p,) = parameters((8, 512))
    (q,) = twins([p])
    a = getattr(optim, kind)([p], lr=0.0, **options)
    b = getattr(optim, kind)([q], lr=0.0, bits=32, **options)
    size = torch.randn(8, 512).exp()
    for _ in range(3000):
        p.grad = q.grad = size * torch.randn(8, 512)
        a.step()
        b.step()
    low, full = a.state_dict(bits=32)["state"][0][state], b.state[q][state]
    assert (low - full).norm() < tolerance * full.norm()


# -- 8 to 32 to 8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), FAMILY, ids=name)
def test_to_32_bits_and_back_is_exact(kind: str, options: dict[str, Any]) -> None:
    params = parameters((16, 512), (31, 130), (300,))
    first = getattr(optim, kind)(params, **options)
    for i in range(3):
        step(first, params, i)
    full = getattr(optim, kind)(twins(params), bits=32, **options)
    full.load_state_dict(copy.deepcopy(first.state_dict()))  # loading takes tensors as they are, as torch does
    others = twins(params)
    second = getattr(optim, kind)(others, **options)
    second.load_state_dict(copy.deepcopy(full.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert first.state[p].keys() == second.state[q].keys()
        assert all(torch.equal(x, second.state[q][key]) for key, x in first.state[p].items())
    step(first, params)
    step(second, others)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(("kind", "options"), FAMILY, ids=name)
def test_changing_bits_in_mid_run_keeps_close_to_32(kind: str, options: dict[str, Any]) -> None:
    ours = parameters((16, 512), (300,))
    theirs = twins(ours)
    a, b = getattr(optim, kind)(ours, **options), getattr(optim, kind)(theirs, bits=32, **options)
    before = [p.detach().clone() for p in theirs]
    for i in range(30):
        a.param_groups[0]["bits"] = 32 if 10 <= i < 20 else 8
        step(a, ours, i)
        step(b, theirs, i)
        assert any(key.endswith("_codes") for key in a.state[ours[0]]) == (not 10 <= i < 20)
    moved = (theirs[0].detach() - before[0]).norm()
    assert (ours[0].detach() - theirs[0].detach()).norm() < 0.1 * moved


# -- what must not move ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), FAMILY, ids=name)
@pytest.mark.parametrize("bits", [8, 32])
def test_elements_without_gradient_never_move(kind: str, options: dict[str, Any], bits: int) -> None:
    """Beside active ones, in the same blocks; nor do parameters whose gradient is zero altogether."""
    params = parameters((16, 512), (8, 512), (33,))
    optimizer = getattr(optim, kind)(params, **{"bits": bits, **options, "weight_decay": 0.0})
    still = torch.rand(16, 512) < 0.5
    still[3] = True
    before = [p.detach().clone() for p in params]
    for _ in range(100):
        params[0].grad = torch.where(still, 0.0, spread(params[0]))
        params[1].grad, params[2].grad = torch.zeros(8, 512), torch.zeros(33)
        optimizer.step()
    assert torch.equal(params[0].detach()[still], before[0][still])
    assert (params[0].detach() != before[0])[~still].float().mean() > 0.9  # Lion's signs may add up to zero
    assert all(torch.equal(p.detach(), old) for p, old in zip(params[1:], before[1:], strict=True))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", ["AdamW", "Lion", "AdEMAMix"])
def test_decoupled_decay_is_all_that_moves_them(kind: str, bits: int) -> None:
    (p,) = parameters((16, 512))
    optimizer = getattr(optim, kind)([p], lr=0.01, weight_decay=0.5, bits=bits)
    still = torch.rand(16, 512) < 0.5
    before = p.detach().double()
    for _ in range(20):
        p.grad = torch.where(still, 0.0, spread(p))
        optimizer.step()
    expected = before * (1 - 0.01 * 0.5) ** 20
    assert ((p.detach() - expected).abs()[still] <= 2e-6 * expected.abs()[still]).all()


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize(("kind", "options"), FAMILY, ids=name)
def test_state_bytes(kind: str, options: dict[str, Any], block_size: int) -> None:
    """One byte per element and four per block; AdEMAMix's slow momentum four per element; nothing else but a count."""
    params = parameters((64, 1024), (31, 513), (4097,), (17, 63))
    optimizer = getattr(optim, kind)(params, block_size=block_size, **options)
    rule = rules.get(optimizer._rule(optimizer.param_groups[0]))
    with kernels.use_backend("reference"):
        step(optimizer, params)
    coded = len(rule.states) - (kind == "AdEMAMix")
    slow = int(kind == "AdEMAMix")
    for p, (rows, length) in zip(params[:3], [(64, 1024), (31, 513), (1, 4097)], strict=True):
        expected = coded * (rows * length + 4 * rows * -(-length // block_size)) + slow * 4 * rows * length
        taken = sum(x.numel() * x.element_size() for x in optimizer.state[p].values())
        assert taken == expected + 4
    small = sum(x.numel() * x.element_size() for x in optimizer.state[params[3]].values())
    assert small == 4 * 17 * 63 * len(rule.states) + 4


def test_sgd_without_momentum_keeps_only_a_count() -> None:
    (p,) = parameters((64, 1024))
    optimizer = optim.SGD([p])
    step(optimizer, [p])
    assert {k: v.numel() for k, v in optimizer.state[p].items()} == {"step": 1}


def test_non_negative_states_use_the_unsigned_map() -> None:
    (p,) = parameters((64, 1024))
    wanted = {
        "Adam": {"exp_avg": "dynamic_signed", "exp_avg_sq": "dynamic_unsigned"},
        "RMSprop": {"square_avg": "dynamic_unsigned"},
        "Adagrad": {"sum": "dynamic_unsigned"},
        "Lion": {"exp_avg": "dynamic_signed"},
        "LARS": {"momentum_buffer": "dynamic_signed"},
    }
    for kind, maps in wanted.items():
        optimizer = getattr(optim, kind)([Parameter(p.detach())])
        assert optimizer.state_dict()["param_groups"][0]["state_format"]["maps"] == maps


def test_a_centered_variance_has_a_floor_in_8_bits_alone() -> None:
    """A small parameter beside a large one keeps 32-bit states, and torch's update. Gradients vary little about 1."""
    ours = parameters((16, 512), (300,))
    theirs = twins(ours)
    options: dict[str, Any] = {"alpha": 0.5, "centered": True, "lr": 1e-3}
    a, b = optim.RMSprop(ours, **options), torch.optim.RMSprop(theirs, **options)
    start = values(ours)
    for _ in range(40):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = 1 + 0.05 * torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    moved = [((p.detach() - x).norm() / (q.detach() - x).norm()) for p, q, x in zip(ours, theirs, start, strict=True)]
    assert moved[0] < 0.9, "the floor holds nothing here: variances are too large"
    assert float(moved[1]) == pytest.approx(1.0, abs=1e-3)
    assert "square_avg" in a.state[ours[1]]
