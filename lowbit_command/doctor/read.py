"""Reads of the system that never raise: what is not there is empty."""

from __future__ import annotations

import os
from pathlib import Path


def text(path: str | os.PathLike[str]) -> str:
    """A file's text, or ""."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def mount_of(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The mount point that holds a path, and its file system type; "" where /proc does not say."""
    place = os.path.realpath(path)
    best = ("", "")
    for line in text("/proc/self/mounts").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = point, fields[2]
    return best


def noexec(path: str | os.PathLike[str]) -> bool:
    """Whether the file system is mounted so that libraries on it cannot be loaded."""
    try:
        return hasattr(os, "ST_NOEXEC") and bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False


def free(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(free, total) bytes of the file system that holds a path; zeros where it is not there."""
    try:
        info = os.statvfs(path)
    except (OSError, AttributeError):
        return 0, 0
    return info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize


def has_gpu() -> bool:
    """Whether the kernel driver shows an NVIDIA GPU; asks the driver nothing, so it cannot hang."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or os.path.exists("/usr/lib/wsl/lib/libcuda.so.1")
