"""A limit to the memory of a process, by Linux, without special rights."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
from pathlib import Path

MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc."""


def free_at_once() -> None:
    """From now on, tensors of a MiB or more go back to the system when they are freed, where malloc is glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**20)


def limit_memory(budget: int) -> None:
    """From now on, private writable memory of this process may grow by ``budget`` bytes and no further.

    Raises:
        SystemExit: if this system does not enforce that.
    """
    held = 1024 * int(re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
    resource.setrlimit(resource.RLIMIT_DATA, (held + budget, held + budget))
    try:
        mmap.mmap(-1, budget + 2**20, flags=mmap.MAP_PRIVATE).close()
    except OSError:
        return
    raise SystemExit("RLIMIT_DATA limits nothing here: Linux 4.7 or later is needed")


def refusal(error: Exception) -> str | None:
    """What an allocator said, if the error comes from one."""
    said = str(error).strip().split("\n")[-1].split("DefaultCPUAllocator: ")[-1]
    return said or "MemoryError" if isinstance(error, MemoryError) or "allocate memory" in said else None
