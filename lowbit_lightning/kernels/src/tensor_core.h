// What products need of the tensor cores and of the copies that feed them. Each operation is one instruction of
// PTX (or what an architecture has in its place), and where __CUDA_ARCH__ is not defined plain C++ that moves the same
// values between the same lanes, by shuffles.
#pragma once
#include "gpu.h"

LB_FN uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------------------------------------------------------------
// Copies from global to shared memory that run on while the thread computes. A thread closes its copies so far into a
// group, and can wait until all but its newest groups have arrived; that others' have, only a barrier says.

// 16 bytes, or zeros where there is nothing to copy; `from` is not read then
LB_FN void start_copy(void* shared, const void* from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared_address(shared)), "l"(from), "r"(exists ? 16 : 0) : "memory");
#elif defined(__CUDA_ARCH__)  // sm_75 has none: the thread waits
    *(uint4*)shared = exists ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#else
    __pipeline_memcpy_async(shared, from, 16, exists ? 0 : 16);
#endif
}
LB_FN void close_group() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDA_ARCH__)
    __pipeline_commit();
#endif
}
template <int NEWEST> LB_FN void wait_for_all_but() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#elif !defined(__CUDA_ARCH__)
    __pipeline_wait_prior(NEWEST);
#endif
}

// A place in shared memory, in one register. Of a pointer the compiler adds up the parts again for every load.
struct SharedPlace {
#ifdef __CUDA_ARCH__
    uint32_t address;
    LB_METHOD explicit SharedPlace(const void* p) : address(shared_address(p)) { asm volatile("" : "+r"(address)); }
    LB_METHOD uint32_t word(uint32_t bytes_on) const {
        uint32_t result;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(result) : "r"(address + bytes_on));
        return result;
    }
#else
    const uint8_t* address;
    LB_METHOD explicit SharedPlace(const void* p) : address((const uint8_t*)p) {}
    LB_METHOD uint32_t word(uint32_t bytes_on) const { return *(const uint32_t*)(address + bytes_on); }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// N adjacent elements to global memory, 16 bytes (or 8, if that is all) in one access. The compiler takes the
// assignment of a Packet apart here, where loads from other pointers lie between the stores of a loop.

template <int N, class T> LB_FN void store_whole(T* to, const T* v) {
#ifdef __CUDA_ARCH__
    constexpr int WORDS = N * sizeof(T) / 4;
    uint32_t w[WORDS];
#pragma unroll
    for (int i = 0; i < N; ++i) pack(w, i, v[i]);
    if (WORDS == 2) asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(w[0]), "r"(w[1]) : "memory");
#pragma unroll
    for (int i = 0; i + 4 <= WORDS; i += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     ::"l"((uint32_t*)to + i), "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3]) : "memory");
#else
    store_packet<N>(to, v);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments: the parts of small matrices that the lanes of a warp hold. With g = lane / 4 and t = lane % 4,
//   8 rows of 16 bytes, one word a lane:  row g, bytes 4t to 4t + 3
//   A, 16 x 32 int8, four such words:     rows 0-7 and 8-15 of columns 0-15, the same of columns 16-31
//   B, 8 x 32 int8, two such words:       columns 0-15, columns 16-31
//   sums, 16 x 8 int32, four words:       row g, columns 2t and 2t + 1; row g + 8, the same columns
// Of 16-bit floats A is 16 x 16 and B 8 x 16, in words alike, and sums are float32.

// Four matrices of 8 rows of 16 bytes; lane i says where row i % 8 of matrix i / 8 lies.
LB_FN void load_matrices(const int8_t* row, uint32_t (&words)[4]) {
#ifdef __CUDA_ARCH__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(shared_address(row)));
#else
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
        words[i] = ((const uint32_t*)__shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + lane / 4))[lane % 4];
#endif
}

// The same of 16-bit elements, each matrix transposed: the word of a lane has rows 2t and 2t + 1 of column g.
LB_FN void load_matrices_transposed(const int8_t* row, uint32_t (&words)[4]) {
#ifdef __CUDA_ARCH__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(shared_address(row)));
#else
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const uint64_t even = __shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + lane % 4 * 2);
        const uint64_t odd = __shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + lane % 4 * 2 + 1);
        words[i] = (uint32_t)((const uint16_t*)odd)[lane / 4] << 16 | ((const uint16_t*)even)[lane / 4];
    }
#endif
}

// sums += A B^T
LB_FN void multiply_add(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)  // sm_75: quarters of it
#pragma unroll
    for (int i = 0; i < 4; ++i)
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(sums[i % 2 * 2]), "+r"(sums[i % 2 * 2 + 1]) : "r"(a[i]), "r"(b[i / 2]));
#else
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint64_t low = (uint64_t)a[2] << 32 | a[0], high = (uint64_t)a[3] << 32 | a[1];  // rows g and g + 8
    const uint64_t row = (uint64_t)b[1] << 32 | b[0];
    for (int i = 0; i < 4; ++i) {  // what the other lanes hold of these rows
        const uint64_t as[2] = {__shfl_sync(ALL_LANES, low, 4 * g + i), __shfl_sync(ALL_LANES, high, 4 * g + i)};
        const uint64_t bs[2] = {__shfl_sync(ALL_LANES, row, 8 * t + i), __shfl_sync(ALL_LANES, row, 8 * t + 4 + i)};
        for (int s = 0; s < 4; ++s)
            for (int half = 0; half < 64; half += 32)
                sums[s] = __dp4a((int)(as[s / 2] >> half), (int)(bs[s % 2] >> half), sums[s]);
    }
#endif
}

#ifndef __CUDA_ARCH__
// The same for 16-bit floats: a product is exact in float32.
template <class T> LB_FN void multiply_add_floats(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint64_t low = (uint64_t)a[2] << 32 | a[0], high = (uint64_t)a[3] << 32 | a[1];  // rows g and g + 8
    const uint64_t row = (uint64_t)b[1] << 32 | b[0];
    for (int i = 0; i < 4; ++i) {
        const uint64_t as[2] = {__shfl_sync(ALL_LANES, low, 4 * g + i), __shfl_sync(ALL_LANES, high, 4 * g + i)};
        const uint64_t bs[2] = {__shfl_sync(ALL_LANES, row, 8 * t + i), __shfl_sync(ALL_LANES, row, 8 * t + 4 + i)};
        for (int s = 0; s < 4; ++s)
            for (int k = 0; k < 64; k += 16)
                sums[s] += widen(T{(uint16_t)(as[s / 2] >> k)}) * widen(T{(uint16_t)(bs[s % 2] >> k)});
    }
}
#endif
LB_FN void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)  // sm_75: halves of it
#pragma unroll
    for (int i = 0; i < 2; ++i)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#else
    multiply_add_floats<Half>(sums, a, b);
#endif
}
LB_FN void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
    __trap();  // sm_75 has none; nothing of bfloat16 that needs it is started there
#else
    multiply_add_floats<BFloat16>(sums, a, b);
#endif
}

// a - b, where the results are exact.
template <class T> LB_FN uint32_t subtract_pairs_plainly(uint32_t a, uint32_t b) {
    const auto one = [&](int shift) {
        return narrow<T>(widen(T{(uint16_t)(a >> shift)}) - widen(T{(uint16_t)(b >> shift)}));
    };
    return pair_of(one(0), one(16));
}
LB_FN uint32_t subtract_pairs(uint32_t a, uint32_t b, Half) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
#else
    return subtract_pairs_plainly<Half>(a, b);
#endif
}
LB_FN uint32_t subtract_pairs(uint32_t a, uint32_t b, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xbf80bf80), "r"(a));
    return result;
#else
    return subtract_pairs_plainly<BFloat16>(a, b);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// An exact sum times its two scales, the smaller first: a large one alone could overflow. A NaN in either is kept.
LB_FN float scale_sum(int32_t sum, float a, float b) { return (float)sum * (a < b ? a : b) * (b > a ? b : a); }
