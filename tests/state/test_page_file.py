"""The page file: what arrives, in which order, and what is said when a copy goes wrong."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.page_files import MARKS, MIB, PAGE, files_of_at_most, moved, random_bytes
from torch import Tensor

from lowbit_lightning.state.pages import file
from lowbit_lightning.state.pages.file import FileTransport
from lowbit_lightning.state.pages.transport import Moves

pytestmark = MARKS


# -- what arrives ----------------------------------------------------------------------------------------------------

SLAB = 5 * PAGE + 123
some = st.lists(st.integers(0, SLAB), min_size=2, max_size=6).map(sorted)


@mock.patch.object(file, "PIECE", 2 * PAGE)
@given(runs=st.lists(st.tuples(st.booleans(), some, st.integers(0, 2), st.integers(0, 9999)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_parts_arrive_and_nothing_else_changes(runs: list[tuple[bool, list[int], int, int]]) -> None:
    """Against copies between two arrays; no parts, too, and long ones in pieces. Near places agree with the slab's, or
    are off by 1, or by a page less 1."""
    transport = _shared()
    slab, near = _slab(), transport.buffer(SLAB + 2 * PAGE)
    far, ours = slab.numpy().copy(), near.random_(0, 256).numpy().copy()
    for number, (stores, bounds, shift, seed) in enumerate(runs):
        off = (0, 1, PAGE - 1)[shift]
        pairs = [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False) if b > a]
        parts = tuple((near[a + off : b + off], a) for a, b in pairs)
        if stores:
            near.copy_(random_bytes(len(near), seed + number))
            ours = near.numpy().copy()
        moved(transport, "store" if stores else "fetch", *parts)
        for a, b in pairs:
            if stores:
                far[a:b] = ours[a + off : b + off]
            else:
                ours[a + off : b + off] = far[a:b]
        assert np.array_equal(near.numpy(), ours)
        assert np.array_equal(slab.numpy(), far)  # through the mapping, behind O_DIRECT


_kept: dict[str, Any] = {}


def _shared() -> FileTransport:
    if not _kept:
        _kept["transport"] = FileTransport()
        _kept["slab"] = _kept["transport"].allocate(SLAB)
    return _kept["transport"]


def _slab() -> Tensor:
    return _kept["slab"]


def test_what_the_host_writes_is_fetched_and_what_is_stored_it_reads(transport: FileTransport) -> None:
    slab, near = transport.allocate(MIB), transport.buffer(MIB)
    for seed in range(3):  # the host's pages are in the cache, mapped and dirty, when the disk is read and written
        slab.copy_(random_bytes(MIB, seed))
        if seed:
            transport.trim()
        moved(transport, "fetch", (near, 0))
        assert torch.equal(near, random_bytes(MIB, seed))
        near.copy_(random_bytes(MIB, 10 + seed))
        moved(transport, "store", (near, 0))
        assert torch.equal(slab, near)


def test_buffers_are_aligned_and_slabs_of_the_size_asked_for(transport: FileTransport) -> None:
    for nbytes in (1, PAGE, 3 * MIB + 5):
        near = transport.buffer(nbytes)
        assert near.shape == (nbytes,)
        assert near.dtype == torch.uint8
        assert near.data_ptr() % (2 * MIB if nbytes > 2 * MIB else PAGE) == 0
    slab = transport.allocate(MIB + 1)
    assert slab.shape == (MIB + 1,)
    assert slab.device == transport.device == torch.device("cpu")


# -- the order of things ---------------------------------------------------------------------------------------------


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[threading.Event]:
    """``os.preadv`` or ``os.pwritev`` waits until the event is set."""
    go, real = threading.Event(), getattr(os, name)

    def wait(*args: Any) -> int:
        assert go.wait(60)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, wait)
        try:
            yield go
        finally:
            go.set()


def test_a_copy_begins_behind_its_event(transport: FileTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    slab, near, other = transport.allocate(MIB), transport.buffer(MIB), transport.buffer(MIB)
    slab.zero_()
    near.fill_(7)
    with held(monkeypatch, "pwritev") as go:
        stored = transport.store(Moves(((near, 0),)), None)
        fetched = transport.fetch(Moves(((other, 0),)), stored)
        free = transport.fetch(Moves(((transport.buffer(PAGE), 0),)), None)
        transport.wait(free)  # it waits for nothing
        assert not stored.past
        assert not fetched.past
        go.set()
        transport.wait(fetched)
    assert bool((other == 7).all())


def test_many_copies_that_wait_for_each_other_take_no_threads(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = FileTransport(page_dir, threads=1)
    transport.allocate(MIB)
    near = transport.buffer(PAGE)
    with held(monkeypatch, "pwritev") as go:
        first = transport.store(Moves(((near, 0),)), None)
        waiting = [transport.fetch(Moves(((near, 0),)), first) for _ in range(50)]
        transport.wait(transport.fetch(Moves(((transport.buffer(PAGE), PAGE),)), None))  # one thread reads, and is free
        go.set()
        for event in waiting:
            transport.wait(event)
    transport.close()


# -- errors ----------------------------------------------------------------------------------------------------------


def says(transport: FileTransport, what: str, offset: int) -> str:
    return rf"{what} \d+ bytes at offset {offset} of the page file in {transport.folder} failed: .*resume from a check"


@pytest.mark.parametrize(("name", "way", "what"), [("preadv", "fetch", "reading"), ("pwritev", "store", "writing")])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_reaches_whoever_waits(
    transport: FileTransport, monkeypatch: pytest.MonkeyPatch, name: str, way: str, what: str, number: int
) -> None:
    transport.allocate(MIB)
    near, real = transport.buffer(MIB), getattr(os, name)

    def broken(fd: int, memory: Any, offset: int) -> int:
        if offset >= 8 * PAGE:
            raise OSError(number, os.strerror(number))
        return real(fd, memory, offset)

    monkeypatch.setattr(file, "PIECE", 4 * PAGE)
    monkeypatch.setattr(os, name, broken)
    moved(transport, way, (near[: 8 * PAGE], 0))
    event = getattr(transport, way)(Moves(((near, 0),)), None)
    with pytest.raises(OSError, match=says(transport, what, 8 * PAGE)) as caught:
        transport.wait(event)
    assert caught.value.errno == number
    with pytest.raises(OSError, match="failed: "):
        transport.settle(event)
    transport.close()  # raises nothing


def test_what_waits_for_a_failed_copy_fails_with_it(transport: FileTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    slab, near = transport.allocate(PAGE), transport.buffer(PAGE)
    slab.fill_(1)
    near.fill_(2)

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    fetched = transport.fetch(Moves(((near, 0),)), None)
    stored = transport.store(Moves(((near, 0),)), fetched)
    with pytest.raises(OSError, match=says(transport, "reading", 0)):
        transport.settle(stored)
    assert bool((slab == 1).all())  # nothing was stored


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_copy_that_the_kernel_does_by_halves_is_completed(
    transport: FileTransport, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    slab, near, real = transport.allocate(9 * PAGE), transport.buffer(9 * PAGE), getattr(os, name)
    slab.copy_(random_bytes(9 * PAGE, 1))
    near.copy_(random_bytes(9 * PAGE, 2))
    monkeypatch.setattr(os, name, lambda fd, memory, offset: real(fd, [memory[0][: 2 * PAGE]], offset))
    moved(transport, "fetch" if name == "preadv" else "store", (near, 0))
    assert torch.equal(slab, near)
    assert torch.equal(near, random_bytes(9 * PAGE, 1 if name == "preadv" else 2))


def test_a_truncated_file_is_an_error(transport: FileTransport) -> None:
    transport.allocate(4 * PAGE)
    near = transport.buffer(4 * PAGE)
    assert transport._files is not None
    os.truncate(f"/proc/self/fd/{transport._files._base}", PAGE)
    with pytest.raises(OSError, match=says(transport, "reading", PAGE) if transport.direct else "the file ends here"):
        moved(transport, "fetch", (near, 0))


def test_what_the_kernel_refuses_to_write_is_an_error(transport: FileTransport) -> None:
    transport.allocate(4 * PAGE)
    near = transport.buffer(4 * PAGE)
    with files_of_at_most(PAGE), pytest.raises(OSError, match=r"writing .* failed: File too large") as caught:
        moved(transport, "store", (near, 0))
    assert caught.value.errno == errno.EFBIG
