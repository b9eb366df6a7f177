// A @ B^T of int8 matrices, exact in int32: packing, the tile that does the work, and the loops around it.
//
// One step of the tile multiplies GROUP neighbours along K, which share a 32-bit lane, for MR rows of A (a lane
// broadcast to the whole vector, straight from the row-major matrix) and NV vectors of columns of B. So B is repacked
// into panels of NR = NV * W columns, fewer vectors in the last one, padded with zeros:
//   panel[group][column][GROUP]
// It is read once for every block of rows, and a vector load must find W columns side by side. Packing takes 2 to 4 %
// of the time of the product. (AMX tiles want the same layout.)
//
//   instruction set        GROUP  Element   a step
//   AVX-512 VNNI, AVX-VNNI   4    int8      vpdpbusd: unsigned times signed, so B is stored + 128, and every sum starts
//                                           at minus 128 times the sum of A's row. Sums wrap around: only the true one
//                                           has to fit 32 bits
//   AVX-512 BW, AVX2, SSE2   2    int16     vpmaddwd. (vpmaddubsw takes int8 but saturates: 2 * 255 * 127 > 32767)
//   other                    1    int32     vector multiply and add
#pragma once
#include "parallel.h"
#include "vec.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define LB_DOT_NAME "AVX-512 VNNI"
typedef int8_t Element;
constexpr int GROUP = 4, OFFSET = 128, MR = 6, NV = 4;
LB_FN I dot(I sums, I a, I b) { return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)b, (__m512i)a); }
#elif defined(__AVXVNNI__)
#define LB_DOT_NAME "AVX-VNNI"
typedef int8_t Element;
constexpr int GROUP = 4, OFFSET = 128, MR = 6, NV = 2;
LB_FN I dot(I sums, I a, I b) { return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)b, (__m256i)a); }
#elif defined(__AVX512BW__)
#define LB_DOT_NAME "AVX-512 BW"
typedef int16_t Element;
constexpr int GROUP = 2, OFFSET = 0, MR = 6, NV = 4;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define LB_DOT_NAME "AVX2"
typedef int16_t Element;
constexpr int GROUP = 2, OFFSET = 0, MR = 6, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#define LB_DOT_NAME "SSE2"
typedef int16_t Element;
constexpr int GROUP = 2, OFFSET = 0, MR = 4, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
#define LB_DOT_NAME "no int8 instructions"
typedef int32_t Element;
constexpr int GROUP = 1, OFFSET = 0, MR = 4, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + a * b; }
#endif

constexpr int NR = NV * W;
constexpr int64_t ROWS_PER_TASK = 32 * MR;                         // their part of A stays in the L2 cache
constexpr int64_t K_BLOCK = (128 << 10) / (NR * sizeof(Element));  // so does this part of a panel of B
static_assert(GROUP * sizeof(Element) == 4 && K_BLOCK % GROUP == 0, "a group fills one 32-bit lane");

LB_FN int64_t up_to_multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
LB_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- packing

// `count` values as Elements, plus OFFSET, padded with zeros to `padded`
static void widen(const int8_t* from, int64_t count, int64_t padded, int offset, Element* to) {
    for (int64_t k = 0; k < count; ++k) to[k] = (Element)(from[k] + offset);
    for (int64_t k = count; k < padded; ++k) to[k] = 0;
}

// Rows of B to one panel of `vectors` * W columns, a few groups at a time through a small buffer
static void pack_panel(const int8_t* b, int64_t rows, int64_t K, int vectors, Element* panel) {
    constexpr int64_t STEP = 32 * GROUP;
    const int64_t columns = vectors * W;
    for (int64_t k = 0; k < K; k += STEP) {
        const int64_t count = least(STEP, K - k), padded = up_to_multiple(count, GROUP), groups = padded / GROUP;
        for (int64_t n = 0; n < columns; n += W) {
            alignas(64) Element buffer[W][STEP];
            uint32_t lanes[W][32];
            for (int64_t i = 0; i < W; ++i) {
                const bool exists = n + i < rows;
                widen(b + (n + i) * K + k, exists ? count : 0, padded, OFFSET, buffer[i]);
            }
            memcpy(lanes, buffer, sizeof lanes);
            for (int64_t g = 0; g < groups; ++g) {
                uint32_t column[W];
                for (int64_t i = 0; i < W; ++i) column[i] = lanes[i][g];
                memcpy(panel + ((k / GROUP + g) * columns + n) * GROUP, column, sizeof column);
            }
        }
    }
}

// ---- the tile: sums[ROWS][NR] += a[ROWS][groups * GROUP] @ panel[groups][VECTORS * W][GROUP]

template <int ROWS, int VECTORS>
static void tile(const Element* a, int64_t stride, const Element* panel, int64_t groups, int32_t* sums) {
    I s[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) memcpy(&s[i][j], sums + i * NR + j * W, sizeof(I));
    for (int64_t g = 0; g < groups; ++g) {
        I columns[VECTORS];
        for (int j = 0; j < VECTORS; ++j) memcpy(&columns[j], panel + (g * VECTORS + j) * W * GROUP, sizeof(I));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            int32_t lane;
            memcpy(&lane, a + i * stride + g * GROUP, 4);
            const I row = splat<I>(lane);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) s[i][j] = dot(s[i][j], row, columns[j]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) memcpy(sums + i * NR + j * W, &s[i][j], sizeof(I));
}

typedef void (*Tile)(const Element*, int64_t, const Element*, int64_t, int32_t*);
template <int VECTORS> static Tile tile_of(int64_t rows) {
    switch (rows) {
    case 1: return tile<1, VECTORS>;
    case 2: return tile<2, VECTORS>;
    case 3: return tile<3, VECTORS>;
    case 4: return tile<4, VECTORS>;
    case 5: return tile<MR < 5 ? MR : 5, VECTORS>;
    default: return tile<MR, VECTORS>;
    }
}
static Tile tile_of(int64_t rows, int vectors) {
    switch (vectors) {
    case 1: return tile_of<1>(rows);
    case 2: return tile_of<2>(rows);
    case 3: return tile_of<NV < 3 ? NV : 3>(rows);
    default: return tile_of<NV>(rows);
    }
}

// ---- the loops around it

struct Workspace {  // one allocation: the panels of B, where it is needed a copy of A, and where each row's sums start
    Element *panels, *a;
    int32_t* start;
    int64_t stride;  // of A's rows
    static bool copies_a(int64_t K) { return sizeof(Element) > 1 || K % GROUP != 0; }
    static int64_t bytes(int64_t M, int64_t N, int64_t K) {
        const int64_t padded = up_to_multiple(K, GROUP), rows = copies_a(K) ? M : 0;
        return 64 + (up_to_multiple(N, W) + rows) * padded * (int64_t)sizeof(Element) + 4 * M;
    }
    Workspace(void* memory, const int8_t* A, int64_t M, int64_t N, int64_t K) : stride(up_to_multiple(K, GROUP)) {
        panels = (Element*)(((uintptr_t)memory + 63) / 64 * 64);
        a = panels + up_to_multiple(N, W) * stride;
        start = (int32_t*)(a + (copies_a(K) ? M * stride : 0));
        if (!copies_a(K)) a = (Element*)A;
    }
};

static void prepare(
    const Workspace& w, const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, int threads) {
    const int64_t panels = (N + NR - 1) / NR, blocks = (M + 63) / 64;
    parallel_for(panels + blocks, threads, [&](int64_t task) {
        if (task < panels) {
            const int64_t rows = least(NR, N - task * NR);
            pack_panel(B + task * NR * K, rows, K, (int)((rows + W - 1) / W), w.panels + task * NR * w.stride);
            return;
        }
        for (int64_t m = (task - panels) * 64; m < least(M, (task - panels + 1) * 64); ++m) {
            const int8_t* row = A + m * K;
            if (Workspace::copies_a(K)) widen(row, K, w.stride, 0, w.a + m * w.stride);
            int32_t sum = 0;  // below 2^31 in magnitude for K < 2^24
            if (OFFSET)
                for (int64_t k = 0; k < K; ++k) sum += row[k];
            w.start[m] = (int32_t)(0u - (uint32_t)OFFSET * (uint32_t)sum);
        }
    });
}

// finish(m, n, count, sums): the exact sums of row m, columns n to n + count - 1
template <class F>
static void multiply(const Workspace& w, int64_t M, int64_t N, int64_t K, int threads, const F& finish) {
    const int64_t panels = (N + NR - 1) / NR;
    const int64_t share = up_to_multiple(M * panels / (4 * threads) + 1, MR);  // several tasks for each thread
    const int64_t step = least(ROWS_PER_TASK, share), row_blocks = (M + step - 1) / step;
    parallel_for(row_blocks * panels, threads, [&](int64_t task) {
        alignas(64) int32_t sums[ROWS_PER_TASK * NR];
        const int64_t first = task / panels * step, rows = least(step, M - first);
        const int64_t n = task % panels * NR, count = least(NR, N - n);
        const int vectors = (int)((count + W - 1) / W);
        for (int64_t i = 0; i < rows; ++i)
            for (int j = 0; j < NR; ++j) sums[i * NR + j] = w.start[first + i];
        for (int64_t k = 0; k < w.stride; k += K_BLOCK) {
            const int64_t groups = least(K_BLOCK, w.stride - k) / GROUP;
            const Element* panel = w.panels + n * w.stride + k * vectors * W;
            for (int64_t i = 0; i < rows; i += MR)
                tile_of(least(MR, rows - i), vectors)(
                    w.a + (first + i) * w.stride + k, w.stride, panel, groups, sums + i * NR);
        }
        for (int64_t i = 0; i < rows; ++i) finish(first + i, n, (int)count, sums + i * NR);
    });
}
