"""The page file: what arrives, in which order, what it costs in memory, and what is said when something goes wrong."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import stat
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_lightning.state.pages import Pager, Want, file
from lowbit_lightning.state.pages.file import FileTransport
from lowbit_lightning.state.pages.transport import Moves

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's"),
    pytest.mark.filterwarnings("ignore:.*has no O_DIRECT"),  # tests run on any disk
]
MIB = 2**20
PAGE = 4096
TMPFS = Path("/dev/shm")
in_memory = pytest.mark.skipif(
    not TMPFS.is_dir() or file.filesystem(TMPFS) != "tmpfs", reason="this machine has no tmpfs at /dev/shm"
)


@pytest.fixture(params=["O_DIRECT", "page cache"])
def transport(request: pytest.FixtureRequest, page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One transport of each kind; a file system that has no O_DIRECT gives the second one twice."""
    if request.param == "page cache":
        monkeypatch.setattr(file, "_direct", lambda base: None)
    made = FileTransport(page_dir)
    yield made
    made.close()


def random_bytes(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8))


def moved(transport: FileTransport, way: str, *parts: tuple[Tensor, int]) -> None:
    transport.settle(getattr(transport, way)(Moves(parts), None))


# -- what arrives ----------------------------------------------------------------------------------------------------

SLAB = 5 * PAGE + 123
cut = st.tuples(st.integers(0, SLAB), st.integers(0, SLAB)).map(sorted)
some = st.lists(st.integers(0, SLAB), min_size=2, max_size=6).map(sorted)


@given(runs=st.lists(st.tuples(st.booleans(), some, st.integers(0, 2), st.integers(0, 9999)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_parts_arrive_and_nothing_else_changes(runs: list[tuple[bool, list[int], int, int]]) -> None:
    """Against copies between two arrays. Near places agree with the slab's, or are off by 1, or by a page less 1."""
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


def test_pieces_of_a_long_part_come_together(transport: FileTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "PIECE", 3 * PAGE)
    slab, there, back = transport.allocate(MIB), transport.buffer(MIB), transport.buffer(MIB)
    there.copy_(random_bytes(MIB))
    moved(transport, "store", (there[77 : MIB - 9], 77))
    moved(transport, "fetch", (back, 0))
    assert torch.equal(back[77 : MIB - 9], there[77 : MIB - 9])
    assert torch.equal(back, slab)


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


def test_no_parts_are_moved_at_once(transport: FileTransport) -> None:
    transport.allocate(PAGE)
    transport.wait(transport.fetch(Moves(()), None))


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


def test_closing_waits_for_what_is_under_way(transport: FileTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    slab, near = transport.allocate(MIB), transport.buffer(MIB).fill_(3)
    real = os.pwritev

    def slow(*args: Any) -> int:
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    first = transport.store(Moves(((near[:PAGE], 0),)), None)
    second = transport.store(Moves(((near[PAGE:], PAGE),)), first)
    transport.close()
    assert first.past
    assert second.past
    assert second.error is None
    assert bool((slab == 3).all())


def test_a_truncated_file_is_an_error(transport: FileTransport) -> None:
    transport.allocate(4 * PAGE)
    near = transport.buffer(4 * PAGE)
    assert transport._files is not None
    os.truncate(f"/proc/self/fd/{transport._files._base}", PAGE)
    with pytest.raises(OSError, match=says(transport, "reading", PAGE) if transport.direct else "the file ends here"):
        moved(transport, "fetch", (near, 0))


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """The kernel's own refusal to write behind a place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_kernel_refuses_to_write_is_an_error(transport: FileTransport) -> None:
    transport.allocate(4 * PAGE)
    near = transport.buffer(4 * PAGE)
    with files_of_at_most(PAGE), pytest.raises(OSError, match=r"writing .* failed: File too large") as caught:
        moved(transport, "store", (near, 0))
    assert caught.value.errno == errno.EFBIG


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def assert_soon(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_closing_one_that_failed_gives_everything_back(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    before = open_files()
    transport = FileTransport(page_dir)
    others, near, slab = threads(), transport.buffer(MIB), weakref.ref(transport.allocate(MIB))
    workers = threads() - others
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        failed = transport.store(Moves(((near, 0),)), None)
        behind = transport.fetch(Moves(((near, 0),)), failed)
        with pytest.raises(OSError, match=r"are lost: start again, .* resume from a checkpoint") as error:
            transport.settle(behind)
        transport.store(Moves(((near, 0),)), behind)
    assert len(workers) == 4
    transport.close()
    assert_soon(lambda: not threads() & workers)
    assert slab() is None  # and with it the space on the disk, while the error is still there
    assert open_files() == before
    assert error.value is behind.error


def in_a_fork(says: Callable[[], bool]) -> bool:
    """What ``says`` says in a forked process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what this is about
        child = os.fork()
    if not child:
        code = 2
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest-timeout's, which needs the interpreter
        signal.alarm(20)  # ends it where it hangs
        try:
            code = int(says())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


def test_forked_processes_share_no_near_memory(transport: FileTransport) -> None:
    """Neither small buffers nor huge ones: what a fork shares is copied as soon as the parent writes to it."""
    transport.allocate(PAGE)
    for nbytes in (PAGE, 3 * MIB):
        near = transport.buffer(nbytes).fill_(7)
        assert in_a_fork(lambda near=near: not near.numpy().any())  # type: ignore[misc]
        assert bool((near == 7).all())


def test_a_forked_process_is_told_and_does_not_hang(page_dir: Path) -> None:
    pager = Pager(FileTransport(page_dir), [Want((MIB,), (("mean", torch.float32),), 256)] * 8)

    def refused(call: Callable[..., object], *arguments: Any) -> bool:
        try:
            call(*arguments)
        except RuntimeError as error:
            return "in a forked process" in str(error)
        return False

    chunk, one = pager.chunks[0], {"mean": torch.ones(MIB)}  # in a fork torch would wait for threads that are not there

    def says() -> bool:
        calls = refused(pager.near, chunk) and refused(pager.settle) and refused(pager.write, 0, one)
        pager.close()  # what it has, and waits for nobody
        return calls

    assert in_a_fork(says)  # when nothing is near, and its parent could be writing
    for chunk in pager.chunks:
        pager.near(chunk)
    pager.end_step()
    assert in_a_fork(says)
    pager.settle()
    pager.close()


def test_a_full_disk_is_an_error_before_training(page_dir: Path) -> None:
    before = open_files()
    free = os.statvfs(page_dir).f_bavail * os.statvfs(page_dir).f_frsize
    with pytest.raises(
        OSError, match=rf"needs {2 * free:,} bytes in {page_dir}, where [\d,]+ are free: choose"
    ) as full:
        FileTransport(page_dir).allocate(2 * free // PAGE * PAGE)
    assert full.value.errno == errno.ENOSPC
    with files_of_at_most(MIB), pytest.raises(OSError, match=r"needs 2,097,152 bytes in .*; allocating them failed"):
        FileTransport(page_dir).allocate(2 * MIB)
    assert open_files() == before


def test_space_is_allocated(page_dir: Path) -> None:
    transport = FileTransport(page_dir)
    slab = transport.allocate(3 * MIB)
    assert transport._files is not None
    assert os.fstat(transport._files._base).st_blocks * 512 >= len(slab)
    transport.close()


# -- where it lies, and what is left ---------------------------------------------------------------------------------


def test_the_file_has_no_name_and_nobody_else_may_read_it(transport: FileTransport) -> None:
    before = open_files()
    slab = transport.allocate(MIB)
    assert transport._files is not None
    found = os.fstat(transport._files._base)
    assert found.st_nlink == 0
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(transport.folder) == []
    slab.fill_(5)
    transport.close()
    transport.close()
    assert bool((slab == 5).all())  # the memory is there as long as its tensor
    del slab
    assert open_files() == before
    with pytest.raises(RuntimeError, match="closed"):
        transport.fetch(Moves(()), None)


def test_one_that_is_dropped_leaves_nothing_open(page_dir: Path) -> None:
    before = open_files()
    transport = FileTransport(page_dir)
    near, others = transport.buffer(PAGE), threads()
    transport.allocate(MIB)
    workers = threads() - others
    moved(transport, "store", (near, 0))
    assert len(workers) == 4
    del transport
    assert open_files() == before
    assert_soon(lambda: not threads() & workers)


@in_memory
def test_a_folder_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"page_dir must be on a disk, got '/dev/shm', which is tmpfs: .*choose"):
        FileTransport(TMPFS)
    monkeypatch.setenv(file.FOLDER, str(TMPFS))
    with pytest.raises(ValueError, match="which is tmpfs"):
        FileTransport()
    monkeypatch.delenv(file.FOLDER)
    monkeypatch.setattr(tempfile, "tempdir", str(TMPFS))
    assert file.filesystem(FileTransport().folder) != "tmpfs"


def test_folders(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"page_dir must be an existing folder that can be written to, got .*nowhere"):
        FileTransport(page_dir / "nowhere")
    monkeypatch.setenv(file.FOLDER, str(page_dir))
    assert FileTransport().folder == page_dir


def test_a_file_system_without_direct_access_is_told(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_direct", lambda base: None)
    with pytest.warns(UserWarning, match=r"has no O_DIRECT: .*choose a page_dir on ext4 or xfs"):
        FileTransport(page_dir).allocate(PAGE)


def test_file_systems_are_told_apart(tmp_path: Path) -> None:
    number = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:999 / /other rw,relatime shared:1 - tmpfs tmpfs rw\n"
        f"23 1 {os.major(number)}:{os.minor(number)} / / rw - ramfs none rw\n"
    )
    assert file.filesystem(tmp_path, mounts) == "ramfs"
    assert file.filesystem(tmp_path, tmp_path / "nothing") == ""


# -- what it costs ---------------------------------------------------------------------------------------------------


def cached(slab: Tensor) -> int:
    """Bytes of the slab that are in the page cache, by the kernel's own account (mincore)."""
    libc, pages = ctypes.CDLL(None, use_errno=True), -(-len(slab) // PAGE)
    resident = (ctypes.c_ubyte * pages)()
    assert libc.mincore(ctypes.c_void_p(slab.data_ptr()), ctypes.c_size_t(len(slab)), resident) == 0
    return PAGE * sum(x & 1 for x in resident)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_neither_memory_nor_page_cache_grows_with_the_slab(transport: FileTransport) -> None:
    size, chunk = 64 * MIB, 4 * MIB
    slab, near = transport.allocate(size), transport.buffer(chunk)
    near.random_(0, 256)
    before = resident()
    for offset in range(0, size, chunk):
        moves = Moves(((near, offset),))
        transport.settle(transport.store(moves, transport.fetch(moves, None)))
    assert resident() - before < chunk
    assert cached(slab) <= chunk
    slab.add_(1)  # all of it becomes memory
    assert resident() - before > size / 2
    assert cached(slab) == size
    transport.trim()
    assert resident() - before < chunk
    assert cached(slab) <= chunk
