"""The emulator sees the mistakes that it is there to see, and passes what is right.

Each planted bug is a kernel with the word BUG in it. Without the macro it is right and has to pass in every order and
in check mode; with it, check mode has to say what is wrong, and where results show the bug, they have to in one order.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

import emulator

ORDERS: list[dict] = [{"order": "forward"}, {"order": "backward"}, *({"order": "random", "seed": s} for s in range(3))]
X = np.arange(1024, dtype="f4")

KERNELS = r"""
// Thread 0 tells the others; they do not wait.
extern "C" __global__ void missing_barrier(float* out, const float* x) {
    __shared__ float value;
    if (threadIdx.x == 0) value = x[blockIdx.x];
#ifndef BUG
    __syncthreads();
#endif
    out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// The next tile is written while the last one is still being read.
extern "C" __global__ void write_after_read(float* out, const float* x) {
    __shared__ float tile[128];
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
        tile[threadIdx.x] = x[k * 128 + threadIdx.x];
        __syncthreads();
        sum += tile[127 - threadIdx.x];
#ifndef BUG
        __syncthreads();
#endif
    }
    out[threadIdx.x] = sum;
}

// Lanes of a warp do not run in step.
extern "C" __global__ void missing_syncwarp(float* out, const float* x) {
    __shared__ float values[32];
    values[threadIdx.x] = x[threadIdx.x];
#ifndef BUG
    __syncwarp();
#endif
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// A shuffle makes lanes meet, but it orders no memory.
extern "C" __global__ void shuffle_as_barrier(float* out, const float* x) {
    __shared__ float values[32];
    values[threadIdx.x] = x[threadIdx.x];
    __shfl_xor_sync(0xffffffffu, 0, 1);
#ifndef BUG
    __syncwarp();
#endif
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

extern "C" __global__ void cross_block_write(float* out, const float* x) {
    if (threadIdx.x == 0) {
#ifdef BUG
        out[0] += x[blockIdx.x];
#else
        atomicAdd(out, x[blockIdx.x]);
#endif
    }
}

extern "C" __global__ void divergent_barrier(float* out, const float* x) {
#ifdef BUG
    if (threadIdx.x < 16) __syncthreads();
    else
#endif
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void half_of_a_barrier(float* out, const float* x) {
    __shared__ float flag;
    if (threadIdx.x == 0) flag = x[1];
#ifdef BUG
    if (threadIdx.x < 16)
#endif
    __syncthreads();
    if (threadIdx.x < 16) __syncthreads();
    else __syncwarp(0xffff0000u);
    out[threadIdx.x] = flag;
}

extern "C" __global__ void shuffle_with_missing_lanes(float* out, const float* x) {
    float v = x[threadIdx.x];
#ifdef BUG
    if (threadIdx.x < 16)
#endif
    v = __shfl_xor_sync(0xffffffffu, v, 16);
    out[threadIdx.x] = v;
}

extern "C" __global__ void misaligned(float* out, const float* x) {
#ifdef BUG
    x += 1;
#endif
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
    out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

extern "C" __global__ void shared_out_of_bounds(float* out, const float* x) {
    __shared__ float values[32];
    __shared__ float others[32];
    others[threadIdx.x] = 0;
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
#ifdef BUG
    out[threadIdx.x] = values[threadIdx.x + 1] + others[threadIdx.x];
#else
    out[threadIdx.x] = values[(threadIdx.x + 1) & 31] + others[threadIdx.x];
#endif
}

extern "C" __global__ void global_out_of_bounds(float* out, const float* x) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef BUG
    if (i <= 100)
#else
    if (i < 100)
#endif
    out[i] = x[i];
}

extern "C" __global__ void never_written(float* out, const float* x) {
    __shared__ float values[64];
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
#ifdef BUG
    out[threadIdx.x] = values[threadIdx.x + 1];
#else
    out[threadIdx.x] = values[threadIdx.x ^ 1];
#endif
}

// The copies are read before the thread that started them has waited.
extern "C" __global__ void copy_not_waited_for(float* out, const float* x) {
    __shared__ __align__(16) float tiles[2][128];
    for (int k = 0; k < 2; ++k) {
        __pipeline_memcpy_async(&tiles[k][4 * threadIdx.x], x + 128 * k + 4 * threadIdx.x, 16);
        __pipeline_commit();
    }
#ifdef BUG
    __pipeline_wait_prior(1);
#else
    __pipeline_wait_prior(0);
#endif
    __syncthreads();
    out[threadIdx.x] = tiles[1][127 - threadIdx.x];
}

// The next copies start while the last tile is still being read.
extern "C" __global__ void copy_over_readers(float* out, const float* x) {
    __shared__ __align__(16) float tile[128];
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
        __pipeline_memcpy_async(tile + 4 * threadIdx.x, x + 128 * k + 4 * threadIdx.x, 16);
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();
        for (int i = 0; i < 128; ++i) sum += tile[i];
#ifndef BUG
        __syncthreads();
#endif
    }
    out[threadIdx.x] = sum;
}

extern "C" __global__ void write_to_input(float* out, const float* x) {
    out[threadIdx.x] = x[threadIdx.x];
#ifdef BUG
    const_cast<float*>(x)[threadIdx.x] = 0;
#endif
}
"""


@dataclass
class Case:
    grid: int
    block: int
    expected: np.ndarray
    message: str  # what check mode has to say about the bug
    shows: bool = True  # whether results show the bug too, in one order at least


CASES = {
    "missing_barrier": Case(2, 128, np.repeat(X[:2], 128), "race|never written"),
    "write_after_read": Case(1, 128, X.reshape(8, 128)[:, ::-1].sum(0), "race: .* of tile"),
    "missing_syncwarp": Case(1, 32, X[np.arange(32) ^ 1], "race|never written"),
    "shuffle_as_barrier": Case(1, 32, X[np.arange(32) ^ 1], "race: read of values", shows=False),
    "cross_block_write": Case(4, 32, np.array([6.0]), "race: .* of block", shows=False),
    "divergent_barrier": Case(1, 32, X[:32], "divergent __syncthreads"),
    "half_of_a_barrier": Case(1, 32, np.ones(32), "divergent|never written|deadlock|race"),
    "shuffle_with_missing_lanes": Case(1, 32, X[np.arange(32) ^ 16], "does not take part"),
    "misaligned": Case(
        1, 32, X[:128].reshape(32, 4).sum(1), r"misaligned access .16 bytes, \d+ past the boundary. at kernel.cu:"
    ),
    "shared_out_of_bounds": Case(1, 32, X[(np.arange(32) + 1) & 31], "out-of-bounds|never written|others", shows=False),
    "global_out_of_bounds": Case(1, 128, X[:100], "out-of-bounds write of 4 bytes", shows=False),
    "never_written": Case(1, 32, X[np.arange(32) ^ 1], r"never written: values\+128"),
    "copy_not_waited_for": Case(1, 32, X[255:223:-1], "read of tiles.*copy is under way"),
    "copy_over_readers": Case(1, 32, np.full(32, X.sum()), "race: .* of tile"),
    "write_to_input": Case(1, 32, X[:32], "read-only", shows=False),
}


@cache
def module(check: bool, bug: bool) -> emulator.Module:
    return emulator.Module(KERNELS, check=check, flags=("-DBUG",) if bug else ())


def run(kernel: str, check: bool, bug: bool, **order: object) -> bool:
    """Whether the result is right; raises EmulatorError when the emulator finds something."""
    case = CASES[kernel]
    out, x = np.zeros(max(len(case.expected), case.grid * case.block), "f4"), X.copy()
    x.flags.writeable = False
    if kernel == "global_out_of_bounds":
        out = out[:100].copy()
    module(check, bug).launch(kernel, case.grid, case.block, [out, x], **order)  # type: ignore[arg-type]
    return np.array_equal(out[: len(case.expected)], case.expected)


@pytest.mark.parametrize("kernel", CASES)
def test_a_right_kernel_passes(kernel: str) -> None:
    for order in ORDERS:
        assert run(kernel, check=False, bug=False, **order), order
        assert run(kernel, check=True, bug=False, **order), order


@pytest.mark.parametrize("kernel", CASES)
def test_check_mode_reports_a_planted_bug(kernel: str) -> None:
    for order in ORDERS:
        with pytest.raises(emulator.EmulatorError, match=CASES[kernel].message):
            run(kernel, check=True, bug=True, **order)


@pytest.mark.parametrize("kernel", [name for name, case in CASES.items() if case.shows])
def test_a_planted_bug_shows_without_check_mode(kernel: str) -> None:
    def right(order: dict) -> bool:
        try:
            return run(kernel, check=False, bug=True, **order)
        except emulator.EmulatorError:
            return False

    assert not all(right(order) for order in ORDERS)


def test_a_message_names_thread_and_line() -> None:
    line = 1 + KERNELS[: KERNELS.index("if (i <= 100)")].count("\n") + 4
    with pytest.raises(emulator.EmulatorError, match=rf"block \(0, 0, 0\) thread \(100, 0, 0\).*kernel\.cu:{line}"):
        run("global_out_of_bounds", check=True, bug=True)


FEATURES = r"""
extern "C" __global__ void __launch_bounds__(128) block_sum(const float* x, float* out, int n) {
    extern __shared__ __align__(16) float sums[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[threadIdx.x] = i < n ? x[i] : 0.f;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half >>= 1) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) atomicAdd(out, sums[0]);
}

extern "C" __global__ void warp_functions(int* out, int v0) {
    const int lane = threadIdx.x, v = v0 - lane * lane;
    int* mine = out + 8 * lane;
    mine[0] = __shfl_down_sync(~0u, v, 3);
    mine[1] = __shfl_up_sync(~0u, v, 3);
    mine[2] = __shfl_sync(~0u, v, 5, 8);
    mine[3] = (int)__ballot_sync(~0u, v & 1);
    mine[4] = __reduce_min_sync(~0u, v);
    mine[5] = __reduce_add_sync(~0u, v);
    mine[6] = (int)__reduce_max_sync(~0u, (unsigned)v);
    mine[7] = __dp4a(v, 0x01ff02fe, 1);
}

extern "C" __global__ void early_exit(int* out, int n) {  // lanes that have returned are not waited for
    const int i = threadIdx.x;
    if (i >= n) return;
    out[i] = 1000 * __syncthreads_count(1) + __popc(__ballot_sync(i < 32 ? ~0u : __activemask(), 1));
}

extern "C" __global__ void through_a_table(long long* table, unsigned char byte, unsigned u, double d) {
    float* target = (float*)table[blockIdx.x];
    target[threadIdx.x] = (float)(byte + u + d + blockIdx.y);
}
"""


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_dynamic_shared_memory_and_atomics(check: bool, order: dict) -> None:
    x, out = torch.arange(1000, dtype=torch.float32), torch.zeros(1)
    emulator.Module(FEATURES, check=check).launch("block_sum", 8, 128, [x, out, 1000], shared=512, **order)
    assert float(out) == 499500


def test_warp_functions() -> None:
    lane = np.arange(32)
    v = (7 - lane * lane).astype("i4")
    for order in ORDERS:
        out = np.zeros((32, 8), "i4")
        emulator.Module(FEATURES).launch("warp_functions", 1, 32, [out, 7], **order)
        np.testing.assert_array_equal(out[:, 0], np.where(lane + 3 < 32, v[np.minimum(lane + 3, 31)], v))
        np.testing.assert_array_equal(out[:, 1], np.where(lane >= 3, v[np.maximum(lane - 3, 0)], v))
        np.testing.assert_array_equal(out[:, 2], v[lane // 8 * 8 + 5])
        assert {int(b) & 0xFFFFFFFF for b in out[:, 3]} == {sum(1 << int(i) for i in lane if v[i] & 1)}
        assert set(out[:, 4].tolist()) == {int(v.min())}
        assert set(out[:, 5].tolist()) == {int(v.sum())}
        assert set(out[:, 6].tolist()) == {int(v.view("u4").max().view("i4"))}
        signed_bytes = v.view("i1").reshape(32, 4).astype("i4")
        np.testing.assert_array_equal(out[:, 7], signed_bytes @ np.array([-2, 2, -1, 1]) + 1)


def test_lanes_that_have_returned_are_not_waited_for() -> None:
    for order in ORDERS:
        out = np.zeros(64, "i4")
        emulator.Module(FEATURES).launch("early_exit", 1, 64, [out, 40], **order)
        assert out.tolist() == [40032] * 32 + [40008] * 8 + [0] * 24


def test_memory_behind_a_table_of_pointers() -> None:
    targets = [torch.zeros(4), torch.zeros(4)]
    table = torch.tensor([t.data_ptr() for t in targets])
    scalars = [ctypes.c_uint8(1), ctypes.c_uint32(2), ctypes.c_double(0.5)]
    checked = emulator.Module(FEATURES, check=True)
    checked.launch("through_a_table", 2, 4, [table, *scalars], memory=targets)
    assert [t.tolist() for t in targets] == [[3.5] * 4] * 2
    with pytest.raises(emulator.EmulatorError, match="out-of-bounds write"):
        checked.launch("through_a_table", 2, 4, [table, *scalars], memory=targets[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "missing"}, "no kernel 'missing'"),
        ({"arguments": [np.zeros(1, "f4")]}, "takes 3 arguments"),
        ({"arguments": [1, None, 2]}, "argument 0 is a pointer"),
        ({"arguments": [None, None, ctypes.c_int64(2)]}, "argument 2 is c_int in the kernel, got c_long"),
        ({"grid": 0}, "zero blocks"),
        ({"grid": (1, 65536)}, "65535"),
        ({"block": 2048}, "more than 1024 threads"),
        ({"block": (1, 1, 65)}, "64 threads along z"),
        ({"shared": 102000}, "more shared memory than the GPU has"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_launch_that_a_gpu_would_refuse_is_refused(change: dict, message: str) -> None:
    launch: dict = {"kernel": "block_sum", "grid": 1, "block": 32, "arguments": [None, None, 0]} | change
    with pytest.raises(emulator.EmulatorError, match=message):
        emulator.Module(FEATURES).launch(**launch)


def test_a_text_that_does_not_compile() -> None:
    with pytest.raises(emulator.EmulatorError, match=r"kernel\.cu:2"):
        emulator.Module('\nextern "C" __global__ void f(float* x) { *x = undeclared; }')


def test_two_modules_do_not_share_state() -> None:
    with pytest.raises(emulator.EmulatorError):
        run("global_out_of_bounds", check=True, bug=True)
    out = np.zeros(64, "i4")
    emulator.Module(FEATURES).launch("early_exit", 1, 64, [out, 64])
    assert out.tolist() == [64032] * 64


def test_a_launch_leaves_no_stacks_behind() -> None:
    """A process may have 65,530 mappings, and a suite has many modules."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    module = emulator.Module('extern "C" __global__ void one(float* x) { x[threadIdx.x] = 1; }')
    before = mappings()
    module.launch("one", 1, 1024, [np.zeros(1024, "f4")])
    assert mappings() < before + 20
