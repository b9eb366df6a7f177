"""The system: its kind, C library, Python, processor and memory."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import text
from lowbit_command.units import amount

BARE = True
LIMIT = 5.0
OLDEST_GLIBC = (2, 28)  # torch's wheels are manylinux_2_28
PYTHONS = ((3, 10), (3, 13))
INSTRUCTIONS = (  # flag of /proc/cpuinfo -> its name; the first found is the one that int8 products use
    ("amx_int8", "AMX"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512bw", "AVX-512 BW"),
    ("avx2", "AVX2"),
    ("asimddp", "NEON with dot products"),
    ("asimd", "NEON"),
)


def gather() -> dict[str, Any]:
    library, version = platform.libc_ver()
    processor = text("/proc/cpuinfo").partition("\n\n")[0]
    lines = dict(line.split(":", 1) for line in processor.splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in lines.items()}
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "libc": [library, version],
        "musl": any(Path("/lib").glob("ld-musl-*")),
        "python": list(sys.version_info[:3]),
        "processor": said.get("model name") or platform.processor(),
        "flags": (said.get("flags") or said.get("Features") or "").split(),
        "memory": _memory(),
        "cpus": os.cpu_count(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def judge(facts: dict[str, Any]) -> list[Finding]:
    return [_system(facts), _python(facts), _processor(facts)]


def _system(facts: dict[str, Any]) -> Finding:
    library, version = facts["libc"]
    said = " ".join(filter(None, (facts["system"], facts["release"], facts["machine"], library, version)))
    if facts["system"] == "Linux" and library == "glibc" and _numbers(version) < OLDEST_GLIBC:
        need = ".".join(map(str, OLDEST_GLIBC))
        text = f"{said}: glibc {version} is too old; torch's wheels and compiled kernels need {need} or newer"
        return fail("system", text, 'docker run --rm -it -v "$PWD":/work -w /work python:3.12-bookworm bash')
    if facts["system"] == "Linux" and library != "glibc" and facts["musl"]:
        text = f"{said}: this Linux has musl, for which there are no wheels of torch"
        return fail("system", text, 'docker run --rm -it -v "$PWD":/work -w /work python:3.12-bookworm bash')
    if facts["system"] == "Windows":
        return warn("system", f"{said}: on Windows the CPU kernels run by the slow reference", "wsl --install")
    return ok("system", said)


def _python(facts: dict[str, Any]) -> Finding:
    version = ".".join(map(str, facts["python"]))
    if PYTHONS[0] <= tuple(facts["python"][:2]) <= PYTHONS[1]:
        return ok("Python", version)
    least, most = (".".join(map(str, v)) for v in PYTHONS)
    return fail("Python", f"{version}; {least} to {most} are supported", f"conda create -n lowbit python={most}")


def _processor(facts: dict[str, Any]) -> Finding:
    best = next((name for flag, name in INSTRUCTIONS if flag in facts["flags"]), "")
    memory = facts["memory"] and amount(facts["memory"])
    said = ", ".join(filter(None, (facts["processor"], f"{facts['cpus']} CPUs", memory, best)))
    return ok("processor", said)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
