"""Builds a kernel's text for the CPU and launches it on NumPy arrays or torch CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit_lightning.kernels.compile import cache, host_compiler

HERE = Path(__file__).resolve().parent
RUNTIME = ("scheduler.cpp", "checker.cpp", "wgmma.cpp")
ORDERS = {"forward": 0, "backward": 1, "random": 2}

_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(')
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\s*\([^)]*\)\s*|alignas\s*\([^)]*\)\s*)?([\w:\s]+?)\s+(\w+)\s*\[\s*\]\s*;"
)
_CTYPES = {
    "i1": ctypes.c_int8,
    "i2": ctypes.c_int16,
    "i4": ctypes.c_int32,
    "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u2": ctypes.c_uint16,
    "u4": ctypes.c_uint32,
    "u8": ctypes.c_uint64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
}


RECORD = np.dtype(
    [
        *(("address", "u8"), ("pc", "u4"), ("block", "u4"), ("thread", "u2")),
        *(("bytes", "u1"), ("write", "?"), ("shared", "?"), ("pad", "u1", 3)),
    ]
)
"""One access of a thread to global or shared memory, in the order of execution."""


class EmulatorError(RuntimeError):
    """The kernel did not compile, or it made a mistake while it ran."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("most_shared", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
    ]


class _Type(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("size", ctypes.c_int)]


class Module:
    """The kernels of one CUDA text: its functions declared ``extern "C" __global__ void``, by name in ``kernels``."""

    def __init__(self, text: str, *, check: bool = False, flags: Sequence[str] = ()) -> None:
        self.check = check
        self.kernels = _KERNEL.findall(text)
        self.path = _build(text, self.kernels, check, tuple(flags))
        self._library = ctypes.CDLL(str(self.path))
        if check:
            for name, offset, size in _shared_variables(self.path):
                self._library.emulator_add_shared_variable(
                    name.encode(), ctypes.c_size_t(offset), ctypes.c_size_t(size)
                )

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        order: str = "forward",
        seed: int = 0,
        shared: int = 0,
        most_shared: int = 99 << 10,
        memory: Iterable[Any] = (),
    ) -> None:
        """Run ``kernel``; returns when it is done.

        ``arguments``: an array or CPU tensor for a pointer, None for a null pointer, a number or ctypes value for a
        scalar, a ctypes structure or array for a struct. A ctypes value must have exactly the type that the kernel
        declares, since a GPU would read its bytes. ``order``: "forward", "backward" or "random" (by ``seed``).
        ``shared``: bytes of dynamic shared memory; ``most_shared``: that a CUDA block may have, by default on any GPU
        since sm_86. ``memory``: arrays that the kernel reaches by pointers that lie in
        its other arguments; only check mode needs them.

        Raises EmulatorError for whatever the emulator finds wrong; it names the thread and, in check mode, the line.
        """
        signature = self._signature(kernel)
        if len(arguments) != len(signature):
            raise EmulatorError(f"{kernel} takes {len(signature)} arguments {signature}, got {len(arguments)}")
        if self.check:
            self._library.emulator_forget_buffers()
            named = [(f"argument {i}", a) for i, a in enumerate(arguments) if _is_array(a)]
            named += [(f"memory {i}", a) for i, a in enumerate(memory)]
            self._register(named)
        values = [_value(kernel, i, a, want) for i, (a, want) in enumerate(zip(arguments, signature, strict=True))]
        message = ctypes.create_string_buffer(1024)
        how = _Launch(
            _three(grid),
            _three(block),
            shared,
            most_shared,
            (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values)),
            ORDERS[order],
            seed,
            ctypes.cast(message, ctypes.c_char_p),
            len(message),
        )
        if getattr(self._library, f"emulator_launch_{kernel}")(ctypes.byref(how)):
            raise EmulatorError(f"{kernel}: {self._with_lines(message.value.decode())}")

    @contextmanager
    def recorded(self) -> Iterator[list[np.ndarray]]:
        """Keep every access to memory of the launches inside, in check mode; yields a list that gets one array of
        ``RECORD`` at the end."""
        assert self.check, "accesses are seen in check mode"
        found: list[np.ndarray] = []
        self._library.emulator_record(1)
        try:
            yield found
        finally:
            self._library.emulator_record(0)
            count = ctypes.c_size_t()
            self._library.emulator_records.restype = ctypes.c_void_p
            start = self._library.emulator_records(ctypes.byref(count))
            raw = ctypes.string_at(start, count.value * RECORD.itemsize) if count.value else b""
            found.append(np.frombuffer(raw, RECORD))

    def _signature(self, kernel: str) -> list[str]:
        if kernel not in self.kernels:
            raise EmulatorError(f"no kernel {kernel!r} in this text; it has {self.kernels}")
        function = getattr(self._library, f"emulator_signature_{kernel}")
        function.restype = ctypes.POINTER(_Type)
        types = takewhile(lambda t: t.kind != b"\0", function())  # type: ignore[arg-type]
        return ["p" if t.kind == b"p" else f"{t.kind.decode()}{t.size}" for t in types]

    def _register(self, named: list[tuple[str, Any]]) -> None:
        """Tell the checker which memory the kernel may touch; views of the same memory are one buffer."""
        spans: dict[int, tuple[int, str, bool]] = {}
        for name, array in named:
            start, size, writable = _span(array)
            if size and size > spans.get(start, (0, "", True))[0]:
                spans[start] = (size, name, writable)
        for start, (size, name, writable) in spans.items():
            self._library.emulator_add_buffer(
                name.encode(), ctypes.c_void_p(start), ctypes.c_size_t(size), int(not writable)
            )

    def _with_lines(self, message: str) -> str:
        """Replace "[pc 0x123]" by the source lines of that instruction, the innermost inlined call first."""
        found = re.search(r"\[pc 0x([0-9a-f]+)\]", message)
        if not found:
            return message
        address = hex(int(found[1], 16) - 1)  # it is a return address: the call is before it
        out = subprocess.run(["addr2line", "-i", "-e", str(self.path), address], capture_output=True, text=True).stdout
        lines = [line.rsplit("/", 1)[-1].split(" (")[0] for line in out.splitlines()]
        return message.replace(found[0], f"[{' < '.join(lines)}]")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def _is_array(argument: Any) -> bool:
    return isinstance(argument, (np.ndarray, torch.Tensor))


def _span(array: np.ndarray | torch.Tensor) -> tuple[int, int, bool]:
    """Address, size in bytes, and whether it may be written."""
    if isinstance(array, torch.Tensor):
        assert array.device.type == "cpu", f"a CPU tensor is needed, got one on {array.device}"
        assert array.is_contiguous(), "a contiguous tensor is needed"
        return array.data_ptr(), array.numel() * array.element_size(), True
    assert array.flags.c_contiguous, "a contiguous array is needed"
    return array.ctypes.data, array.nbytes, array.flags.writeable


def _value(kernel: str, index: int, argument: Any, want: str) -> Any:
    """The argument as a ctypes object of the kernel's own type."""
    where = f"{kernel}: argument {index}"
    if want == "p":
        if argument is None:
            return ctypes.c_void_p(0)
        if isinstance(argument, ctypes.c_void_p):
            return argument
        if not _is_array(argument):
            raise EmulatorError(f"{where} is a pointer, got {argument!r}")
        return ctypes.c_void_p(_span(argument)[0])
    if want not in _CTYPES:
        if not isinstance(argument, (ctypes.Structure, ctypes.Array)) or ctypes.sizeof(argument) != int(want[1:]):
            raise EmulatorError(f"{where} is a struct of {want[1:]} bytes, got {argument!r}")
        return argument
    if isinstance(argument, ctypes._SimpleCData):
        if type(argument) is not _CTYPES[want]:
            raise EmulatorError(f"{where} is {_CTYPES[want].__name__} in the kernel, got {argument!r}")
        return argument
    if _is_array(argument):
        raise EmulatorError(f"{where} is a number in the kernel, got an array")
    return _CTYPES[want](argument)


def _three(size: int | Sequence[int]) -> Any:
    sizes = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint * 3)(*[*sizes, 1, 1][:3])


# ---------------------------------------------------------------------------------------------------------------------
# Building. What is built is kept in the project's own kernel cache.

_FLAGS = ("-std=c++17", "-fPIC", "-O1", "-g1", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
_KERNEL_FLAGS = (*("-w", "-fno-strict-aliasing", "-fno-gnu-unique", "-fno-threadsafe-statics"), "-fsanitize=alignment")
# These flags make the compiler insert calls. They are not given to the linker, which would bring the sanitizers' own
# libraries to answer them; checker.cpp does. Without "sra" an access of a whole vector stays one.
_CHECK_FLAGS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-sra")
_LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs")


def _build(text: str, kernels: list[str], check: bool, flags: tuple[str, ...]) -> Path:
    text = _DYNAMIC_SHARED.sub(r"\1* \2 = static_cast<\1*>(emulator::dynamic_shared());", text)
    text = '#line 1 "kernel.cu"\n' + text + "\n" + "".join(f"EMULATOR_EXPORT({name})\n" for name in kernels)
    mode = _CHECK_FLAGS if check else ()
    compile_kernel = (
        *_FLAGS,
        *_KERNEL_FLAGS,
        *mode,
        *flags,
        f"-I{HERE}",
        "-include",
        "cuda_language.h",
        "-x",
        "c++",
        "-c",
    )
    name = f"{_key(text, compile_kernel)}.so"
    entry = cache.find(name)
    if entry is not None:
        return entry
    with tempfile.TemporaryDirectory(prefix="emulator-") as scratch:
        source = Path(scratch, "kernel.cu")
        source.write_text(text)
        with ThreadPoolExecutor() as pool:  # the compilers run beside each other
            runtime = [pool.submit(_runtime_object, part) for part in RUNTIME]
            objects = [_run((*compile_kernel, str(source)), Path(scratch, "kernel.o")), *(r.result() for r in runtime)]
        library = _run((*_LINK_FLAGS, *map(str, objects)), Path(scratch, "kernel.so"))
        return _store(name, library)


def _runtime_object(part: str) -> Path:
    arguments = (*_FLAGS, "-O2", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", "-c", str(HERE / part))
    name = f"{_key(part, arguments)}.o"
    entry = cache.find(name)
    if entry is None:
        with tempfile.TemporaryDirectory(prefix="emulator-") as scratch:
            entry = _store(name, _run(arguments, Path(scratch, "part.o")))
    return entry


def _store(name: str, made: Path) -> Path:
    entry = cache.store(name, made.read_bytes())
    assert entry is not None, "there is no directory that can be written"
    return entry


def _run(arguments: Sequence[str], out: Path) -> Path:
    done = subprocess.run([*host_compiler(), *arguments, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"the kernel does not compile for the CPU:\n{done.stderr[-4000:]}")
    return out


def _key(text: str, flags: Sequence[str]) -> str:
    files = b"".join((HERE / name).read_bytes() for name in ("cuda_language.h", "scheduler.h", *RUNTIME))
    return "emulator-" + hashlib.sha256(repr((text, flags, host_compiler())).encode() + files).hexdigest()[:32]


def _shared_variables(library: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of the static __shared__ variables: the library's thread-local symbols."""
    out = subprocess.run(["readelf", "-sWC", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r":\s+([0-9a-f]+)\s+(\d+)\s+TLS\s+\w+\s+\w+\s+\w+\s+(.+)", out)
    variables = {(name.strip().split("::")[-1], int(offset, 16), int(size)) for offset, size, name in found}
    return sorted(v for v in variables if v[0] != "anchor")
