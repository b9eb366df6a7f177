"""The int8 product by AMX. Most machines lack it, so its five instructions are played by plain C++ (LB_AMX_TWIN) under
the same loops; the real ones are compiled, and run where the processor and the system allow it."""

from __future__ import annotations

import ctypes
import mmap
import platform

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.compile import CompilerNotFound, host_compiler, host_library, source_text
from lowbit_lightning.kernels.cpu import int8_product

try:
    host_compiler()
    COMPILER = True
except CompilerNotFound:
    COMPILER = False
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: there is no CPU backend to test")

TWIN = ("-DLB_AMX_TWIN=1", "-O2")
# One row, a tile of 16, two, more; K copied, or read as it lies (multiples of 64), in one block of 1024 and several.
ROWS, COLUMNS, DEPTHS = (1, 15, 16, 17, 32, 33, 70), (1, 16, 17, 32, 33, 100), (0, 5, 64, 960, 1024, 1088, 2240)


def assert_product(m: int, n: int, k: int) -> None:
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    y = kernels.int8_matmul(a, b, torch.ones(m), torch.ones(n)).numpy()
    np.testing.assert_array_equal(y, exact.astype(np.float32), f"{m} x {n} x {k}")


@pytest.mark.parametrize("k", DEPTHS)
def test_every_height_and_width_of_a_tile(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build = int8_product.library(TWIN)
    assert int8_product.instructions(build) == "AMX"
    monkeypatch.setattr(int8_product, "library", lambda: build)
    with kernels.use_backend("cpu"):
        for m in ROWS:
            for n in COLUMNS:
                assert_product(m, n, k)


@pytest.mark.skipif(platform.system() != "Linux", reason="guards its memory by Linux's mprotect")
@pytest.mark.parametrize("flags", [(), TWIN], ids=["native", "AMX"])
def test_nothing_behind_the_matrices_is_read(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read beyond the end would end the process here: the next page may not be touched."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None)

    def guarded(rows: int, k: int) -> Tensor:
        pages = mmap.mmap(-1, -(-rows * k // page) * page + page)
        end = len(pages) - page
        start = torch.frombuffer(pages, dtype=torch.int8)
        assert libc.mprotect(ctypes.c_void_p(start.data_ptr() + end), ctypes.c_size_t(page), 0) == 0
        return start[end - rows * k : end].view(rows, k).fill_(1)

    build = int8_product.library(flags)
    monkeypatch.setattr(int8_product, "library", lambda: build)
    with kernels.use_backend("cpu"):
        for m, n, k in ((17, 20, 64), (3, 70, 128), (33, 5, 1024), (7, 9, 100), (40, 33, 63), (180, 100, 64)):
            y = kernels.int8_matmul(guarded(m, k), guarded(n, k), torch.ones(m), torch.ones(n))
            assert bool((y == k).all())


def test_the_tile_shapes_of_the_thread_are_as_they_were() -> None:
    """torch's own AMX kernels may rely on what they have set in this thread."""
    peek = """
        static TileShapes shapes;
        extern "C" void set_shapes(const void* from) { memcpy(&shapes, from, 64), set_tile_shapes(&shapes); }
        extern "C" void get_shapes(void* to) { save_tile_shapes(&shapes), memcpy(to, &shapes, 64); }
    """
    library = host_library(source_text("int8.cpp") + peek, flags=TWIN)
    before, after = (ctypes.c_uint8 * 64)(*range(64)), (ctypes.c_uint8 * 64)()
    library.set_shapes(before)
    q, ones, out = torch.ones(40, 64, dtype=torch.int8), torch.ones(40), torch.zeros(40, 40)
    room = torch.zeros(1 << 16, dtype=torch.uint8)
    sizes = [ctypes.c_int64(size) for size in (40, 40, 64)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (ones, ones)]
    library.lb_int8_matmul(
        *(ctypes.c_void_p(q.data_ptr()), ctypes.c_void_p(q.data_ptr()), *sizes, *pointers, None),
        *(ctypes.c_void_p(out.data_ptr()), 0, ctypes.c_void_p(room.data_ptr()), 1),
    )
    library.get_shapes(after)
    assert bool((out == 64).all())
    assert list(after) == list(before)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86's")
def test_the_real_instructions_compile_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    native = int8_product.instructions(int8_product.library(("-mno-amx-int8",)))
    build = int8_product.library(("-mamx-tile", "-mamx-int8"))
    assert int8_product.instructions(build) in ("AMX", int8_product.REFUSED + native)
    monkeypatch.setattr(int8_product, "library", lambda: build)
    with kernels.use_backend("cpu"):
        assert_product(70, 100, 1088)
