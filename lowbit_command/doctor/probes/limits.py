"""What the system lets a process have: temporary files, shared memory, processors, locked memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import free, has_gpu, noexec, text
from lowbit_command.units import amount

BARE = True
LIMIT = 10.0
LEAST_TEMPORARY = 256 << 20
LEAST_SHARED = 1 << 30
LEAST_LOCKED = 64 << 20
UNLIMITED = -1


def gather() -> dict[str, Any]:
    try:
        temporary, error = tempfile.gettempdir(), ""
    except OSError as found:
        temporary, error = "", str(found)
    facts: dict[str, Any] = {
        "TMPDIR": os.environ.get("TMPDIR", ""),
        "temporary": temporary,
        "temporary_error": error,
        "temporary_free": free(temporary)[0] if temporary else 0,
        "temporary_noexec": bool(temporary) and noexec(temporary),
        "shm": list(free("/dev/shm")) if os.path.isdir("/dev/shm") else None,
        "cpus": os.cpu_count() or 1,
        "allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "quota": _quota(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "container": os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"),
        "gpu": has_gpu(),
        "memlock": None,
    }
    try:
        import resource

        facts["memlock"] = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]  # -1: unlimited
    except (ImportError, ValueError, OSError):
        pass
    return facts


def _quota() -> float | None:
    """Processors that the control group grants, None for no limit: cgroup v2's cpu.max, else v1's cfs quota."""
    found = []
    for line in text("/proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") if not kinds else Path("/sys/fs/cgroup", kinds)
        if kinds and "cpu" not in kinds.split(","):
            continue
        place = Path(root, path.lstrip("/"))
        for group in (place, *place.parents):
            found += [quota for quota in (_of_group(group),) if quota is not None]
            if group == root:
                break
    return min(found, default=None)


def _of_group(group: Path) -> float | None:
    if "cpu.max" in (os.listdir(group) if group.is_dir() else ()):
        most, _, period = text(group / "cpu.max").strip().partition(" ")
    else:
        most, period = text(group / "cpu.cfs_quota_us").strip(), text(group / "cpu.cfs_period_us").strip()
    try:
        return int(most) / int(period) if int(most) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def judge(facts: dict[str, Any]) -> list[Finding]:
    return [*_temporary(facts), *_shared(facts), _processors(facts), *_locked(facts)]


def _temporary(facts: dict[str, Any]) -> list[Finding]:
    place, named = facts["temporary"], facts["TMPDIR"]
    if not place:
        text = f"no folder for temporary files can be written ({facts['temporary_error']}): nothing can be compiled"
        return [fail("TMPDIR", text, 'mkdir -p "$HOME/tmp" && export TMPDIR="$HOME/tmp"')]
    if named and os.path.normpath(named) != os.path.normpath(place):
        text = f"TMPDIR={named} cannot be written; {place} is used instead"
        return [warn("TMPDIR", text, "unset TMPDIR")]
    if facts["temporary_free"] < LEAST_TEMPORARY:
        text = f"{place} has {amount(facts['temporary_free'])} free: compilers and checkpoints may fail"
        return [warn("TMPDIR", text, 'mkdir -p "$HOME/tmp" && export TMPDIR="$HOME/tmp"')]
    more = ", mounted noexec (the cache serves)" if facts["temporary_noexec"] else ""
    return [ok("TMPDIR", f"{place}, {amount(facts['temporary_free'])} free{more}")]


def _shared(facts: dict[str, Any]) -> list[Finding]:
    if facts["shm"] is None:
        return []
    left, total = facts["shm"]
    if left < LEAST_SHARED:
        text = (
            f"{amount(left)} of {amount(total)} free: DataLoader workers pass batches through it,"
            " and die with SIGBUS when it is full"
        )
        remedy = "docker run --shm-size=8g" if facts["container"] else "sudo mount -o remount,size=8G /dev/shm"
        return [warn("/dev/shm", text, remedy)]
    return [ok("/dev/shm", f"{amount(left)} of {amount(total)} free")]


def _processors(facts: dict[str, Any]) -> Finding:
    allowed, quota, named = facts["allowed"], facts["quota"], facts["threads"]
    said = f"{allowed} of {facts['cpus']}" if allowed != facts["cpus"] else f"{allowed}"
    threads = int(named) if named.isdigit() else allowed
    limit = allowed if quota is None else min(allowed, quota)
    if threads > max(1, limit):
        by_group = quota is not None and quota < allowed
        granted = f"the control group grants {quota:g} CPUs" if by_group else f"{said} CPUs are allowed"
        text = f"{granted}, but torch starts {threads} threads, which wait for each other"
        return warn("CPU quota", text, f"export OMP_NUM_THREADS={max(1, int(limit))}")
    granted = "no limit" if quota is None else f"a limit of {quota:g} CPUs"
    return ok("CPU quota", f"{said} CPUs, {granted}")


def _locked(facts: dict[str, Any]) -> list[Finding]:
    limit = facts["memlock"]
    if limit is None:
        return []
    if limit != UNLIMITED and limit < LEAST_LOCKED and facts["gpu"]:
        text = f"{amount(limit)} may be locked: RDMA, and so NCCL between nodes, fails to register its buffers"
        remedy = "docker run --ulimit memlock=-1" if facts["container"] else "ulimit -l unlimited"
        return [warn("memlock", text, remedy)]
    return [ok("memlock", "unlimited" if limit == UNLIMITED else amount(limit))]
