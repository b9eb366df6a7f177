"""What the doctor says of machines that are described by facts: each set-up failure, its level, cause and remedy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from lowbit_command.doctor.children import Died
from lowbit_command.doctor.examine import PROBES, died
from lowbit_command.doctor.finding import FAIL, OK, WARN, Finding, exit_status

GLIBCXX = (
    "ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by libtorch.so)"
)
BUILTINS = "nvrtc: error: failed to open libnvrtc-builtins.so.13.0."
GOMP = ["/venv/torch/lib/libgomp.so.1", "/usr/lib/libgomp.so.1"]
GOOD: dict[str, dict[str, Any]] = {
    "system": {
        **{"system": "Linux", "release": "6.1", "machine": "x86_64", "libc": ["glibc", "2.36"], "musl": False},
        **{"python": [3, 11, 2], "processor": "Some CPU", "flags": ["avx2", "avx512_vnni"], "memory": 2**33, "cpus": 8},
    },
    "packages": {
        "versions": dict.fromkeys(import_module("lowbit_command.doctor.probes.packages").NEEDED, "1.0"),
        "requires": [],
        "unfit": [],
    },
    "torch": {
        "environment": {"LD_PRELOAD": "", "LD_LIBRARY_PATH": "", "OMP_NUM_THREADS": ""},
        **{"conda": False, "error": "", "mount": "/", "version": "2.9.0", "cuda": "13.0", "hip": None, "threads": 8},
        **{"runtimes": GOMP[:1], "with_kernel": GOMP[:1], "kernel": "", "bundled": []},
    },
    "compiler": {
        **{"cxx": "", "gpu": False, "system": "Linux", "distribution": ["debian"], "conda": False, "root": False},
        **{"command": ["/usr/bin/c++"], "version": "g++ 12.2.0", "error": "", "seconds": 0.5},
    },
    "gpu": {
        **{"gpu": True, "driver": "580.65.06", "torch_cuda": "13.0", "visible": None, "status": 0, "cuda": [13, 0]},
        **{"devices": 1, "names": ["NVIDIA H200"], "library": ""},
    },
    "nvrtc": {"gpu": True, "version": "13.0", "error": "", "seconds": 0.1, "torch_cuda": "13.0"},
    "cache": {
        **{"place": "/home/me/.cache/lowbit_lightning", "named": False, "home": "/home/me", "user": 1000},
        **{"exists": True, "directory": True, "owner": 1000, "mode": 0o700, "writable": True, "noexec": False},
        **{"mount": ["/", "ext4"], "entries": 3, "bytes": 9000, "corrupt": 0, "foreign": 0, "checked": 3},
        **{"others": ["/tmp"], "runnable_others": ["/tmp"], "memory": True},
    },
    "limits": {
        **{"TMPDIR": "", "temporary": "/tmp", "temporary_error": "", "temporary_free": 2**34},
        **{"temporary_noexec": False, "shm": [2**33, 2**33], "cpus": 8, "allowed": 8, "quota": None, "threads": ""},
        **{"container": False, "gpu": True, "memlock": -1},
    },
    "environment": {
        **{"set": {}, "backends": ["cpu", "cuda", "reference"], "pages_exist": None, "pages_writable": None},
        **{"pages_kind": "", "pages_free": 0},
    },
}
CACHE_GONE = {"exists": False, "creatable": False, "error": "Read-only file system"}
NO_PLACE: dict[str, Any] = {"others": [], "runnable_others": [], "memory": False}
TORCH_ENV = GOOD["torch"]["environment"]

# probe, what differs from a good machine, level, words of the finding, words of its command
FAILURES: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    # 1: a native library is missing, or the wheel is of another CUDA
    ("wheel", "torch", {"error": "ImportError: libcudart.so.13: cannot open shared object file: No such file"},
     FAIL, "libcudart.so.13 is missing", "pip install --force-reinstall torch"),
    ("hidden wheel", "torch",
     {"error": "ImportError: undefined symbol: ncclCommX", "environment": {**TORCH_ENV, "LD_LIBRARY_PATH": "/cuda"}},
     FAIL, "LD_LIBRARY_PATH=/cuda", "unset LD_LIBRARY_PATH"),
    ("no torch", "torch", {"error": "ModuleNotFoundError: No module named 'torch'"},
     FAIL, "not installed", "pip install"),
    ("wrong version", "packages", {"unfit": [["lightning", "2.4.0", "lightning>=2.5"]]},
     FAIL, "lightning 2.4.0 (needs lightning>=2.5)", "pip install 'lightning>=2.5'"),
    # 2: the driver is older than the wheel's CUDA
    ("old driver", "gpu", {"cuda": [12, 8], "driver": "570.1"}, FAIL, "driver 570.1 for CUDA 12.8 is older", "cu126"),
    ("wheel for CPUs", "gpu", {"torch_cuda": ""}, WARN, "build for CPUs", "uv pip install --reinstall torch"),
    ("mismatched driver", "gpu", {"status": 803}, FAIL, "does not match its kernel module", "reboot"),
    ("no fabric manager", "gpu", {"status": 802}, FAIL, "fabric manager", "systemctl start nvidia-fabricmanager"),
    ("no driver library", "gpu", {"library": "libcuda.so.1: cannot open"},
     FAIL, "not the driver's library", "--gpus all"),
    ("hidden GPU", "gpu", {"status": 100, "visible": ""}, WARN, "hides every GPU", "unset CUDA_VISIBLE_DEVICES"),
    # 3: no compiler
    ("no compiler", "compiler", {"command": []}, FAIL, "no C++ compiler", "sudo apt-get install -y g++"),
    ("no compiler, a GPU", "compiler", {"command": [], "gpu": True}, WARN, "GPU kernels do not need one", "g++"),
    ("no compiler, Fedora", "compiler", {"command": [], "distribution": ["fedora"]}, FAIL, "no C++", "dnf install"),
    ("no compiler, root", "compiler", {"command": [], "root": True}, FAIL, "no C++ compiler", "apt-get install -y g++"),
    ("no compiler, conda", "compiler", {"command": [], "conda": True}, FAIL, "no C++ compiler", "conda install"),
    ("wrong CXX", "compiler", {"command": [], "cxx": "nope"}, FAIL, "$CXX = 'nope'", "unset CXX"),
    ("old compiler", "compiler", {"error": "error: bad value 'native' for '-march=native' switch"},
     FAIL, "-march=native", "export CXX="),
    # 4: NVRTC or its builtins
    ("no NVRTC", "nvrtc", {"version": "", "error": "No module named 'cuda'"}, FAIL, "is not available", "cuda-toolkit"),
    ("NVRTC of CUDA 12", "nvrtc", {"version": "", "error": "x", "torch_cuda": "12.8"}, FAIL, "NVRTC", "==12.*"),
    ("no builtins", "nvrtc", {"error": BUILTINS}, FAIL, "builtins (libnvrtc-builtins.so.13.0", "--force-reinstall"),
    # 5: old glibc or libstdc++
    ("old glibc", "system", {"libc": ["glibc", "2.17"]}, FAIL, "glibc 2.17 is too old", "docker run"),
    ("musl", "system", {"libc": ["", ""], "musl": True}, FAIL, "musl", "docker run"),
    ("old glibc for torch", "torch", {"error": "OSError: version `GLIBC_2.32' not found"},
     FAIL, "no GLIBC_2.32", "docker"),
    ("old libstdc++", "torch", {"error": GLIBCXX}, FAIL, "no GLIBCXX_3.4.30", "libstdc++6"),
    ("old libstdc++, conda", "torch", {"error": GLIBCXX, "conda": True}, FAIL, "GLIBCXX_3.4.30", "conda install"),
    ("kernels' libstdc++", "torch", {"kernel": "GLIBCXX_3.4.32 not found"},
     FAIL, "older than the compiler", "libstdc++6"),
    ("old Python", "system", {"python": [3, 8, 1]}, FAIL, "3.10 to 3.13 are supported", "python=3.13"),
    # 6: two OpenMP runtimes
    ("two libgomp", "torch", {"with_kernel": GOMP}, WARN, "2 OpenMP runtimes", f"export LD_PRELOAD={GOMP[0]}"),
    # 7: the cache
    ("read-only HOME", "cache", CACHE_GONE, WARN, "Read-only file system", "export LOWBIT_LIGHTNING_CACHE=/tmp"),
    ("read-only HOME, nothing else", "cache", CACHE_GONE | NO_PLACE, FAIL, "slow reference", "/dev/shm"),
    ("HOME=/", "cache", {"place": None, "home": "/"}, WARN, "no home directory", "LOWBIT_LIGHTNING_CACHE="),
    ("not writable", "cache", {"writable": False}, WARN, "compiles its kernels again", "LOWBIT_LIGHTNING_CACHE="),
    ("a named one not writable", "cache", {"writable": False, "named": True}, WARN, "cannot be written", "unset"),
    ("another user's", "cache", {"owner": 1001}, FAIL, "belongs to user 1001, this is user 1000", "mkdir -m 700"),
    ("writable by others", "cache", {"mode": 0o777}, FAIL, "mode 0777 lets others write it", "chmod 700"),
    ("a planted kernel", "cache", {"foreign": 1}, FAIL, "1 kernel that another user wrote", "-delete"),
    ("damaged", "cache", {"corrupt": 2}, WARN, "2 damaged or outdated kernels", "-delete"),
    ("a file", "cache", {"directory": False}, FAIL, "is no directory", "rm "),
    ("NFS", "cache", {"mount": ["/home", "nfs4"]}, WARN, "network file system (nfs4)", "LOWBIT_LIGHTNING_CACHE=/tmp"),
    # 8: noexec
    ("noexec", "cache", {"noexec": True, "mount": ["/home", "ext4"]}, WARN, "mounted noexec (/home)", "/tmp"),
    ("noexec, nowhere else", "cache", {"noexec": True} | NO_PLACE, FAIL, "slow reference", "LOWBIT_LIGHTNING_CACHE"),
    ("noexec venv", "torch", {"error": "OSError: failed to map segment from shared object", "mount": "/data"},
     FAIL, "mounted noexec (/data)", "mount -o remount,exec /data"),
    # and the limits
    ("small /dev/shm", "limits", {"shm": [2**26, 2**26]}, WARN, "64 MiB of 64 MiB free", "remount,size=8G"),
    ("small /dev/shm in a container", "limits", {"shm": [2**26, 2**26], "container": True},
     WARN, "64 MiB", "--shm-size"),
    ("CPU quota", "limits", {"quota": 1.5}, WARN, "grants 1.5 CPUs, but torch starts 8 threads", "OMP_NUM_THREADS=1"),
    ("too many threads", "limits", {"threads": "64"}, WARN, "torch starts 64 threads", "OMP_NUM_THREADS=8"),
    ("memlock", "limits", {"memlock": 65536}, WARN, "64 KiB may be locked", "ulimit -l unlimited"),
    ("no TMPDIR", "limits", {"temporary": "", "temporary_error": "none"}, FAIL, "nothing can be compiled", "mkdir"),
    ("wrong TMPDIR", "limits", {"TMPDIR": "/gone"}, WARN, "/gone cannot be written; /tmp is used", "unset TMPDIR"),
    ("full TMPDIR", "limits", {"temporary_free": 2**20}, WARN, "1 MiB free", "export TMPDIR"),
    ("forced reference", "environment", {"set": {"BACKEND": "reference"}}, WARN, "slow plain-torch", "unset"),
    ("wrong backend", "environment", {"set": {"BACKEND": "gpu"}}, FAIL, "cpu, cuda, reference", "unset"),
    ("misspelt variable", "environment", {"set": {"CHACHE": "/x"}},
     WARN, "nothing reads it", "LOWBIT_LIGHTNING_CHACHE"),
    ("no folder of pages", "environment", {"set": {"PAGES": "/x"}, "pages_exist": False},
     FAIL, "not exist", "mkdir -p /x"),
    ("pages in memory", "environment",
     {"set": {"PAGES": "/shm"}, "pages_exist": True, "pages_writable": True, "pages_kind": "tmpfs"},
     FAIL, "lies in memory (tmpfs)", "/var/tmp"),
]  # fmt: skip


def judge(probe: str, **changes: Any) -> list[Finding]:
    return import_module(f"lowbit_command.doctor.probes.{probe}").judge(GOOD[probe] | changes)


@pytest.mark.parametrize("probe", PROBES)
def test_a_good_machine_is_well(probe: str) -> None:
    found = judge(probe)
    assert found
    assert {finding.level for finding in found} == {OK}, found
    assert exit_status(found) == 0
    assert not any(finding.command for finding in found)


@pytest.mark.parametrize(("probe", "changes", "level", "words", "command"), [f[1:] for f in FAILURES],
                         ids=[f[0] for f in FAILURES])  # fmt: skip
def test_a_failure_has_its_line(probe: str, changes: dict[str, Any], level: str, words: str, command: str) -> None:
    wrong = [finding for finding in judge(probe, **changes) if finding.level != OK]
    assert [finding.level for finding in wrong] == [level], wrong
    assert words in wrong[0].text
    assert command in wrong[0].command
    assert "\n" not in wrong[0].command, "one command to paste"
    assert exit_status(wrong) == {WARN: 1, FAIL: 3}[level]


def test_what_needs_no_mending_is_ok() -> None:
    assert judge("nvrtc", gpu=False, version="", error="No module named 'cuda'")[0].level == OK
    assert "no NVIDIA GPU" in judge("gpu", gpu=False, library="libcuda.so.1: not found")[0].text
    preloaded = judge("torch", with_kernel=GOMP, environment={**TORCH_ENV, "LD_PRELOAD": GOMP[0]})
    assert {f.level for f in preloaded} == {OK}
    assert "scikit_learn would load another" in judge("torch", bundled=["scikit_learn"])[1].text
    assert judge("limits", quota=2.0, threads="2")[2].level == OK


@pytest.mark.parametrize(("probe", "words", "command"), [
    ("gpu", "the driver hangs", "dmesg"), ("cache", "the file system of the cache hangs", "LOWBIT_LIGHTNING_CACHE"),
    ("torch", "importing torch gave no answer", "force-reinstall"), ("limits", "gave no answer", "probes.limits"),
])  # fmt: skip
def test_a_probe_that_hangs_is_a_failure(probe: str, words: str, command: str) -> None:
    found = died(probe, Died("gave no answer in 20 s", hung=True))
    assert found.level == FAIL
    assert words in found.text
    assert command in found.command


def test_deleting_kernels_spares_everything_else() -> None:
    """A folder that was named by mistake may be a home directory."""
    for changes in ({"mode": 0o777}, {"foreign": 1}, {"corrupt": 1}):
        (found,) = judge("cache", place="/home/me", **changes)
        assert "rm -" not in found.command
        assert "-maxdepth 1 -type f" in found.command
