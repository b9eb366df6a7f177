"""glibc's malloc, told to give large tensors back to the system.

By default it takes memory of up to 32 MiB from heaps of its own, one for each thread, and keeps there what is freed:
forward and backward run in different threads, so that tensors of a training step come from several such heaps, none of
which can use what another has free. Resident memory is then 13 to 39 % above what the tensors take. With a fixed
threshold each larger tensor is a mapping of its own, which goes when the tensor does: 4 to 11 %. A step takes as long:
the kernel clears as many pages either way.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache

THRESHOLD = 2**20
"""Bytes from which memory is mapped by itself."""
_M_MMAP_THRESHOLD = -3  # malloc.h


@cache
def _set() -> bool:
    told = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if told or platform.libc_ver()[0] != "glibc":
        return False
    return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, THRESHOLD) == 1


def return_large_tensors(device: str, say: Callable[[str], None]) -> None:
    """Set the threshold for this process, for a run on "cpu"; ``say`` takes the line that tells of it, once.

    Nothing changes on another device, without glibc, or where the environment sets it: $MALLOC_MMAP_THRESHOLD_, or
    glibc.malloc.mmap_threshold in $GLIBC_TUNABLES.
    """
    if device == "cpu" and not _set.cache_info().currsize and _set():
        say(
            "malloc: tensors of 1 MiB and more go back to the system when they are freed, so that resident memory is "
            "within 12 % of what lowbit plan says (MALLOC_MMAP_THRESHOLD_ in the environment sets another size)"
        )
