"""What the tests of page files share: marks, sizes, copies, and the kernel's own refusal to write."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_lightning.state.pages.file import FileTransport
from lowbit_lightning.state.pages.transport import Moves

MARKS = [
    pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's"),
    pytest.mark.filterwarnings("ignore:.*has no O_DIRECT"),  # tests run on any disk
]
MIB = 2**20
PAGE = 4096


def random_bytes(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8))


def moved(transport: FileTransport, way: str, *parts: tuple[Tensor, int]) -> None:
    transport.settle(getattr(transport, way)(Moves(parts), None))


def mapped() -> int:
    """Bytes of page files, which have no name, that are in this process's memory."""
    found, ours = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first:  # a mapping, by its addresses; the rest says what is known of it
                ours = line.rstrip().endswith("(deleted)") and "rw-s" in line
            elif first == "Rss:" and ours:
                found += 1024 * int(line.split()[1])
    return found


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """The kernel's own refusal to write behind a place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
