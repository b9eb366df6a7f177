"""The NVIDIA driver, without torch: whether it answers, and whether it is new enough for torch's CUDA."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import has_gpu, text

BARE = True
LIMIT = 20.0
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # CUDA -> driver, for any minor version (NVIDIA's compatibility guide)
_OLD_TORCH = "pip install uv && uv pip install --reinstall torch --torch-backend cu{}"  # uv knows PyTorch's own builds


def gather() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "gpu": has_gpu(),
        "driver": _driver(),
        "torch_cuda": torch_cuda(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "status": None,
        "cuda": None,
        "devices": 0,
    }
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        return facts | {"library": str(error)}
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    facts |= {"library": "", "cuda": [version.value // 1000, version.value % 1000 // 10]}
    facts["status"] = library.cuInit(0)
    if facts["status"] == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
        facts["devices"] = count.value
        facts["names"] = [_name(library, i) for i in range(count.value)]
    return facts


def _name(library: Any, index: int) -> str:
    name = ctypes.create_string_buffer(100)
    library.cuDeviceGetName(name, 100, index)
    return name.value.decode(errors="replace")


def _driver() -> str:
    """The kernel module's version, "580.65.06"; "" where none is loaded."""
    found = re.search(r"Module\S*\s+(?:for \S+\s+)?(\d+\.\d[\d.]*)", text("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def torch_cuda() -> str:
    """The CUDA version that torch was built for, without importing it; "" for a CPU build, or none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    said = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", text(Path(found.origin).with_name("version.py")), re.M)
    return said[1] if said else ""


def judge(facts: dict[str, Any]) -> list[Finding]:
    if not facts["gpu"] and facts["library"]:
        return [ok("GPU", "no NVIDIA GPU; CPU kernels serve")]
    if facts["library"]:
        text = f"there is a GPU, but not the driver's library: {facts['library']}"
        return [fail("GPU driver", text, "docker run --rm --gpus all nvidia/cuda:12.8.1-base-ubuntu24.04 nvidia-smi")]
    if facts["status"] == 0:
        return [_working(facts)]
    if facts["status"] == 100 and not facts["gpu"]:
        return [ok("GPU", "the driver sees no GPU; CPU kernels serve")]
    return [_broken(facts)]


def _broken(facts: dict[str, Any]) -> Finding:
    status, driver = facts["status"], facts["driver"] or "unknown"
    if status == 100 and facts["visible"] is not None:
        text = f"CUDA_VISIBLE_DEVICES={facts['visible']!r} hides every GPU"
        return warn("GPU driver", text, "unset CUDA_VISIBLE_DEVICES")
    known = {
        802: ("the fabric manager of the NVSwitch does not run", "sudo systemctl start nvidia-fabricmanager"),
        803: (f"the driver's library does not match its kernel module ({driver})", "sudo reboot"),
        804: ("the forward-compatibility library is used with a GPU that it does not serve", "unset LD_LIBRARY_PATH"),
        999: ("the driver failed with an unknown error", "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm"),
    }
    unknown = f"cuInit failed with status {status}", "sudo dmesg | grep -iE 'nvrm|xid' | tail"
    text, command = known.get(status, unknown)
    return fail("GPU driver", f"{text} (cuInit: {status})", command)


def _working(facts: dict[str, Any]) -> Finding:
    have = tuple(facts["cuda"])
    said = f"{', '.join(facts['names'])}; driver {facts['driver'] or '?'} for CUDA {have[0]}.{have[1]}"
    if not facts["torch_cuda"]:
        text = f"{said}; but torch is a build for CPUs, so the GPU is not used"
        return warn("GPU driver", text, _OLD_TORCH.format(_offered(have)))
    major = int(facts["torch_cuda"].split(".")[0])
    if have[0] < major:
        least = OLDEST_DRIVER.get(major, "a newer one")
        text = f"{said} is older than torch's CUDA {facts['torch_cuda']}, which needs driver {least} or newer"
        return fail("GPU driver", text, _OLD_TORCH.format(_offered(have)))
    return ok("GPU driver", f"{said}; torch's CUDA {facts['torch_cuda']}")


def _offered(have: tuple[int, ...]) -> str:
    """The newest CUDA, of those that torch is built for, that a driver of this CUDA version runs."""
    return "130" if have[0] >= 13 else "126"
