"""How a launch reaches the CUDA driver, as far as that can be seen without one."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cuda.bindings
import emulator
import pytest
import torch
from emulator.backend import emulated

from lowbit_lightning import kernels
from lowbit_lightning.kernels import dispatch
from lowbit_lightning.kernels.compile import CompilerNotFound, nvrtc_version
from lowbit_lightning.kernels.cuda import launch, table
from lowbit_lightning.kernels.cuda.launch import Launch

KERNEL = r"""
struct Pair { double a, b; };
extern "C" __global__ void scale_add(
    const float* x, long long n, const Pair pair, const float* nothing, unsigned long long word, int sign, float* out) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x + 4 * blockIdx.y;
    if (i < n && !nothing && word == 0xfedcba9876543210ull) out[i] = (float)(sign * (pair.a * x[i] + pair.b));
}
"""


class Driver:
    """``cuda.bindings.driver`` with an emulator behind ``cuLaunchKernel``: it reads what the addresses point to."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUstream = CUkernel = CUdevice = staticmethod(int)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, answer: Any = CUresult.CUDA_SUCCESS) -> None:
        self.answer = answer
        self.module = emulator.Module(KERNEL)
        self.calls: list[tuple] = []

    def cuKernelSetAttribute(self, *arguments: int) -> tuple[Any]:
        self.calls.append(arguments)
        return (self.answer,)

    def cuLaunchKernel(self, kernel: str, *rest: Any) -> tuple[Any]:
        *geometry, stream, parameters, _extra = rest
        self.calls.append((*geometry, stream))
        types = self.module._signature(kernel)
        addresses = (ctypes.c_void_p * len(types)).from_address(parameters)
        by_size: dict[str, Any] = {"i4": ctypes.c_int32, "i8": ctypes.c_int64, "u8": ctypes.c_uint64}
        by_size["s16"] = ctypes.c_double * 2
        values = [by_size.get(t, ctypes.c_void_p).from_address(a) for t, a in zip(types, addresses, strict=True)]
        self.module.launch(kernel, geometry[:3], geometry[3:6], values, shared=geometry[6])
        return (self.answer,)


def a_launch() -> Launch:
    pair, word = (ctypes.c_double * 2)(2.0, 0.5), ctypes.c_uint64(0xFEDCBA9876543210)
    arguments = (torch.arange(8.0), ctypes.c_int64(7), pair, None, word, ctypes.c_int(-1), torch.zeros(8))
    return Launch(KERNEL, "scale_add", (1, 2, 1), 4, arguments)


def test_arguments_and_geometry_reach_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    one = a_launch()
    launch._start(one, "scale_add", stream=1234)
    assert one.arguments[-1].tolist() == [-(2.0 * i + 0.5) for i in range(7)] + [0.0]
    assert driver.calls == [(1, 2, 1, 4, 1, 1, 0, 1234)]


def test_a_launch_that_the_driver_refuses_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.bindings, "driver", Driver(SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")))
    with pytest.raises(RuntimeError, match=r"scale_add.*CUDA_ERROR_INVALID_VALUE"):
        launch._start(a_launch(), "scale_add", stream=0)


def test_a_device_is_told_once_of_large_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    for device in (0, 1, 0):
        launch._allow_shared(77, 73728, device)
    assert driver.calls == [(8, 73728, 77, 0), (8, 73728, 77, 1)]
    driver.answer = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="its 300000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"):
        launch._allow_shared(78, 300000, 0)


def test_dynamic_shared_memory_reaches_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    launch._start(replace(a_launch(), shared=49152), "scale_add", stream=1)
    assert driver.calls == [(1, 2, 1, 4, 1, 1, 49152, 1)]


def test_the_real_driver_has_what_is_called() -> None:
    """Names and parameters of the installed cuda-bindings; without a driver a call ends at the missing library."""
    from cuda.bindings import driver

    assert driver.CUresult.CUDA_SUCCESS.name == "CUDA_SUCCESS"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"libcuda|driver"):
            launch._start(a_launch(), driver.CUfunction(1), stream=0)
        with pytest.raises(RuntimeError, match=r"libcuda|driver"):
            launch._allow_shared(driver.CUfunction(1), 1 << 16, 0)


def test_without_cuda_core_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    nvrtc_version.cache_clear()
    with pytest.raises(CompilerNotFound, match=r"pip install 'cuda-core>=1.2,<2'"):
        launch.load()


def test_without_a_device_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch.load.cache_clear()
    with pytest.raises(CompilerNotFound, match="no CUDA device"), kernels.use_backend("cuda"):
        pass


def test_the_emulated_backend_leaves_no_trace() -> None:
    with emulated():
        kernels.quantize_blockwise(torch.ones(3))
    if not torch.cuda.is_available():
        with pytest.raises(CompilerNotFound), kernels.use_backend("cuda"):
            pass


def test_a_table_is_kept_by_content_and_dropped_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_KEPT", 2)
    from array import array

    with emulated() as launches:
        first = table._on_device(array("q", [1, 2, 3]), torch.device("cpu"))
        assert first.tolist() == [1, 2, 3]
        assert table._on_device(array("q", [1, 2, 3]), torch.device("cpu")) is first
        for n in range(3):
            assert table._on_device(array("q", [n]), torch.device("cpu")).tolist() == [n]
        assert len(table._tables) == 2
        assert table._on_device(array("q", [1, 2, 3]), torch.device("cpu")) is not first
        assert len(launches) == 5
