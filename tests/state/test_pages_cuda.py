"""``CudaTransport`` without a GPU: what it asks of torch.cuda, in which order. On a GPU: ``tests/gpu``."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import optim
from lowbit_lightning.state import pages
from lowbit_lightning.state.pages import Moves
from lowbit_lightning.state.pages import cuda as module


class Fakes:
    """torch.cuda's streams and events, which note what they are asked for."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.made: list[str] = []
        self.capturing, self.status = False, 0
        self.now = self.stream("compute")
        fakes = self

        class Event:
            def __init__(self) -> None:
                fakes.made.append("event")

            def record(self, stream: Any) -> None:
                fakes.log.append(("record", stream.name, id(self)))

            def synchronize(self) -> None:
                fakes.log.append(("host waits", id(self)))

        class Runtime:
            def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
                fakes.log.append(("pin", nbytes))
                return fakes.status

            def cudaHostUnregister(self, address: int) -> int:
                fakes.log.append(("unpin",))
                return 0

        self.Event, self.runtime = Event, Runtime()

    def stream(self, name: str) -> Any:
        log = self.log

        class Stream:
            def wait_event(self, event: Any) -> None:
                log.append(("wait", name, id(event)))

            def wait_stream(self, other: Any) -> None:
                log.append(("wait for stream", name, other.name))

            def synchronize(self) -> None:
                log.append(("host waits for", name))

        Stream.name = name  # type: ignore[attr-defined]
        return Stream()

    def new_stream(self, device: torch.device) -> Any:
        self.made.append("in" if not self.made else "out")
        return self.stream(self.made[-1])

    @contextmanager
    def use(self, stream: Any) -> Any:
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    found = Fakes()
    for name, value in {
        "Stream": found.new_stream,
        "Event": found.Event,
        "stream": found.use,
        "current_stream": lambda device=None: found.now,
        "cudart": lambda: found.runtime,
        "is_current_stream_capturing": lambda: found.capturing,
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(module.torch.cuda, name, value)
    copied = Tensor.copy_

    def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        found.log.append(("copy", found.now.name, non_blocking))
        return copied(target, source)

    monkeypatch.setattr(module.Tensor, "copy_", copy)
    return found


def transport(fakes: Fakes) -> tuple[module.CudaTransport, Tensor, Moves]:
    made = module.CudaTransport(torch.device("cpu"))
    slab = made.allocate(64)
    slab.copy_(torch.arange(64))
    buffer = made.buffer(16)
    moves = Moves(((buffer[:8], 8), (buffer[8:], 40)))
    fakes.log.clear()
    return made, slab, moves


def test_copies_wait_run_and_are_recorded_on_their_own_streams(fakes: Fakes) -> None:
    made, slab, moves = transport(fakes)
    arrived = made.fetch(moves, None)
    assert fakes.log == [("copy", "in", True)] * 2 + [("record", "in", id(arrived))]
    assert torch.cat([part for part, _ in moves.parts]).tolist() == [*range(8, 16), *range(40, 48)]
    fakes.log.clear()
    made.wait(arrived)
    done = made.computed(moves)
    assert fakes.log == [("wait", "compute", id(arrived)), ("record", "compute", id(done))]
    fakes.log.clear()
    moves.parts[1][0].fill_(1)
    stored = made.store(moves, done)
    assert fakes.log == [("wait", "out", id(done)), *[("copy", "out", True)] * 2, ("record", "out", id(stored))]
    assert slab[40:48].tolist() == [1] * 8
    fakes.log.clear()
    made.fetch(moves, stored)
    assert fakes.log[0] == ("wait", "in", id(stored))
    made.settle(stored)
    assert fakes.log[-1] == ("host waits", id(stored))


def test_events_and_streams_are_used_again(fakes: Fakes) -> None:
    made, _, moves = transport(fakes)
    first = made.fetch(moves, None), made.computed(moves), made.store(moves, None)
    second = made.fetch(moves, None), made.computed(moves), made.store(moves, None)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len({id(event) for event in first}) == 3
    assert fakes.made == ["in", "out", *["event"] * 3]


def test_new_near_memory_may_have_been_used_by_kernels_before(fakes: Fakes) -> None:
    made, _, _ = transport(fakes)
    made.buffer(8)
    assert fakes.log == [("wait for stream", "in", "compute")]


def test_closing_unpins_once_when_all_copies_are_done(fakes: Fakes) -> None:
    made, slab, _ = transport(fakes)
    made.close()
    made.close()
    assert fakes.log == [("host waits for", "in"), ("host waits for", "out"), ("unpin",)]
    assert slab[5] == 5, "and the slab stays readable"


def test_a_host_that_does_not_pin_says_so(fakes: Fakes) -> None:
    fakes.status = 2
    made = module.CudaTransport(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"640 bytes of pinned host memory.*cudaError 2.*resident"):
        made.allocate(640)
    made.close()
    assert ("unpin",) not in fakes.log


def test_capture_is_refused(fakes: Fakes) -> None:
    made, _, moves = transport(fakes)
    arrived = made.fetch(moves, None)
    fakes.capturing = True
    with pytest.raises(RuntimeError, match="paged optimizer cannot be captured"):
        made.wait(arrived)


def test_a_steady_step_makes_nothing(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer over it, and the numbers of one without: no new stream, event or buffer, and no waiting host."""
    monkeypatch.setattr(pages, "open_transport", lambda *_: module.CudaTransport(torch.device("cpu")))
    monkeypatch.setattr(pages.layout, "SMALLEST", 20_000)
    shapes = [(64, 256), (300, 300), (5000,)]
    ours, theirs = ([Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    paged, plain = optim.AdamW(ours, paged=True, resident="30KB"), optim.AdamW(theirs)
    for number in range(6):
        fakes.log.clear()
        made = len(fakes.made)
        for params, optimizer in ((ours, paged), (theirs, plain)):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        if number > 1:
            assert len(fakes.made) == made
            assert not [entry for entry in fakes.log if entry[0] in ("host waits", "wait for stream", "pin")]
            travels = [entry for entry in fakes.log if entry[0] == "copy" and entry[1] != "compute"]
            assert {stream for _, stream, _ in travels} == {"in", "out"}
            assert all(non_blocking for _, _, non_blocking in travels)


def test_kernels_of_several_streams_are_behind_the_copy_and_before_the_store(fakes: Fakes) -> None:
    made, _, moves = transport(fakes)
    arrived, compute = made.fetch(moves, None), fakes.now
    fakes.log.clear()
    made.wait(arrived)
    with fakes.use(fakes.stream("side")):
        made.wait(arrived)
        made.wait(arrived)
        done = made.computed(moves)
    assert fakes.log == [
        *[("wait", name, id(arrived)) for name in ("compute", "side", "side")],
        ("wait for stream", "side", compute.name),
        ("record", "side", id(done)),
    ]
    fakes.log.clear()
    made.wait(arrived)
    made.computed(moves)
    assert fakes.log == [("wait", "compute", id(arrived)), ("record", "compute", id(done))], "the other one is past"


def test_a_chunk_that_is_open_is_waited_for_by_the_next_stream(fakes: Fakes) -> None:
    want = pages.Want((64, 64), (("codes", torch.uint8),), 64)
    pager = pages.Pager(module.CudaTransport(torch.device("cpu")), [want, want], chunk=1 << 20)
    (chunk,) = pager.chunks
    pager.near(chunk)
    with fakes.use(fakes.stream("side")):
        fakes.log.clear()
        pager.near(chunk)
        assert [entry[:2] for entry in fakes.log] == [("wait", "side")]
    pager.close()


def test_pinning_is_on_the_device_and_an_error_of_it_is_nobody_elses(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def on(device: torch.device) -> Any:
        fakes.log.append(("on", str(device)))
        yield
        fakes.log.append(("off",))

    def ones(*_: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        fakes.log.append(("kernel", str(device)))
        raise RuntimeError("CUDA error: invalid argument")  # the one that the runtime has kept

    monkeypatch.setattr(module.torch.cuda, "device", on)
    monkeypatch.setattr(module.torch, "ones", ones)
    made = module.CudaTransport(torch.device("cpu"))
    made.allocate(64)
    made.close()
    expected = [("on", "cpu"), ("pin", 64), ("off",), ("on", "cpu"), ("unpin",), ("off",)]
    assert [entry for entry in fakes.log if entry[0] != "host waits for"] == expected
    fakes.log.clear()
    fakes.status = 1
    with pytest.raises(RuntimeError, match="cudaError 1"):
        module.CudaTransport(torch.device("cpu")).allocate(64)
    assert fakes.log == [("on", "cpu"), ("pin", 64), ("off",), ("kernel", "cpu")]


@pytest.mark.parametrize("where", ["a forked process", "an interpreter that ends"])
def test_where_cuda_is_gone_nothing_is_asked_of_it(where: str, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, _ = transport(fakes)
    if where == "a forked process":
        monkeypatch.setattr(module.os, "getpid", lambda: -1)
    else:
        monkeypatch.setattr(module.sys, "is_finalizing", lambda: True)
    made.__del__()
    assert not fakes.log
    monkeypatch.undo()
    made._slab = None  # there is no CUDA behind it any more


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing forks with a GPU at work")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # beside threads, from 3.12
def test_a_forked_process_copies_no_slab(fakes: Fakes) -> None:
    """What is pinned would be copied at once, by every data loader worker."""
    for nbytes in (64, 5 << 20):
        made = module.CudaTransport(torch.device("cpu"))
        slab = made.allocate(nbytes).fill_(7)
        child = os.fork()
        if not child:
            os._exit(int(slab.numpy().any()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert slab.eq(7).all()
