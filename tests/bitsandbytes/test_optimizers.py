"""``bitsandbytes.optim``: every name steps, the real one's checkpoints load, and overrides reach single parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit_lightning.bitsandbytes as bnb
from lowbit_lightning import optim

real: Any = pytest.importorskip("bitsandbytes")
NAMES = sorted(set(bnb.optim.__all__) - {"GlobalOptimManager"})
BROKEN = ("LAMB8bit", "LARS8bit", "AdEMAMix32bit")  # left out: AdEMAMix32bit raises; the others are for GPUs alone
LOADED = [name for name in NAMES if "Paged" not in name and name not in BROKEN]


@pytest.fixture(autouse=True)
def _no_overrides() -> None:
    bnb.optim.GlobalOptimManager.get_instance().initialize()


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(64, 256)), nn.Parameter(torch.randn(64))]


def build(module: Any, name: str, params: list[nn.Parameter]) -> Any:
    more = {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    return getattr(module, name)(params, lr=1e-3, **more)


def step(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:parameters are on the CPU:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_steps(name: str) -> None:
    params = parameters()
    before = [p.clone() for p in params]
    optimizer = build(bnb.optim, name, params)
    step(optimizer, params, 1)
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
    bits = 8 if name.endswith("8bit") else 32
    assert optimizer.param_groups[0]["bits"] == bits
    coded = [any(entry.endswith("_codes") for entry in optimizer.state[p]) for p in params]
    assert coded == [bits == 8, False]


@pytest.mark.parametrize("name", LOADED)
def test_checkpoints_of_the_real_one_load(name: str) -> None:
    params, twins = parameters(), parameters()
    theirs = build(real.optim, name, params)
    for seed in range(3):
        step(theirs, params, seed)
    saved = copy.deepcopy(theirs.state_dict())  # which the real one goes on to write to
    ours = build(bnb.optim, name, twins)
    ours.load_state_dict(saved)
    for p, twin in zip(params, twins, strict=True):
        twin.data.copy_(p.data)
    states = [kept for entries in ours.state_dict(bits=32)["state"].values() for kept in _tensors(entries)]
    wanted = [x for p in params for x in _decoded(theirs.state[p])]
    assert len(states) == len(wanted)
    for mine, other in zip(states, wanted, strict=True):
        assert torch.allclose(mine.flatten(), other.flatten(), atol=2e-2 * float(other.abs().max()))
    assert {float(entries["step"]) for entries in ours.state.values()} == {3.0}
    step(ours, twins, 3)
    assert all(torch.isfinite(p).all() for p in twins)
    if name.startswith(("Adam", "Lion", "SGD")) and not name.startswith("AdEMAMix"):
        step(theirs, params, 3)
        for p, twin in zip(params, twins, strict=True):
            assert float((p - twin).detach().norm()) < 2e-4 * float(p.detach().norm())


def _tensors(entries: dict[str, Any]) -> list[Tensor]:
    return [value for key, value in entries.items() if key != "step"]


def _decoded(entries: dict[str, Any]) -> list[Tensor]:
    """bitsandbytes' states of a parameter in float32; AdEMAMix stacks two."""
    found: list[Tensor] = []
    for number in (1, 2):
        state, absmax = entries.get(f"state{number}"), entries.get(f"absmax{number}")
        if state is None:
            continue
        if absmax is not None:
            state = entries[f"qmap{number}"][state.int()] * absmax.repeat_interleave(256).view(state.shape)
        found += list(state) if state.ndim == 3 or (state.ndim == 2 and state.shape[0] == 2) else [state]
    return found


def test_overrides_of_a_step() -> None:
    params, twins = parameters() + parameters(), parameters() + parameters()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    optimizer = bnb.optim.AdamW8bit(params, lr=1e-2)
    manager.override_config(params[0], key_value_dict={"lr": 1e-3, "weight_decay": 0.5})
    manager.override_config([params[2], params[3]], "betas", (0.5, 0.9))
    groups = [
        {"params": twins[:1], "lr": 1e-3, "weight_decay": 0.5},
        {"params": twins[1:2]},
        {"params": twins[2:], "betas": (0.5, 0.9)},
    ]
    expected = optim.AdamW(groups, lr=1e-2)
    for seed in range(3):
        step(optimizer, params, seed)
        step(expected, twins, seed)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert len(optimizer.param_groups) == 1


def test_overrides_of_steps_inside_the_backward() -> None:
    module, twin = nn.Linear(64, 64), nn.Linear(64, 64)
    twin.load_state_dict(module.state_dict())
    bnb.optim.GlobalOptimManager.get_instance().override_config(module.weight, "lr", 0.0)
    optimizer = bnb.optim.Adam8bit(module.parameters(), lr=1e-2)
    optim.release_gradients(module, optimizer)
    module(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, twin.weight)
    assert not torch.equal(module.bias, twin.bias)


def test_overrides_of_bits_come_at_any_time() -> None:
    params = parameters()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_parameters(params)
    optimizer = bnb.optim.Adam(params, lr=1e-3, optim_bits=8)
    step(optimizer, params, 0)
    assert "exp_avg_codes" in optimizer.state[params[0]]
    manager.override_config(params[0], "optim_bits", 32)
    step(optimizer, params, 1)
    assert "exp_avg" in optimizer.state[params[0]]
    manager.initialize()
    step(optimizer, params, 2)
    assert "exp_avg_codes" in optimizer.state[params[0]]

    module = nn.Linear(256, 64)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = nn.Parameter(torch.randn(64, 256))  # as after sharding
    other = bnb.optim.Adam8bit(module.parameters())
    step(other, list(module.parameters()), 0)
    assert "exp_avg" in other.state[module.weight]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix32bit"])
def test_a_loaded_optimizer_shares_nothing_with_the_checkpoint(name: str) -> None:
    params = parameters()
    optimizer = build(bnb.optim, name, params)
    step(optimizer, params, 0)
    saved, ends = optimizer.state_dict(), []
    for _ in range(2):
        twins = parameters()
        twin = build(bnb.optim, name, twins)
        twin.load_state_dict(saved)
        step(twin, twins, 1)
        ends.append(twins)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, m: bnb.optim.Adam8bit(p, optim_bits=32),
            r"optim_bits must be left out: Adam8bit has 8 bits, got 32",
        ),
        (lambda p, m: bnb.optim.Adam(p, args={}), "args must be None"),
        (lambda p, m: bnb.optim.Adam(p, optim_bits=16), "bits must be 8 or 32, got 16"),
        (lambda p, m: bnb.optim.LAMB(p, max_unorm=0.5), r"max_unorm must be 1\.0, .* got 0\.5"),
        (lambda p, m: bnb.optim.LAMB8bit(p, amsgrad=True), "amsgrad=True is not served"),
        (lambda p, m: bnb.optim.LARS(p, 0.1, nesterov=True), "nesterov False"),
        (lambda p, m: bnb.optim.GlobalOptimManager(), "get_instance"),
        (lambda p, m: m.override_config(p, "min_8bit_size", 1), "'min_8bit_size' of single parameters is not served"),
        (lambda p, m: m.override_config(p, "lost", 1), "key must be one of .* got 'lost'"),
        (lambda p, m: m.override_config(p, "optim_bits", 16), "optim_bits must be 8 or 32, got 16"),
        (lambda p, m: m.override_config(p), "either key and value or key_value_dict"),
        (lambda p, m: m.override_config(["fc1"], "lr", 1.0), r"parameters must be tensors, got \['str'\]"),
        (lambda p, m: m.register_module_override(nn.Linear(2, 2), "lost", {"lr": 1}), "no attribute 'lost'"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    manager = bnb.optim.GlobalOptimManager.get_instance()
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError), match=message):
        call(parameters(), manager)
    assert not manager


def test_an_override_that_an_optimizer_lacks() -> None:
    params = parameters()
    bnb.optim.GlobalOptimManager.get_instance().override_config(params[0], "betas", (0.5, 0.5))
    with pytest.raises(ValueError, match=r"an override sets \['betas'\], but SGD has no such hyperparameter"):
        step(bnb.optim.SGD8bit(params, 0.1, momentum=0.9), params, 0)


def test_pages_on_a_cpu_warn() -> None:
    with pytest.warns(UserWarning, match="parameters are on the CPU: their states are not paged"):
        optimizer = bnb.optim.PagedAdamW8bit(parameters())
    assert not optimizer.param_groups[0]["paged"]
