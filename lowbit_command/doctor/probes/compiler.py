"""The host's C++ compiler: which, and whether what it makes runs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import has_gpu, text

BARE = True
LIMIT = 60.0
_TINY = '#include <cmath>\n#include <vector>\nextern "C" int answer() { return (int)std::vector<int>(42).size(); }\n'
_INSTALL = {  # an ID of /etc/os-release -> what installs g++
    "debian": "sudo apt-get install -y g++",
    "ubuntu": "sudo apt-get install -y g++",
    "fedora": "sudo dnf install -y gcc-c++",
    "rhel": "sudo dnf install -y gcc-c++",
    "centos": "sudo dnf install -y gcc-c++",
    "amzn": "sudo dnf install -y gcc-c++",
    "suse": "sudo zypper install -y gcc-c++",
    "arch": "sudo pacman -S --noconfirm gcc",
    "alpine": "sudo apk add g++",
}


def gather() -> dict[str, Any]:
    from lowbit_lightning.kernels import compile

    facts: dict[str, Any] = {
        "cxx": os.environ.get("CXX", ""),
        "gpu": has_gpu(),
        "system": platform.system(),
        "distribution": _distribution(),
        "conda": os.path.isdir(os.path.join(sys.prefix, "conda-meta")),
        "root": hasattr(os, "geteuid") and os.geteuid() == 0,
    }
    try:
        command = compile.host_compiler()
    except compile.CompilerNotFound:
        return facts | {"command": [], "version": "", "error": "", "seconds": 0.0}
    facts |= {"command": list(command), "version": "", "error": "", "seconds": 0.0}
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        os.environ["LOWBIT_LIGHTNING_CACHE"] = cache  # so that it compiles, whatever the user's cache holds
        warnings.simplefilter("ignore")
        try:
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
            facts["version"] = done.stdout.partition("\n")[0]
            start = time.perf_counter()
            if compile.host_library(_TINY).answer() != 42:
                facts["error"] = "what it compiles gives wrong results"
            facts["seconds"] = time.perf_counter() - start
        except compile.CompileError as error:
            facts["error"] = error.log or str(error)
        except OSError as error:
            facts["error"] = str(error)
    return facts


def _distribution() -> list[str]:
    """ID and ID_LIKE of /etc/os-release."""
    said = dict(line.split("=", 1) for line in text("/etc/os-release").splitlines() if "=" in line)
    return f"{said.get('ID', '')} {said.get('ID_LIKE', '')}".replace('"', "").split()


def judge(facts: dict[str, Any]) -> list[Finding]:
    name = " ".join(facts["command"])
    if not facts["command"]:
        tried = f"$CXX = {facts['cxx']!r}" if facts["cxx"] else "c++, g++, clang++"
        text = f"no C++ compiler (tried {tried}): CPU kernels run by the plain-torch reference, many times slower"
        command = "unset CXX" if facts["cxx"] else install(facts)
        if facts["gpu"]:
            return [warn("compiler", f"{text}; GPU kernels do not need one", command)]
        return [fail("compiler", text, command)]
    if facts["error"]:
        return [fail("compiler", f"{name} does not work: {_reason(facts['error'])}", _mend(facts))]
    return [ok("compiler", f"{facts['version']} ({name}), {facts['seconds']:.1f} s for a small kernel")]


def _reason(log: str) -> str:
    """The first line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\berror\b|cannot|not found|No such file", line)]
    return (wrong or lines or ["it said nothing"])[0][:200]


def _mend(facts: dict[str, Any]) -> str:
    log = facts["error"]
    if re.search(r"-march=native|unrecognized command|unknown target CPU", log):
        return "export CXX=clang++" if "clang" not in facts["version"] else "export CXX=g++"
    if re.search(r"No space left|[Rr]ead-only file system|cannot create temporary", log):
        return 'export TMPDIR="$(mktemp -d -p /dev/shm)"'
    return install(facts)


def install(facts: dict[str, Any]) -> str:
    """What installs a compiler on this system."""
    if facts["conda"]:
        return "conda install -y -c conda-forge gxx"
    if facts["system"] == "Darwin":
        return "xcode-select --install"
    found = next((_INSTALL[name] for name in facts["distribution"] if name in _INSTALL), _INSTALL["debian"])
    return found.removeprefix("sudo ") if facts["root"] else found
