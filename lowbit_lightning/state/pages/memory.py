"""Memory for the source and target of copies. It is aligned, and forked processes do not share it."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK. MADV_DONTFORK leaves a hole that a child fills with other memory, and then unmaps


def aligned(nbytes: int) -> Tensor:
    """uint8 ``[nbytes]``, aligned to 4096 bytes. From 2 MiB on it is aligned to that, and uses huge pages if the system
    has them. On Linux a forked process finds zeros in this memory.

    Without that, parent and child would share the memory until one of them writes to it. The child would get a copy of
    all near memory as soon as the parent takes a step, and data that the disk is reading at that time might arrive in
    the wrong copy (open(2)). Memory that is pinned for a GPU would be copied by the fork itself.
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
