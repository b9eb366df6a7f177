"""Memory that copies run into and out of: aligned, and not shared with forked processes."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK. MADV_DONTFORK leaves a hole that a child fills with other memory, and then unmaps


def aligned(nbytes: int) -> Tensor:
    """uint8 ``[nbytes]``, at a multiple of 4096; from one huge page on at a multiple of that, and on huge pages where
    the system has them. A forked process finds zeros there; on Linux, and nowhere else.

    Without that a fork shares such memory until somebody writes to it, which gives the child a copy of all near memory
    as soon as the parent takes a step; and what the disk is reading at that time may land in the wrong one (open(2)).
    Memory that is pinned for a GPU would be copied by the fork itself, all of it.
    """
    if sys.platform != "linux":
        return torch.empty(nbytes, dtype=torch.uint8)
    huge = nbytes >= HUGE_PAGE
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE if huge else max(nbytes, 1)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (_WIPE_ON_FORK, *([mmap.MADV_HUGEPAGE] if huge else [])):
        with contextlib.suppress(OSError):  # a kernel without it
            memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE if huge else 0
    return whole[start : start + nbytes]
