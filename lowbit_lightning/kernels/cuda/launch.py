"""One kernel launch as data, and the function that passes it to the CUDA driver.

The ops describe every launch as a ``Launch``, without streams or contexts, and ``run`` does not know the ops. Tests
replace ``run`` by an emulator. So they execute the ops' own geometry and arguments without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_lightning.kernels.compile import NVRTC_HINT, CompilerNotFound, cubin, nvrtc_version

_FILL, _TURNS = 2048, 8
_SHARED_FOR_ALL = 48 << 10  # bytes a CUDA block that a kernel may have without asking


@dataclass(frozen=True)
class Launch:
    """A kernel of a CUDA text, its geometry and its arguments.

    ``arguments``: a Tensor for a pointer, None for a null pointer, or a ctypes value of exactly the declared type for a
    scalar or a struct. ``memory()``: tensors that the kernel reaches through pointers in other tensors; only checks use
    it. ``shared``: bytes of dynamic shared memory. ``own_features``: whether the text uses instructions that only
    GPUs of exactly this architecture have (sm_90a).
    """

    text: str
    kernel: str
    grid: tuple[int, int, int]
    block: int
    arguments: tuple[Any, ...]
    memory: Callable[[], Iterable[Tensor]] = tuple
    shared: int = 0
    own_features: bool = False


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def in_chunks(matrix: Tensor) -> Tensor:
    """The same int8 values in rows that start at multiples of 16 bytes, padded with zeros."""
    if matrix.shape[-1] % 16:
        return pad(matrix, (0, -matrix.shape[-1] % 16))
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def geometry(block_size: int) -> tuple[int, int]:
    """The threads of a CUDA block, and how many quantisation blocks it handles at a time, as in src/group.h."""
    group = block_size // 8
    threads = max(256, group)
    return threads, threads // group


def shared_out(blocks: int, at_a_time: int) -> tuple[int, int]:
    """How many CUDA blocks share quantisation blocks, and in how many turns of ``at_a_time``: several, if there are
    still enough CUDA blocks to keep a large GPU busy."""
    turns = min(_TURNS, max(1, blocks // (at_a_time * _FILL)))
    return ceil_div(blocks, at_a_time * turns), turns


def as_ctypes(argument: Any) -> Any:
    """An argument as the ctypes object whose bytes the driver copies."""
    if argument is None:
        return ctypes.c_void_p(0)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument


def load() -> None:
    """Raise CompilerNotFound, which says what to install, if CUDA kernels cannot be compiled and launched."""
    nvrtc_version()
    if not torch.cuda.is_available():
        raise CompilerNotFound("torch sees no CUDA device; install a CUDA build of torch and a driver")


def run(launch: Launch) -> None:
    """Start ``launch`` on torch's current stream of the device that its tensors lie on; waits for nothing.

    Under CUDA graph capture the launch becomes a node of the graph. A kernel's first launch compiles and loads it,
    which capture does not allow: take one step before.
    """
    device = next(a.device for a in launch.arguments if isinstance(a, Tensor))
    with torch.cuda.device(device):
        _need_context(device)
        architecture = _architecture(device) + ("a" if launch.own_features else "")
        kernel = _kernel(launch.text, launch.kernel, architecture)
        if launch.shared > _SHARED_FOR_ALL:
            _allow_shared(kernel, launch.shared, device.index or 0)
        _start(launch, kernel, torch.cuda.current_stream(device).cuda_stream)


def _start(launch: Launch, kernel: Any, stream: int) -> None:
    from cuda.bindings import driver

    values = [as_ctypes(a) for a in launch.arguments]
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    geometry = (*launch.grid, launch.block, 1, 1, launch.shared)
    (status,) = driver.cuLaunchKernel(kernel, *geometry, driver.CUstream(stream), ctypes.addressof(addresses), 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA kernel {launch.kernel!r} did not start: {status.name}")


def is_capturing() -> bool:
    """Whether launches are captured into a CUDA graph now, so that nobody may wait for the GPU."""
    return torch.cuda.is_current_stream_capturing()


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call, by the GPU's clock. Waits for it."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability: (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


def _architecture(device: torch.device) -> str:
    major, minor = capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _allow_shared(kernel: Any, size: int, device: int) -> None:
    """Allow a kernel more dynamic shared memory than the default. This is needed once per device."""
    from cuda.bindings import driver

    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(limit, size, driver.CUkernel(int(kernel)), driver.CUdevice(device))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"a CUDA kernel does not get its {size} bytes of shared memory: {status.name}")


@functools.cache
def _library(text: str, architecture: str) -> Any:
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(text, architecture).code)


@functools.cache
def _kernel(text: str, name: str, architecture: str) -> Any:
    """The driver's handle; it is good for every device of the architecture. ``_library`` keeps it alive."""
    from cuda.bindings import driver

    library = _library(text, architecture)
    try:
        return driver.CUfunction(int(library.get_kernel(name).handle))
    except Exception as error:
        raise RuntimeError(
            f"the driver does not load CUDA kernel {name!r} for {architecture} ({error}). If NVRTC is newer than the"
            f" driver, install the one of the driver's CUDA version: {NVRTC_HINT}"
        ) from error


def _need_context(device: torch.device) -> None:
    """Give this thread a context: it has none before its first call of the CUDA runtime, even if torch has a device."""
    from cuda.bindings import driver
    from cuda.core import Device

    _, context = driver.cuCtxGetCurrent()
    if int(context) == 0:
        Device(device.index).set_current()
