"""Pages of checkpoint files that have been read are given back.

Transformers maps the files of a checkpoint into memory and keeps the mappings while it loads. Every page that was
read counts as memory of the process, and at the end that is the whole checkpoint. Pages of a file can be dropped and
are read again if somebody wants them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

DONTNEED = 4
"""``MADV_DONTNEED`` of Linux."""
AFTER = 32 * 2**20
"""Pages are dropped after so many bytes of tensors."""


class ReadPages:
    """Counts the bytes that were read from ``files`` and drops their pages now and then. Elsewhere than on Linux it
    does nothing."""

    def __init__(self, files: Iterable[str] | None) -> None:
        self.files = {os.path.realpath(file) for file in files or ()} if sys.platform == "linux" else set()
        self.waiting = 0

    def read(self, nbytes: int) -> None:
        self.waiting += nbytes
        if self.files and self.waiting >= AFTER:
            self.waiting = 0
            for start, length in _mappings(self.files):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), DONTNEED)


def _mappings(files: set[str]) -> Iterable[tuple[int, int]]:
    """Start and length of this process' mappings of the files that it has not written to."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            where, _, *_, path = line.rstrip("\n").split(maxsplit=5)
            if path in files:
                start, end = (int(part, 16) for part in where.split("-"))
                yield start, end - start
