"""torch itself: whether it can be imported, and why not; and the OpenMP runtimes of a process that trains."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import mount_of, text

BARE = True  # it imports torch itself, and looks what happens
LIMIT = 60.0
REINSTALL = "pip install --force-reinstall torch"
_RUNTIME = re.compile(r"lib(gomp|omp|iomp5)[-.\w]*\.(so|dylib)[.\d]*$")
_TINY = '#include <string>\nextern "C" int answer() { return (int)std::string("42").size(); }\n'


def gather() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "environment": {k: os.environ.get(k, "") for k in ("LD_PRELOAD", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")},
        "conda": os.path.isdir(os.path.join(sys.prefix, "conda-meta")),
    }
    try:
        import torch
    except Exception as error:
        where = mount_of(Path(sys.prefix))[0]
        return facts | {"error": f"{type(error).__name__}: {error}", "mount": where}
    facts |= {"error": "", "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    facts |= {"threads": torch.get_num_threads(), "runtimes": runtimes(), "bundled": _bundled(Path(torch.__file__))}
    return facts | _with_a_kernel()


def _with_a_kernel() -> dict[str, Any]:
    """What a compiled kernel adds: a runtime of its own, or an error of the loader."""
    import tempfile

    from lowbit_lightning.kernels import compile

    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        os.environ["LOWBIT_LIGHTNING_CACHE"] = cache
        warnings.simplefilter("ignore")
        try:
            compile.host_library(_TINY).answer()
        except compile.Unavailable as error:
            return {"kernel": "" if isinstance(error, compile.CompilerNotFound) else str(error)}
        except (OSError, compile.CompileError) as error:
            return {"kernel": str(error)}
        return {"kernel": "", "with_kernel": runtimes()}


def runtimes() -> list[str]:
    """The files of OpenMP runtimes that this process has mapped, each once."""
    found: dict[tuple[str, str], str] = {}
    for line in text("/proc/self/maps").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and _RUNTIME.search(fields[5].strip()):
            found[fields[3], fields[4]] = fields[5].strip()
    return sorted(set(found.values()))


def _bundled(torch: Path) -> list[str]:
    """Other packages beside torch that bring a libgomp of their own, which they load when they are imported."""
    folders = {path.parent.name for path in torch.parents[1].glob("*.libs/libgomp*")}
    return sorted(folder.removesuffix(".libs") for folder in folders if not folder.startswith("torch"))


def judge(facts: dict[str, Any]) -> list[Finding]:
    if facts["error"]:
        return [_import_error(facts)]
    kind = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU only"
    findings = [ok("torch", f"{facts['version']} ({kind})")]
    if facts["kernel"]:
        findings.append(_kernel_error(facts))
    return [*findings, _openmp(facts)]


def _import_error(facts: dict[str, Any]) -> Finding:
    said, library_path = facts["error"], facts["environment"]["LD_LIBRARY_PATH"]
    version = re.search(r"version [`'](GLIBC(?:XX)?_[\d.]+|CXXABI_[\d.]+)' not found", said)
    if "No module named 'torch'" in said:
        return fail("torch", "torch is not installed", "pip install torch")
    if version and version[1].startswith("GLIBC_"):
        text = f"the system's C library is too old for this torch: it has no {version[1]}"
        return fail("torch", text, 'docker run --rm -it -v "$PWD":/work -w /work python:3.12-bookworm bash')
    if version:
        text = f"the libstdc++ that is loaded first is too old for this torch: it has no {version[1]}"
        return fail("torch", text, _newer_libstdcxx(facts))
    if "failed to map segment" in said:
        text = f"torch lies on a file system that is mounted noexec ({facts['mount']})"
        return fail("torch", text, f"sudo mount -o remount,exec {facts['mount']}")
    if "undefined symbol" in said and library_path:
        text = f"libraries of LD_LIBRARY_PATH={library_path} hide those of torch's wheel ({_first(said)})"
        return fail("torch", text, "unset LD_LIBRARY_PATH")
    missing = re.search(r"(lib[\w.+-]+): cannot open shared object file", said)
    if missing:
        return fail("torch", f"the wheel is incomplete or of another CUDA version: {missing[1]} is missing", REINSTALL)
    return fail("torch", f"torch cannot be imported: {_first(said)}", REINSTALL)


def _kernel_error(facts: dict[str, Any]) -> Finding:
    said = facts["kernel"]
    if "GLIBCXX" in said or "CXXABI" in said or "GLIBC_" in said:
        text = (
            f"kernels cannot be loaded: the libstdc++ loaded with torch is older than the compiler's ({_first(said)})"
        )
        return fail("libstdc++", text, _newer_libstdcxx(facts))
    return fail("kernels", f"a compiled kernel cannot be loaded beside torch: {_first(said)}", REINSTALL)


def _newer_libstdcxx(facts: dict[str, Any]) -> str:
    if facts["conda"]:
        return "conda install -y -c conda-forge 'libstdcxx-ng>=13'"
    if facts["environment"]["LD_LIBRARY_PATH"]:
        return "unset LD_LIBRARY_PATH"
    return "sudo apt-get install -y --only-upgrade libstdc++6"


def _openmp(facts: dict[str, Any]) -> Finding:
    loaded = facts.get("with_kernel") or facts["runtimes"]
    names = ", ".join(os.path.basename(path) for path in loaded) or "none"
    preloaded = [path for path in facts["environment"]["LD_PRELOAD"].replace(":", " ").split() if _RUNTIME.search(path)]
    if len(loaded) > 1 and not preloaded:
        text = (
            f"{len(loaded)} OpenMP runtimes are loaded in one process ({names}): their threads fight for the cores,"
            " and results can be wrong"
        )
        return warn("OpenMP", text, f"export LD_PRELOAD={(facts['runtimes'] or loaded)[0]}")
    if facts["threads"] == 1 and facts["environment"]["OMP_NUM_THREADS"] == "1":
        return ok("OpenMP", f"{names}; one thread, as OMP_NUM_THREADS=1 asks for")
    shared = f", preloaded: {os.path.basename(preloaded[0])}" if preloaded and len(loaded) > 1 else ""
    others = f"; {', '.join(facts['bundled'])} would load another" if facts["bundled"] and not preloaded else ""
    return ok("OpenMP", f"{names}{shared}; {facts['threads']} threads{others}")


def _first(said: str) -> str:
    return said.strip().partition("\n")[0][:200]
