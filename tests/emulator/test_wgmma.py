"""The emulator's wgmma: right in every layout that PTX describes, and strict about fences and waits."""

from __future__ import annotations

import numpy as np
import pytest

import emulator

N, K = 48, 32  # of one product of 64 x N x K
BYTES = 16 << 10

KERNEL = r"""
enum Bug { NONE, NO_PROXY_FENCE, FENCE_AFTER_BARRIER, NO_BARRIER, NO_SUMS_FENCE, NO_SUMS_FENCE_AGAIN,
           READ_EARLY, WRITE_EARLY, COPY_EARLY, NEVER_WAITED, NOT_COMMITTED, NEVER_WRITTEN,
           OUTSIDE, ONE_WARP_LESS, OTHER_OPERANDS };

// sums = 1000 + A B^T, twice, of matrices in the order of `image`; a and b are descriptors relative to it.
extern "C" __global__ void product(const int8_t* image, uint64_t a, uint64_t b, int bug, int* out) {
    extern __shared__ __align__(128) int8_t unaligned[];
    int8_t* memory = unaligned + (-__cvta_generic_to_shared(unaligned) & 1023);
    const int first = threadIdx.x * 16, thread = threadIdx.x;
    int sums[24];
    for (int i = 0; i < 24; ++i) sums[i] = 1000;
    for (int i = first; i < (bug == NEVER_WRITTEN ? 1024 : 16 << 10); i += 16 * 128)
        *(int4*)(memory + i) = *(const int4*)(image + i);
    if (bug != NO_PROXY_FENCE && bug != FENCE_AFTER_BARRIER) emulated_fence_proxy_async();
    if (bug != NO_BARRIER) __syncthreads();
    if (bug == FENCE_AFTER_BARRIER) emulated_fence_proxy_async();
    const uint64_t start = (__cvta_generic_to_shared(memory) + (bug == OUTSIDE ? 1 << 15 : 0)) >> 4;
    const uint64_t other = bug == OTHER_OPERANDS && thread == 77 ? 2 : 0;
    if (bug != NO_SUMS_FENCE) emulated_wgmma_fence();
    for (int turn = 0; turn < 2; ++turn) {
        if (bug != ONE_WARP_LESS || thread < 96) emulated_wgmma_s8(sums, 48, a + start + other, b + start);
        if (bug != NOT_COMMITTED) emulated_wgmma_commit_group();
        if (bug == READ_EARLY && sums[3] == 17) out[0] = 1;
        if (bug == WRITE_EARLY && thread == 5) memory[3] = 1;
        if (bug == COPY_EARLY && thread == 5) __pipeline_memcpy_async(memory, image, 16);
        if (bug != NEVER_WAITED) emulated_wgmma_wait_group(0);
        if (bug == NO_SUMS_FENCE_AGAIN) sums[2] += 1;
    }
    for (int i = 0; i < 24; ++i) out[thread * 24 + i] = sums[i];
}
"""
BUGS = {
    "NO_PROXY_FENCE": "without a fence.proxy.async",
    "FENCE_AFTER_BARRIER": "without a fence.proxy.async and a barrier",
    "NO_BARRIER": "never written|without a barrier",
    "NO_SUMS_FENCE": "without a wgmma.fence",
    "NO_SUMS_FENCE_AGAIN": "without a wgmma.fence",
    "READ_EARLY": "read of sums while a product is under way",
    "WRITE_EARLY": "which a product under way reads",
    "COPY_EARLY": "which a product under way reads",
    "NEVER_WAITED": "sums while a product is under way",
    "NOT_COMMITTED": "sums while a product is under way",
    "NEVER_WRITTEN": "never written",
    "OUTSIDE": "beyond the 17408 bytes",
    "ONE_WARP_LESS": "part of a warpgroup",
    "OTHER_OPERANDS": "start different products",
}
NUMBERS = {name: number for number, name in enumerate(("NONE", *BUGS))}


def at(width: int, row: int, column: int) -> int:
    """Where a byte of an operand lies: 8 rows of ``width`` chunks of 16 bytes, chunks swapped by the row, without a
    swizzle (``width`` 1) the two chunks 1024 bytes apart. 8 rows on, 256 chunks more."""
    chunk, byte = divmod(column, 16)
    if width == 1:
        return row // 8 * 128 + row % 8 * 16 + chunk * 1024 + byte
    line = row % 8 * width * 16 // 128  # which of the 128 bytes that the banks span
    return row // 8 * 1024 + row % 8 * width * 16 + (chunk ^ line % width) % width * 16 + byte


MODES = {1: 0, 2: 3, 4: 2, 8: 1}


def descriptor(width: int, start: int) -> int:
    leading, stride = (1024, 128) if width == 1 else (16, 1024)
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[width] << 62


def launch(width: int, bug: str = "NONE", check: bool = True, order: str = "forward") -> tuple[np.ndarray, np.ndarray]:
    """The sums that the kernel finds, in the order in which PTX gives them to threads, and those of NumPy."""
    rng = np.random.default_rng(width)
    a, b = (rng.integers(-128, 128, (rows, K)).astype("i1") for rows in (64, N))
    image = rng.integers(-128, 128, BYTES).astype("i1")
    for start, matrix in ((0, a), (8192, b)):
        for (row, column), value in np.ndenumerate(matrix):
            image[start + at(width, row, column)] = value
    out = np.zeros((4, 8, 4, N // 8, 2, 2), "i4")  # warp, lane / 4, lane % 4, 8 columns, 8 rows, one of two columns
    descriptors = descriptor(width, 0), descriptor(width, 8192)
    arguments = [image, *descriptors, NUMBERS[bug], out]
    emulator.Module(KERNEL, check=check).launch("product", 1, 128, arguments, order=order, shared=BYTES + 1024)
    found = out.transpose(0, 4, 1, 3, 2, 5).reshape(64, N)
    return found, 1000 + 2 * (a.astype("i4") @ b.astype("i4").T)


@pytest.mark.parametrize("width", MODES)
def test_every_layout(width: int) -> None:
    for check, order in ((True, "forward"), (False, "forward"), (False, "backward"), (False, "random")):
        np.testing.assert_array_equal(*launch(width, check=check, order=order))


def test_a_thread_that_returns_with_a_product_under_way() -> None:
    with pytest.raises(emulator.EmulatorError, match="returns while a product is under way"):
        launch(8, "NEVER_WAITED", check=False)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_named(bug: str) -> None:
    with pytest.raises(emulator.EmulatorError, match=BUGS[bug]):
        launch(8, bug)


def test_results_show_what_is_overwritten_early() -> None:
    found, expected = launch(8, "WRITE_EARLY", check=False, order="backward")
    assert (found != expected).any()
