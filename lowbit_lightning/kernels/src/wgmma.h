// Hopper's matrix instruction, wgmma (sm_90a only). A warpgroup, four warps in succession of which the first is a
// multiple of four, multiplies two matrices that lie in shared memory, A of 64 rows and B of N, both along rows:
// sums += A B^T. It does so while its threads run on, and apart from their own accesses to shared memory. So
//   - who has written an operand says so (share_with_products), before the barrier after which it is multiplied;
//   - nobody overwrites an operand, and nobody touches the sums, before a wait for the product;
//   - sums that a thread has written need order_sums() before the next product.
// Where __CUDA_ARCH__ is not defined, functions of the emulator stand for the instructions.
#pragma once
#include "tensor_core.h"

constexpr int WARPGROUP = 128, WARPGROUP_ROWS = 64;
constexpr int LINE = 128;  // bytes of a row of an operand in shared memory

// Of an operand in shared memory, chunk c of 16 bytes of row r, if row 0 lies at a multiple of 8 lines. The chunks of 8
// rows that lie above each other are dealt to different banks.
LB_FN int place_in_lines(int r, int c) { return r * LINE + (c ^ r % 8) * 16; }

// The descriptor of such rows from `start` on: the address, and the bytes from 8 rows to the next 8, both without their
// last four bits; the bytes between columns of chunks, which this swizzle does not use and takes for 1; the swizzle.
LB_FN uint64_t described(const int8_t* start) {
    constexpr uint64_t TO_NEXT_8_ROWS = 8 * LINE >> 4, SWIZZLE_128 = 1;
    const uint64_t address = shared_address(start) >> 4 & 0x3fff;
    return address | (uint64_t)1 << 16 | TO_NEXT_8_ROWS << 32 | SWIZZLE_128 << 62;
}
constexpr uint64_t NEXT_32_COLUMNS = 32 >> 4;  // more of a descriptor

LB_FN void share_with_products() {
#ifdef __CUDA_ARCH__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulated_fence_proxy_async();
#endif
}
LB_FN void order_sums() {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emulated_wgmma_fence();
#endif
}
LB_FN void close_products() {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulated_wgmma_commit_group();
#endif
}
template <int NEWEST> LB_FN void wait_for_products_but() {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
#else
    emulated_wgmma_wait_group(NEWEST);
#endif
}
// Waits for all products. The compiler takes sums for known once a product is started: here they change once more.
template <int N> LB_FN void wait_for_sums(int32_t (&sums)[N]) {
    wait_for_products_but<0>();
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(sums[i])::"memory");
#endif
}

// Starts sums += A B^T for 32 columns of int8. Of warp w of the group, g = lane / 4, t = lane % 4, sums[4 f + 2 i + j]
// is that of row 16 w + 8 i + g and column 8 f + 2 t + j.
#define WGMMA_FIVE(T, A, B, C, D, E) "%" #T #A ", %" #T #B ", %" #T #C ", %" #T #D ", %" #T #E ", "
#define WGMMA_TEN(T) WGMMA_FIVE(T, 0, 1, 2, 3, 4) WGMMA_FIVE(T, 5, 6, 7, 8, 9)
#define WGMMA_SUMS_60 WGMMA_TEN() WGMMA_TEN(1) WGMMA_TEN(2) WGMMA_TEN(3) WGMMA_TEN(4) WGMMA_TEN(5)
#define WGMMA_SUMS_120 WGMMA_SUMS_60 WGMMA_TEN(6) WGMMA_TEN(7) WGMMA_TEN(8) WGMMA_TEN(9) WGMMA_TEN(10) WGMMA_TEN(11)
#define WGMMA_8(S, I) "+r"(S[I]), "+r"(S[I + 1]), "+r"(S[I + 2]), "+r"(S[I + 3]), "+r"(S[I + 4]), "+r"(S[I + 5]), \
                      "+r"(S[I + 6]), "+r"(S[I + 7])
#define WGMMA_32(S, I) WGMMA_8(S, I), WGMMA_8(S, I + 8), WGMMA_8(S, I + 16), WGMMA_8(S, I + 24)

LB_FN void start_product(int32_t (&sums)[64], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" WGMMA_SUMS_60 "%60, %61, %62, %63}, %64, %65, 1;"
                 : WGMMA_32(sums, 0), WGMMA_32(sums, 32) : "l"(a), "l"(b) : "memory");
#else
    emulated_wgmma_s8(sums, 128, a, b);
#endif
}
LB_FN void start_product(int32_t (&sums)[128], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" WGMMA_SUMS_120
                 "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, 1;"
                 : WGMMA_32(sums, 0), WGMMA_32(sums, 32), WGMMA_32(sums, 64), WGMMA_32(sums, 96) : "l"(a), "l"(b)
                 : "memory");
#else
    emulated_wgmma_s8(sums, 256, a, b);
#endif
}
