"""A slab in a file, for optimizer states larger than memory. ``FileTransport`` copies pages between the file and RAM.

How it works
    The file has no name: it is unlinked as soon as it is made. So nothing remains to be cleaned up, however the process
    ends (``kill -9`` and power cuts included), and ranks on one node do not disturb each other. The space is allocated
    before training begins. If the disk is too full, an error is raised then.

    Worker threads read and write with O_DIRECT, which bypasses the page cache. So pages take no more memory than the
    pager's buffers, and almost no processor time. Three measures make this fast (``docs/paging.md`` has figures):
    buffers on huge pages, since a request to the disk is as long as its memory is contiguous; pieces of 16 MiB; and two
    threads in each direction. O_DIRECT requires memory address, offset and length to be multiples of 4096. The page
    cache is used for the ragged ends of a part, for a whole part whose places in memory and slab differ modulo 4096,
    and for everything on a file system without O_DIRECT. Such data is written to the disk at once and dropped from the
    cache.

    The event that a copy waits for hands it to the threads, so that no thread waits.

The slab as memory is a shared mapping of the same file. The kernel keeps it coherent with the threads' accesses as long
as no copy is under way, and ``Transport.allocate`` promises no more.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.state.pages.memory import aligned
from lowbit_lightning.state.pages.transport import Moves
from lowbit_lightning.state.pages.workers import Event, Workers, past

FOLDER = "LOWBIT_LIGHTNING_PAGES"
"""The environment variable that names the folder of page files."""
ALIGNMENT = 4096
PIECE = 16 * 2**20
"""Bytes that one thread reads or writes at once. A part is cut into pieces of this size."""
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")

_READ, _WRITE = "reading", "writing"


class _Piece(NamedTuple):
    """Bytes of near memory, their offset in the slab, and whether they are copied with O_DIRECT."""

    memory: memoryview
    offset: int
    direct: bool


class FileTransport:
    """A ``Transport`` between RAM and a file in ``folder``, read and written by ``threads`` threads each way.

    ``folder``: None for $LOWBIT_LIGHTNING_PAGES or, where that is not set, the first of the system's folder for
    temporary files, /var/tmp and the current folder that is on a disk.

    Raises:
        RuntimeError: on anything but Linux.
        ValueError: if the folder does not exist, or lies in memory (tmpfs).
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, threads: int = 2) -> None:
        if sys.platform != "linux":
            raise RuntimeError(f'paged="disk" needs Linux (O_DIRECT, posix_fallocate), this is {sys.platform}')
        self.folder = _checked(Path(folder)) if folder is not None else _default_folder()
        self._threads = threads
        self._files: _Files | None = None
        self._workers: Workers | None = None
        self._pieces: dict[Moves, list[_Piece]] = {}

    @property
    def direct(self) -> bool:
        """Whether the file is read and written without the page cache."""
        return self._files is not None and self._files.direct is not None

    def check_room(self, nbytes: int) -> None:
        """Raise OSError if the disk has fewer than ``nbytes`` bytes free. Nothing is allocated."""
        _check_room(self.folder, nbytes)

    def allocate(self, nbytes: int) -> Tensor:
        self._files = _Files(self.folder, nbytes)
        self._workers = Workers((_READ, _WRITE), self._threads)
        return self._files.slab

    def buffer(self, nbytes: int) -> Tensor:
        return aligned(nbytes)

    def fetch(self, moves: Moves, after: Event | None) -> Event:
        return self._start(_READ, moves, after)

    def store(self, moves: Moves, after: Event | None) -> Event:
        return self._start(_WRITE, moves, after)

    def computed(self, moves: Moves) -> Event:
        return past()  # kernels on the CPU are functions

    def wait(self, event: Event) -> None:
        event.wait()

    def settle(self, event: Event) -> None:
        if self._workers is not None:
            self._workers.finish()  # a caller that was interrupted may have lost an event
        event.wait()

    def trim(self) -> None:
        """Give back the memory of all slabs of this process: if one is filled from another, both take memory."""
        if self._files is not None:
            self._files.flush()
        for files in list(_OPEN):
            files.trim()

    def close(self) -> None:
        workers, files = self._workers, self._files
        if workers is None or files is None:
            return
        workers.finish()
        self._workers = self._files = None
        self._pieces.clear()
        workers.close()
        files.close()

    def _start(self, way: str, moves: Moves, after: Event | None) -> Event:
        if self._files is None or self._workers is None:
            raise RuntimeError("the page file is closed, or was not allocated")
        if moves not in self._pieces:
            self._pieces[moves] = [piece for part in moves.parts for piece in _cut(*part, self.direct)]
        copy = self._files.copy
        return self._workers.start(way, [partial(copy, way, piece) for piece in self._pieces[moves]], after)


def _cut(part: Tensor, offset: int, direct: bool) -> list[_Piece]:
    """The part in pieces: whole blocks with O_DIRECT, if memory and offset agree, and the rest through the cache."""
    memory, pieces = part.numpy().data, []
    head = -offset % ALIGNMENT
    aligned = direct and (part.data_ptr() - offset) % ALIGNMENT == 0
    blocks = (len(memory) - head) // ALIGNMENT * ALIGNMENT
    if not aligned or blocks <= 0:
        head, blocks = 0, 0
    for first in range(head, head + blocks, PIECE):
        last = min(first + PIECE, head + blocks)
        pieces.append(_Piece(memory[first:last], offset + first, True))
    for first, last in ((0, head), (head + blocks, len(memory))):
        for start in range(first, last, PIECE):
            pieces.append(_Piece(memory[start : min(start + PIECE, last)], offset + start, False))
    return pieces


# -- the file --------------------------------------------------------------------------------------------------------


class _Files:
    """The page file, opened three times: as memory, with O_DIRECT, and for ragged ends (without reading ahead)."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder = folder
        size = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        base = _allocated(folder, size)
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, base)
            self._map = mmap.mmap(base, size)  # shared; removed when no tensor holds it
            self.slab = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
            self.direct = _direct(base)
            self._base, self._ends = base, base
            if self.direct is None:
                warnings.warn(
                    f"the file system of {folder} has no O_DIRECT: pages go through the page cache, at a third to two "
                    "thirds of the speed, and cost a processor core; choose a page_dir on ext4 or xfs",
                    stacklevel=2,
                )
            else:
                self._ends = os.open(f"/proc/self/fd/{base}", os.O_RDWR)
                os.posix_fadvise(self._ends, 0, 0, os.POSIX_FADV_RANDOM)
            on_error.pop_all()
        opened = {base, self._ends, *([] if self.direct is None else [self.direct])}
        _OPEN.add(self)
        self._close = weakref.finalize(self, _close, opened)
        self._close.atexit = False  # threads may be at work: a number that is closed may soon name another file

    def close(self) -> None:
        _OPEN.discard(self)
        self._close()
        del self.slab, self._map  # an error of ``copy`` holds this object

    def copy(self, way: str, piece: _Piece) -> None:
        """Read or write a whole piece. Raises OSError, which names the place."""
        memory, offset = piece.memory, piece.offset
        file = self.direct if piece.direct and self.direct is not None else self._ends
        call = os.preadv if way == _READ else os.pwritev
        try:
            while memory:
                done = call(file, [memory], offset)
                if done <= 0:
                    raise OSError(errno.EIO, "the file ends here; something truncated it")
                memory, offset = memory[done:], offset + done
            if not piece.direct and len(piece.memory) >= ALIGNMENT:  # ragged ends are too small to care
                if way == _WRITE:
                    os.fdatasync(file)
                os.posix_fadvise(file, piece.offset, len(piece.memory), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{way} {len(memory)} bytes at offset {offset} of the page file in {self.folder} failed: "
                f"{error.strerror or error}. The optimizer's states there are lost: start again, with another page_dir "
                "if the disk is broken, and resume from a checkpoint",
            ) from error

    def flush(self) -> None:
        """Write changes of the slab as memory to the disk. Only then can its memory be given back."""
        self._map.flush()

    def trim(self) -> None:
        """Give back memory and page cache that the slab as memory takes. The content of the file stays."""
        self._map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._base, 0, 0, os.POSIX_FADV_DONTNEED)


_OPEN: weakref.WeakSet[_Files] = weakref.WeakSet()


def _allocated(folder: Path, size: int) -> int:
    """A descriptor of a new file without a name, mode 0600, with its space allocated."""
    _check_room(folder, size)  # asking for too much would first take all there is from everybody else
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the page file needs {size:,} bytes in {folder}; allocating them failed: {error.strerror}: choose "
                "another page_dir",
            ) from error
        return os.dup(file.fileno())


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the page file needs {size:,} bytes in {folder}, where {free:,} are free: choose another page_dir",
        )


def _direct(base: int) -> int | None:
    """The same file opened with O_DIRECT; None if the file system does not support that."""
    try:
        file = os.open(f"/proc/self/fd/{base}", os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    try:
        os.preadv(file, [aligned(ALIGNMENT).numpy().data], 0)
    except OSError:
        os.close(file)
        return None
    return file


def _close(files: set[int]) -> None:
    for file in files:
        os.close(file)


# -- where it lies ---------------------------------------------------------------------------------------------------


def _default_folder() -> Path:
    named = os.environ.get(FOLDER)
    if named:
        return _checked(Path(named))
    folders = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for folder in folders:
        if os.access(folder, os.W_OK) and filesystem(folder) not in _IN_MEMORY:
            return folder
    raise ValueError(f"none of {[str(f) for f in folders]} is a folder on a disk: give page_dir, or set ${FOLDER}")


def _checked(folder: Path) -> Path:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"page_dir must be an existing folder that can be written to, got {str(folder)!r}: make it")
    kind = filesystem(folder)
    if kind in _IN_MEMORY:
        raise ValueError(
            f"page_dir must be on a disk, got {str(folder)!r}, which is {kind}: pages there would take the memory that "
            f"they are to save; choose a folder on a disk, or set ${FOLDER}"
        )
    return folder


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of ``folder``'s file system, such as "ext4"; "" if the system does not say."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    return next((line[line.index("-") + 1] for line in lines if line[2] == number), "")
