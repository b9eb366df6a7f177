"""The just-in-time compiler: text in, a loaded host library or a CUDA binary out.

Nothing is compiled when the package is built or imported. A kernel is source text. Its first use compiles it for the
machine that runs it, and keeps the result (cache.py). The name of a cache entry is a hash of all that its content
depends on: the text with its headers, the flags, the compiler and its version, and the processor or GPU architecture.
So a new compiler, another node of a cluster or an edited header leads to a new entry, never to a wrong one.

    library = host_library(source_text("blockwise.cpp"))       # C++, by $CXX, c++, g++ or clang++, called by ctypes
    binary = cubin(source_text("blockwise.cu"), "sm_90")       # CUDA C++, by NVRTC; needs neither nvcc nor a driver

Both compilers get the flags that the arithmetic contract needs: no contraction of a * b + c into one rounding,
correctly rounded division and square root, subnormal numbers kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit_lightning.kernels.compile import cache
from lowbit_lightning.kernels.compile.errors import CompileError, CompilerNotFound
from lowbit_lightning.kernels.compile.errors import NoPlace as NoPlace
from lowbit_lightning.kernels.compile.errors import Unavailable as Unavailable

SOURCES = Path(__file__).resolve().parents[1] / "src"
NVRTC_HINT = (
    "pip install 'cuda-core>=1.2,<2' and, unless a CUDA build of torch 2.11 or newer has brought them,"
    " 'cuda-bindings>=13.0.3,<14' 'cuda-toolkit[cudart,nvrtc]==13.*' (12 in place of 13 for a CUDA 12 driver)"
)
_HOST_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
_CANNOT_WRITE = re.compile(
    r"No space left on device|Read-only file system|Disk quota exceeded|[Cc]annot create temporary"
)
_libraries: dict[str, ctypes.CDLL] = {}
_lock = threading.Lock()


# ---------------------------------------------------------------------------------------------------------------------
# Source text


@functools.cache
def sources_digest() -> str:
    """Changes with any file of ``kernels/src``: what was measured of older kernels says nothing of these."""
    files = sorted(path for path in SOURCES.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def source_text(*names: str, prelude: str = "", generated: Mapping[str, str] | None = None) -> str:
    """``prelude``, then the named files of ``kernels/src``, as one text that needs no include path.

    The first ``#include "x.h"`` of each of our files is replaced by the file, or by ``generated["x.h"]``, and further
    ones are dropped; ``#include <...>`` stays. ``#line`` markers make the compilers name the right file and line.
    """
    seen: set[str] = set()
    parts = [prelude.rstrip("\n") + "\n"] if prelude else []
    parts += [_inlined(name, seen, generated or {}) for name in names]
    return "".join(parts)


def _inlined(name: str, seen: set[str], generated: Mapping[str, str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    out = [f'#line 1 "{name}"']
    text = generated[name] if name in generated else (SOURCES / name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include:
            out += [_inlined(include[1], seen, generated) + f'#line {number + 1} "{name}"']
        elif line.strip() != "#pragma once":  # it would warn in a main file, and each header is here once anyway
            out += [line]
        else:
            out += [""]
    return "\n".join(out) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Host C++


def host_library(text: str, *, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile C++ for this processor and load it; the same text and flags give the same library.

    ``flags`` follow the standard ones, so they take precedence. OpenMP is on (``_OPENMP`` is defined) if the library
    would share the runtime that torch has already loaded. Otherwise the text has to start its own threads.

    Raises:
        CompilerNotFound: if there is no compiler.
        CompileError: with the compiler's log, if the text does not compile.
    """
    compiler = host_compiler()
    with _lock:
        threads = ("-fopenmp",) if _shares_openmp(compiler) else ()
        try:
            return _host_library(text, compiler, threads + flags)
        except CompileError as error:
            # GCC without its OpenMP headers or specs. Any other mistake in the text is reported as it stands.
            if not (threads and re.search(r"omp\.h|gomp|fopenmp", error.log)):
                raise
        return _host_library(text, compiler, flags)


def host_compiler() -> tuple[str, ...]:
    """The command of the host C++ compiler: $CXX if that is set, else the first of c++, g++, clang++."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            return (path, *command[1:])
    tried = f"$CXX = {os.environ['CXX']!r}" if named else "$CXX (not set), c++, g++, clang++"
    raise CompilerNotFound(
        f"no C++ compiler: tried {tried}. Install g++ or clang++, or set CXX; without one the CPU kernels fall back to"
        " the slow plain-torch reference."
    )


def _host_library(text: str, compiler: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    command = (*compiler, *_HOST_FLAGS, _tune(), *flags)
    key = _key("host", text, *command, _version(compiler), *processor(), *platform.libc_ver())
    if key in _libraries:
        return _libraries[key]
    _libraries[key] = cache.library(f"{key}.so", lambda: _compile_host(text, command))
    return _libraries[key]


def _compile_host(text: str, command: tuple[str, ...]) -> bytes:
    reasons: list[str] = []
    for place in [*cache.temporary_places(), *filter(None, [cache.directory()])]:
        try:
            with tempfile.TemporaryDirectory(
                prefix="lowbit_lightning-", dir=place, ignore_cleanup_errors=True
            ) as scratch:
                source, out = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
                source.write_text(text, encoding="utf-8")
                log = _run((*command, str(source), "-o", str(out)), scratch)
                if not log:
                    return out.read_bytes()
                reasons.append(f"the compiler cannot work in {str(place)!r} ({log.strip().splitlines()[-1]})")
        except OSError as error:
            reasons.append(f"the compiler cannot work in {str(place)!r} ({error})")
    raise cache.no_place(reasons or ["there is no directory for temporary files"])


def _run(command: tuple[str, ...], scratch: str) -> str:
    """Run the compiler, with its temporary files in ``scratch``. Returns its log if it cannot write there, or ""."""
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": scratch}, capture_output=True, text=True, errors="replace"
    )
    log = done.stderr + done.stdout
    if done.returncode and not _CANNOT_WRITE.search(log):
        raise CompileError("the host compiler refused a kernel.", shlex.join(command), log)
    return log if done.returncode else ""


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise CompileError("the host compiler does not work.", shlex.join([*compiler, "--version"]), done.stderr)
    return done.stdout


@functools.cache
def processor() -> tuple[str, ...]:
    """What -march=native depends on, so that nodes with different processors can share a cache."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return (platform.machine(), platform.processor(), platform.platform())
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU ")
    return (platform.machine(), *(line for line in first.splitlines() if line.startswith(wanted)))


def _tune() -> str:
    # Clang on ARM knows only -mcpu=native; on x86 -march is the one that chooses instructions.
    return "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"


def _shares_openmp(compiler: tuple[str, ...]) -> bool:
    """Whether an object built with -fopenmp would use an OpenMP runtime that this process has already loaded.

    Two runtimes in one process would be two thread pools that compete for the cores. So OpenMP is only used if shared.
    """
    runtime = "libomp.so" if "clang" in _version(compiler).lower() else "libgomp.so.1"
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        ctypes.CDLL(runtime, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


@dataclass(frozen=True)
class Cubin:
    """A CUDA binary for one architecture, and what the compiler said about it (``resources`` reads it)."""

    code: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """What one kernel uses, as ptxas reports it: registers per thread, and bytes of everything else."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def cubin(text: str, arch: str) -> Cubin:
    """Compile CUDA C++ to a binary for ``arch`` ("sm_90").

    Raises:
        CompilerNotFound: if there is no NVRTC.
        CompileError: with the compiler's log, if the text does not compile.
    """
    version = nvrtc_version()
    key = _key("cuda", text, arch, version)
    entry = cache.find(f"{key}.cubin")
    if entry is None:
        made = _compile_cuda(text, arch, version)
        log = made.log.encode()
        cache.store(f"{key}.cubin", made.code + log + len(log).to_bytes(8, "little"))
        return made
    content = cache.body(entry)
    length = int.from_bytes(content[-8:], "little")
    return Cubin(content[: -8 - length], content[-8 - length : -8].decode())


def resources(log: str) -> dict[str, Resources]:
    """Kernel name -> the resources that it uses, from the log of a Cubin."""

    def number(pattern: str, part: str) -> int:
        match = re.search(pattern, part)
        return int(match[1]) if match else 0  # ptxas leaves out what is zero

    return {
        part.split("'", 1)[0]: Resources(
            registers=number(r"Used (\d+) registers", part),
            shared=number(r"(\d+) bytes smem", part),
            stack=number(r"(\d+) bytes stack frame", part),
            spill_stores=number(r"(\d+) bytes spill stores", part),
            spill_loads=number(r"(\d+) bytes spill loads", part),
        )
        for part in log.split("Compiling entry function '")[1:]
    }


@functools.cache
def nvrtc_version() -> str:
    """The version of the NVRTC that this process has loaded. It may be torch's copy, and older than one installed."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program  # noqa: F401  (the compile below needs it)

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # ImportError, or the loader's own kinds when the library is missing
        raise CompilerNotFound(f"NVRTC, the CUDA compiler, is not available ({error}). {NVRTC_HINT}") from error
    return f"{major}.{minor}"


def _compile_cuda(text: str, arch: str, version: str) -> Cubin:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name="kernel.cu",
        arch=arch,
        std="c++17",
        fma=False,
        ftz=False,
        prec_div=True,
        prec_sqrt=True,
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        code = Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # cuda.core's NVRTCError carries the log in its text
        command = f"nvrtc {version} " + shlex.join(option.decode() for option in options.as_bytes("nvrtc"))
        raise CompileError(f"NVRTC refused a kernel for {arch}.", command, log.getvalue() + str(error)) from error
    return Cubin(bytes(code), log.getvalue())


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:32]
