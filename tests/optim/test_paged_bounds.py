"""Paged states: what is near, what travels, another device, and what is refused."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.optimizers import step
from support.paged_engine import Stream, lying_in_wait
from support.paged_optimizers import CHUNK, build, parameters, steps
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.state import pages, saved
from lowbit_lightning.state.pages import Entries, Pager, file

# -- another device --------------------------------------------------------------------------------------------------


class Nowhere:
    """A transport under a device without memory: what mixes near and far in one operation raises there."""

    device = torch.device("meta")

    def allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def __getattr__(self, name: str) -> Callable[..., None]:
        assert name in ("fetch", "store", "computed", "wait", "settle", "trim", "close"), name
        return lambda *_, **__: None


@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_near_and_far_may_be_different_devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, conversions, checkpoints: what is paged is on the CPU, kernels see nothing that is, and no state of the
    device is as large as a parameter's."""

    def on_device(
        arguments: kernels.StepArguments, grads: list[Tensor], scalars: kernels.StepScalars, norms: Tensor | None = None
    ) -> Tensor:
        arguments.check_step(grads, scalars)
        assert arguments.device.type == "meta"
        return torch.empty(len(arguments.params), 2, dtype=torch.float64, device="meta")

    def written(pager: Pager, number: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            far = pager.far[number][name]
            assert (value.shape, value.dtype, far.device.type) == (far.shape, far.dtype, "cpu")

    monkeypatch.setattr(pages, "open_transport", lambda *_: Nowhere())
    monkeypatch.setattr(kernels, "optimizer_step", on_device)
    monkeypatch.setattr(kernels, "optimizer_norms", on_device)
    monkeypatch.setattr(Pager, "write", written)
    monkeypatch.setattr(saved, "to_host", lambda value: torch.empty(value.shape, dtype=value.dtype))
    monkeypatch.setattr(pages.layout, "CHUNK", CHUNK)
    params = [Parameter(p.detach().to("meta")) for p in parameters(torch.bfloat16)]
    optimizer = build(kind, params, paged=True, master="bf16+8")

    def act() -> None:
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        for entries in optimizer.state_dict()["state"].values():
            for name, value in entries.items():
                paged = name not in ("step", "exp_avg_scales", "exp_avg_sq_scales") and value.numel()
                assert value.device.type == ("cpu" if paged else "meta"), name

    act()
    act()
    optimizer.param_groups[0]["bits"] = 32
    act()
    optimizer.param_groups[0]["bits"] = 8
    optimizer.param_groups[1]["block_size"] = 64
    act()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    act()
    decoded = optimizer.state_dict(bits=32)["state"][0]
    assert decoded["exp_avg"].device.type == "cpu"
    for group in optimizer.param_groups:
        group["paged"] = False
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert all(v.device.type == "meta" for p in params for v in optimizer.state[p].values())


# -- bounds, warnings, errors ----------------------------------------------------------------------------------------


def test_near_memory_is_the_budget_and_the_ring() -> None:
    def near(stream: Stream) -> int:
        return sum(buffer.numel() for engine in stream.engines for buffer in engine.buffers)

    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, bits=32, paged=True, resident="700KB")
        steps(params, optimizer)
        statistics = optimizer.page_statistics()
        assert statistics is not None
        assert near(stream) == statistics.near_bytes <= 700_000 + 3 * CHUNK
        assert 700_000 - CHUNK < statistics.resident_bytes <= 700_000
        assert statistics.far_bytes > 4_000_000
        assert statistics.steps == 3
        assert statistics.bytes_in >= statistics.far_bytes > statistics.resident_bytes
        assert 0 < statistics.resident_share < 0.2
        assert statistics.overlap is not None
        assert 0 <= statistics.overlap <= 1
        kept = statistics.near_bytes
        steps(params, optimizer, range(3, 6))
        assert near(stream) == kept, "nothing is allocated in later steps"
        assert len(stream.engines) == 1


def test_a_steady_step_only_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each streamed byte in and out once, and the host waits for no copy."""
    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        before = copy.copy(optimizer.page_statistics())
        settled: list[Any] = []
        engine = stream.engines[0]
        monkeypatch.setattr(engine, "settle", settled.append)
        step(optimizer, params, 5)
        after = optimizer.page_statistics()
        assert before is not None
        assert after is not None
        total = sum(moves.nbytes for kind, moves in engine.last if kind == "store")
        assert after.bytes_out - before.bytes_out == total
        assert after.bytes_in - before.bytes_in == total
        assert not settled


def test_paging_to_host_memory_means_nothing_on_a_cpu() -> None:
    params = parameters()
    optimizer = build("AdamW", params, paged=True)
    with pytest.warns(UserWarning, match='paged=True has no effect on cpu.*paged="disk"'):
        step(optimizer, params, 0)
    step(optimizer, params, 1)  # without another warning
    assert optimizer.page_statistics() is None
    for group in optimizer.param_groups:
        group["paged"] = "disk"
    step(optimizer, params, 2)
    assert optimizer.page_statistics() is not None
    for group in optimizer.param_groups:
        group["paged"] = True
    step(optimizer, params, 3)
    assert optimizer.page_statistics() is None
    assert not any(isinstance(entries, Entries) for entries in optimizer.state.values())


def test_a_file_under_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'paged="disk".*cuda:0.*paged=True'):
        pages.open_transport("disk", torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paged": "ram"}, "paged must be False, True .* got 'ram'"),
        ({"paged": True, "resident": "many"}, "resident must be a number of bytes.*got 'many'"),
        ({"paged": True, "resident": -1}, "resident must be .*got -1"),
        ({"paged": True, "resident": 0.5}, "resident must be .*got 0.5"),
        ({"paged": "disk", "page_dir": 3}, "page_dir must be .* got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("text", "count"), [(7, 7), ("7", 7), ("2 KB", 2000), ("512MiB", 2**29), ("1.5gib", 3 * 2**29), ("1TB", 10**12)]
)
def test_bytes(text: int | str, count: int) -> None:
    assert optim.options.parse_bytes(text) == count


def test_inert_options_warn() -> None:
    with pytest.warns(UserWarning, match="resident has no effect with paged=False"):
        optim.AdamW(parameters(), resident="1GB")
    with pytest.warns(UserWarning, match="page_dir has no effect with paged=True"):
        optim.AdamW(parameters(), paged=True, page_dir="/somewhere")


def test_budgets_of_groups_must_be_equal() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        groups = [{"params": params[:4], "resident": 10}, {"params": params[4:], "resident": 20}]
        with pytest.raises(ValueError, match=r"equal in all param groups that are paged, got \(True, 10, None\)"):
            optim.AdamW(groups, paged=True)
        groups[1].pop("resident")
        optimizer = optim.AdamW(groups, paged=True)
        assert optimizer.param_groups[1]["resident"] == 10
        optimizer.param_groups[1]["resident"] = 20
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=r"equal in all param groups that are paged, got \(True, 10, None\)"):
            step(optimizer, params)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), "before anything is changed"


@pytest.mark.skipif(sys.platform != "linux", reason='paged="disk" needs Linux')
def test_a_load_without_room_names_what_makes_some(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    paging: dict[str, Any] = {"paged": "disk", "resident": 0, "page_dir": str(page_dir)}
    optimizer, fresh = optim.AdamW(params, **paging), optim.AdamW(parameters(), **paging)
    step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer, params, 1)
    old = weakref.ref(optimizer.state[params[0]].pager)
    # The disk has room for one slab.
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40 if old() is None else 0))
    with pytest.raises(OSError, match=r"where 0 are free: choose another page_dir$"):
        fresh.load_state_dict(saved)  # which holds nothing that it could give up
    with pytest.raises(OSError, match=r"where 0 are free: choose another page_dir, or .*optimizer\.state\.clear\(\)"):
        optimizer.load_state_dict(saved)
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    found = optimizer.state_dict()["state"]
    assert found.keys() == saved["state"].keys()
    for key, entries in saved["state"].items():
        assert all(torch.equal(value, found[key][name]) for name, value in entries.items())
