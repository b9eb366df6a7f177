"""The page file's life: where it lies, what it costs, what forks share, and what closing leaves."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.page_files import MARKS, MIB, PAGE, files_of_at_most, mapped, moved, random_bytes
from torch import Tensor

from lowbit_lightning.state.pages import Pager, Want, file
from lowbit_lightning.state.pages.file import FileTransport
from lowbit_lightning.state.pages.transport import Moves

pytestmark = MARKS
TMPFS = Path("/dev/shm")
in_memory = pytest.mark.skipif(
    not TMPFS.is_dir() or file.filesystem(TMPFS) != "tmpfs", reason="this machine has no tmpfs at /dev/shm"
)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def assert_soon(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- space, and where it lies ------------------------------------------------------------------------------------------


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


# -- what is left ------------------------------------------------------------------------------------------------------


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


# -- forks -------------------------------------------------------------------------------------------------------------


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


# -- what it costs -----------------------------------------------------------------------------------------------------


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


def test_a_slab_that_is_read_into_another_takes_no_memory(page_dir: Path) -> None:
    """As when states get a new layout: each trim gives back both."""
    old, new = FileTransport(page_dir), FileTransport(page_dir)
    source, target = old.allocate(8 * MIB), new.allocate(8 * MIB)
    source.copy_(random_bytes(8 * MIB))
    old.trim()
    before, most = mapped(), 0
    for start in range(0, 8 * MIB, MIB):
        target[start : start + MIB].copy_(source[start : start + MIB])
        most = max(most, mapped())
        new.trim()
    assert MIB <= most - before <= 4 * MIB  # the kernel maps more than was asked for
    assert mapped() <= before
    old.close()
    assert torch.equal(target, random_bytes(8 * MIB))
    new.close()
