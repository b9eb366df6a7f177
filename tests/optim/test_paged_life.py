"""Paged optimizers whose groups, settings and states are changed while they live; what goes wrong, goes wrong before
anything is changed."""

from __future__ import annotations

import copy
import gc
import pkgutil
import sys
import warnings
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.optimizers import step
from support.paged_engine import Engine, lying_in_wait
from torch import nn
from torch.nn import Parameter

from lowbit_lightning import optim
from lowbit_lightning.state import blocks
from lowbit_lightning.state.pages import Entries, file, raw
from lowbit_lightning.strategies import checkpoints
from lowbit_lightning.strategies.optimizers import adapt

linux = pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")


def parameters(count: int = 3) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(128, 160, generator=generator)) for _ in range(count)]


def steps(params: list[Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        step(optimizer, params, number)


def equal_states(a: Any, b: Any) -> bool:
    return all(torch.equal(value, b[key][name]) for key, entries in a.items() for name, value in entries.items())


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 0, "disc", None])
def test_a_setting_that_is_none_is_refused_in_a_step_too(value: Any) -> None:
    with lying_in_wait():
        params = parameters()
        optimizer = optim.AdamW(params, paged=True)
        steps(params, optimizer, range(1))
        before = [p.detach().clone() for p in params]
        optimizer.param_groups[0]["paged"] = value
        with pytest.raises(ValueError, match=f'paged must be False, True .* or "disk", got {value!r}'):
            steps(params, optimizer, range(1, 2))
        assert all(map(torch.equal, params, before))
    with pytest.raises(ValueError, match="paged must be"):
        optim.AdamW(params, paged=value)


def test_groups_that_come_later_are_paged_as_the_strategy_says() -> None:
    with lying_in_wait():
        params = parameters()
        optimizer = torch.optim.AdamW(params[:1])
        adapt(optimizer, 8, {"paged": True, "resident": "10KB", "page_dir": None}, "lowbit_sharded_paged")
        steps(params[:1], optimizer, range(1))
        optimizer.add_param_group({"params": params[1:2]})
        optimizer.param_groups[0]["resident"] = optimizer.param_groups[1]["resident"] = "20KB"
        optimizer.add_param_group({"params": params[2:]})
        steps(params, optimizer, range(1, 3))
        assert all(isinstance(optimizer.state[p], Entries) for p in params)
        assert optimizer.param_groups[2]["resident"] == "20KB"
        with pytest.raises(ValueError, match="equal in all param groups"):
            optimizer.add_param_group({"params": parameters(1), "resident": 5})
        assert len(optimizer.param_groups) == 3


@linux
def test_a_disk_too_small_for_all_groups_is_seen_before_training(
    page_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(2)
    size = 2 * params[0].numel()  # bytes of a group's states
    paging: dict[str, Any] = {"paged": "disk", "resident": 0, "page_dir": str(page_dir)}
    groups = [{"params": [p]} for p in params]

    free = 3 * size // 2

    def is_refused(build: Any) -> None:
        with pytest.raises(OSError, match=f"needs {2 * size:,} bytes in {page_dir}, where {free:,} are free"):
            build()

    theirs = torch.optim.AdamW(copy.copy(groups))
    ours = optim.AdamW(copy.copy(groups))
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    is_refused(lambda: optim.AdamW(copy.copy(groups), **paging))
    is_refused(lambda: optim.convert_(theirs, **{k: v for k, v in paging.items() if k != "resident"}))
    assert type(theirs) is torch.optim.AdamW
    is_refused(lambda: adapt(ours, 8, paging, "lowbit_sharded"))
    assert not any(group["paged"] for group in (ours.defaults, *ours.param_groups))
    params[1].requires_grad_(False)
    optim.AdamW(copy.copy(groups), **paging)  # what is not trained takes no room


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), [(True, False), (False, True), (True, True)])
def test_what_a_live_optimizer_gave_is_not_shared_with_it(theirs: bool, ours: bool) -> None:
    results = []
    for through in (lambda saved: saved, copy.deepcopy):
        with lying_in_wait():
            left, right = parameters(), parameters()
            giver, taker = optim.AdamW(left, paged=theirs), optim.AdamW(right, paged=ours)
            steps(left, giver, range(1))
            taker.load_state_dict(through(giver.state_dict()))
            for number in range(1, 4):
                step(giver, left, number)
                step(taker, right, 10 + number)
            results.append([*left, *right])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("saved", "wanted"), [(8, 32), (32, 8)])
def test_a_load_converts_one_parameter_at_a_time(saved: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: Counter[int] = Counter()
    most = 0
    convert = blocks.convert

    def counted(*arguments: Any) -> Any:
        nonlocal most
        result = convert(*arguments)
        for value in result.values():
            alive[0] += value.nbytes
            weakref.finalize(value, alive.subtract, {0: value.nbytes})
        most = max(most, alive[0])
        return result

    params = parameters(12)
    giver = optim.AdamW(params, bits=saved)
    steps(params, giver, range(1))
    with lying_in_wait():
        taker = optim.AdamW(params, bits=wanted, paged=True)
        monkeypatch.setattr(blocks, "convert", counted)
        taker.load_state_dict(giver.state_dict())
        size = params[0].numel() * 2 * wanted // 8
        assert size <= most < 3 * size
        monkeypatch.setattr(blocks, "convert", convert)
        plain = optim.AdamW(params, bits=wanted)
        plain.load_state_dict(giver.state_dict())
        assert equal_states(taker.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("bits", [8, 32])
def test_a_load_that_does_not_fit_changes_nothing(bits: int) -> None:
    with lying_in_wait():
        params = parameters()
        optimizer = optim.AdamW(params, bits=bits, paged=True)
        steps(params, optimizer, range(1))
        good = copy.deepcopy(optimizer.state_dict())
        steps(params, optimizer, range(1, 3))
        before, groups = copy.deepcopy(optimizer.state_dict()["state"]), optimizer.param_groups
        name = "exp_avg_sq_codes" if bits == 8 else "exp_avg_sq"
        for spoilt in (None, torch.zeros(7), "missing"):
            bad = {**good, "state": {key: dict(entries) for key, entries in good["state"].items()}}
            bad["state"][2][name] = spoilt
            if spoilt == "missing":
                del bad["state"][2][name]
            with pytest.raises(ValueError, match=name):
                optimizer.load_state_dict(bad)
            assert optimizer.param_groups is groups
            assert equal_states(before, optimizer.state_dict()["state"])
        optimizer.load_state_dict(good)
        assert equal_states(good["state"], optimizer.state_dict()["state"])


def test_a_strategy_places_no_paged_states_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once they would be where they do not fit: in memory, or on the GPU."""

    def places(*_: Any) -> None:
        raise AssertionError

    params = parameters()
    giver = optim.AdamW(params)
    steps(params, giver, range(1))
    saved = giver.state_dict()
    with lying_in_wait():
        taker = optim.AdamW(params, paged=True)
        monkeypatch.setattr(checkpoints, "_placed_as", places)
        checkpoints.load_optimizers([taker], {"optimizer_states": [saved]}, "a file")
        assert equal_states(saved["state"], taker.state_dict()["state"])


def test_a_load_is_what_a_failed_pager_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with lying_in_wait() as stream:
        params, twins = parameters(), parameters()
        optimizer, plain = optim.AdamW(params, paged=True), optim.AdamW(twins)
        for these, one in ((params, optimizer), (twins, plain)):
            steps(these, one, range(2))
        good = copy.deepcopy(optimizer.state_dict())
        weights = [p.detach().clone() for p in params]

        def broken(*_: Any, **__: Any) -> Any:
            raise OSError("the disk is broken")

        for call in ("fetch", "store", "wait", "settle"):
            monkeypatch.setattr(stream.engines[0], call, broken)
        with pytest.raises(OSError, match="broken"):
            step(optimizer, params, 2)
        with torch.no_grad():
            for p, value in zip(params, weights, strict=True):
                p.copy_(value)
        optimizer.load_state_dict(good)
        for these, one in ((params, optimizer), (twins, plain)):
            steps(these, one, range(2, 4))
        assert all(map(torch.equal, params, twins))


def fails_at(number: int, call: Any, error: BaseException) -> Any:
    """``call``, but for the time of that number, which raises ``error``."""
    calls = iter(range(10**6))

    def counted(*arguments: Any) -> Any:
        if next(calls) == number:
            raise error
        return call(*arguments)

    return counted


@pytest.mark.parametrize("error", [OSError("no room"), MemoryError("no room"), KeyboardInterrupt("no room")])
@pytest.mark.parametrize(
    ("name", "number"), [("state.pagers.Pager", 0), ("state.blocks.convert", 3), ("state.pages.Pager.write", 1)]
)
def test_a_load_that_fails_halfway_changes_nothing(
    name: str, number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lying_in_wait():
        params, twins = parameters(), parameters()
        optimizer, plain = optim.AdamW(params, paged=True), optim.AdamW(twins)
        steps(params, optimizer, range(1))
        good = copy.deepcopy(optimizer.state_dict())
        steps(params, optimizer, range(1, 3))
        steps(twins, plain, range(3))
        fresh = optim.AdamW(parameters(), paged=True)
        groups, statistics = optimizer.param_groups, optimizer.page_statistics()
        for one in (optimizer, fresh):
            with monkeypatch.context() as patch, pytest.raises(type(error), match="no room"):
                owner, _, attribute = f"lowbit_lightning.{name}".rpartition(".")
                call = getattr(pkgutil.resolve_name(owner), attribute)
                patch.setattr(f"{owner}.{attribute}", fails_at(number, call, error))
                one.load_state_dict(good)
        assert not fresh.state
        assert fresh.page_statistics() is None
        assert optimizer.param_groups is groups
        assert optimizer.page_statistics() == statistics
        for each, one in ((params, optimizer), (twins, plain)):
            step(one, each, 3)
        assert all(map(torch.equal, params, twins))
        assert equal_states(plain.state_dict()["state"], optimizer.state_dict()["state"])
        optimizer.load_state_dict(good)
        assert equal_states(good["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("cleared", [False, True])
def test_states_of_before_take_room_during_a_load_unless_they_are_cleared(
    cleared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs: list[Any] = []
    alive: list[int] = []
    allocate = Engine.allocate

    def counted(engine: Engine, nbytes: int) -> Any:
        alive.append(sum(slab() is not None for slab in slabs))
        slab = allocate(engine, nbytes)
        slabs.append(weakref.ref(slab.untyped_storage()))
        return slab

    monkeypatch.setattr(Engine, "allocate", counted)
    with lying_in_wait() as stream:
        params = parameters()
        optimizer = optim.AdamW(params, paged=True)
        steps(params, optimizer, range(2))
        good = copy.deepcopy(optimizer.state_dict())
        if cleared:
            optimizer.state.clear()
        stream.engines.clear()  # which remember slabs
        gc.collect()
        optimizer.load_state_dict(good)
    assert alive == [0, 0 if cleared else 1]


# -- gradient release ------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))


def train(model: nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        model(torch.randn(4, 128, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_slab_that_cannot_be_put_in_order_serves_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, paged = net(), net()
    theirs = optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs, range(4))
    allocate = Engine.allocate
    with lying_in_wait(chunk=20_000) as stream:
        ours = optim.AdamW(paged.parameters(), lr=1e-2, paged=True)
        optim.release_gradients(paged, ours)

        def once(engine: Engine, nbytes: int) -> torch.Tensor:
            if engine is not stream.engines[0]:
                raise OSError("needs more bytes than are free")
            return allocate(engine, nbytes)

        monkeypatch.setattr(Engine, "allocate", once)
        with pytest.warns(UserWarning, match="the slab stays in its first order.*needs more bytes"):
            train(paged, ours, range(1))
        train(paged, ours, range(1, 4))
        assert [engine.closed for engine in stream.engines] == [False, True]
    assert all(map(torch.equal, plain.parameters(), paged.parameters()))


def test_what_was_released_once_keeps_no_old_states() -> None:
    with lying_in_wait():
        model = net()
        optimizer = optim.AdamW(model.parameters(), bits=32, paged=True)
        handle = optim.release_gradients(model, optimizer)
        train(model, optimizer, range(2))
        handle.remove()
        weight = model.get_parameter("0.weight")
        entries = optimizer.state[weight]
        old = [weakref.ref(entries.pager), weakref.ref(raw(entries)["step"])]
        del entries
        optimizer.param_groups[0].update(bits=8, paged=False)
        optimizer.state[weight]["step"] = torch.tensor(2.0)
        train(model, optimizer, range(2, 4))
        gc.collect()
        assert [reference() is None for reference in old] == [True, True]


# -- parameters that change where they lie ---------------------------------------------------------------------------


def test_a_parameter_that_is_turned_round() -> None:
    """The same address and shape, other strides."""
    results = []
    for paged in (False, True):
        with lying_in_wait(chunk=20_000):
            p = Parameter(torch.randn(160, 160, generator=torch.Generator().manual_seed(0)))
            optimizer = optim.AdamW([p], lr=0.1, paged=paged)
            steps([p], optimizer, range(2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that copies are made
                p.data = p.data.t()
                steps([p], optimizer, range(2, 4))
            results.append(p)
    assert torch.equal(*results)


def test_what_is_not_paged_follows_a_parameter_to_another_device() -> None:
    with lying_in_wait():
        (p,) = parameters(1)
        optimizer = optim.AdamW([p], paged=True)
        steps([p], optimizer, range(1))
        moved = Parameter(p.detach().to("meta"))
        optimizer.state[moved] = optimizer.state.pop(p)
        optimizer.param_groups[0]["params"] = [moved]
        group = optimizer.param_groups[0]
        form = optimizer.settings(group).form(moved.shape, moved.dtype)
        optimizer._store.give(moved, form, lambda: [(moved, form)])
        entries = raw(optimizer.state[moved])
        near = {name for name in entries if name == "step" or name.endswith("_scales")}
        assert {name: value.device.type for name, value in entries.items()} == {
            name: "meta" if name in near else "cpu" for name in entries
        }
