// The int8 product by vector instructions: an engine for int8_gemm.h.
//
// One step of a tile multiplies GROUP neighbours along K, which share a 32-bit lane, for up to MR rows of A (a lane
// broadcast to the whole vector, straight from the row-major matrix) and NV vectors of columns of B.
//
//   instruction set        GROUP  Element   a step
//   AVX-512 VNNI, AVX-VNNI   4    int8      vpdpbusd: unsigned times signed, so B is stored + 128, and every sum starts
//                                           at minus 128 times the sum of A's row. Sums wrap around: only the true one
//                                           has to fit 32 bits
//   AVX-512 BW, AVX2, SSE2   2    int16     vpmaddwd. (vpmaddubsw takes int8 but saturates: 2 * 255 * 127 > 32767)
//   other                    1    int32     vector multiply and add
#pragma once
#include "vec.h"

#if LB_AVX512_VNNI
#define LB_DOT_NAME "AVX-512 VNNI"
typedef int8_t DotElement;
constexpr int GROUP = 4, OFFSET = 128, MR = 6, NV = 4;
LB_FN I dot(I sums, I a, I b) { return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)b, (__m512i)a); }
#elif LB_AVX2_VNNI
#define LB_DOT_NAME "AVX-VNNI"
typedef int8_t DotElement;
constexpr int GROUP = 4, OFFSET = 128, MR = 6, NV = 2;
LB_FN I dot(I sums, I a, I b) { return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)b, (__m256i)a); }
#elif LB_AVX512_BW
#define LB_DOT_NAME "AVX-512 BW"
typedef int16_t DotElement;
constexpr int GROUP = 2, OFFSET = 0, MR = 6, NV = 4;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif LB_AVX2
#define LB_DOT_NAME "AVX2"
typedef int16_t DotElement;
constexpr int GROUP = 2, OFFSET = 0, MR = 6, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif LB_SSE2
#define LB_DOT_NAME "SSE2"
typedef int16_t DotElement;
constexpr int GROUP = 2, OFFSET = 0, MR = 4, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + (I)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
#define LB_DOT_NAME "no int8 instructions"
typedef int32_t DotElement;
constexpr int GROUP = 1, OFFSET = 0, MR = 4, NV = 2;
LB_FN I dot(I sums, I a, I b) { return sums + a * b; }
#endif

LB_FN int32_t sum_of(I x) {
#if LB_AVX512
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
#endif
}

// s[ROWS][VECTORS * W] += a[ROWS][groups * GROUP] @ panel[groups][VECTORS * W][GROUP]
template <int ROWS, int VECTORS>
LB_FN void add_dots(const DotElement* a, int64_t stride, const DotElement* panel, int64_t groups,
                    I (&s)[ROWS][VECTORS]) {
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
}

// The same with sums[ROWS][NV * W] in memory
template <int ROWS, int VECTORS>
static void dot_tile(const DotElement* a, int64_t stride, const DotElement* panel, int64_t groups, int32_t* sums) {
    I s[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) memcpy(&s[i][j], sums + (i * NV + j) * W, sizeof(I));
    add_dots(a, stride, panel, groups, s);
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) memcpy(sums + (i * NV + j) * W, &s[i][j], sizeof(I));
}

typedef void (*DotTile)(const DotElement*, int64_t, const DotElement*, int64_t, int32_t*);
template <int VECTORS> static DotTile dot_tile_of(int64_t rows) {
    switch (rows) {
    case 1: return dot_tile<1, VECTORS>;
    case 2: return dot_tile<2, VECTORS>;
    case 3: return dot_tile<3, VECTORS>;
    case 4: return dot_tile<4, VECTORS>;
    case 5: return dot_tile<MR < 5 ? MR : 5, VECTORS>;
    default: return dot_tile<MR, VECTORS>;
    }
}
static DotTile dot_tile_of(int64_t rows, int64_t vectors) {
    switch (vectors) {
    case 1: return dot_tile_of<1>(rows);
    case 2: return dot_tile_of<2>(rows);
    case 3: return dot_tile_of<NV < 3 ? NV : 3>(rows);
    default: return dot_tile_of<NV>(rows);
    }
}

struct Dots {
    typedef DotElement Element;
    static constexpr int64_t group = GROUP, offset = OFFSET, k_step = GROUP;
    static constexpr int64_t rows = MR, columns = NV * W, column_step = W;
    static constexpr bool in_registers = true;  // it has `whole`
    static constexpr int64_t k_block = (128 << 10) / (columns * sizeof(Element));  // of a panel, in the L2 cache
    static_assert(GROUP * sizeof(Element) == 4 && k_block % GROUP == 0, "a group fills one 32-bit lane");

    void add(const Element* a, int64_t stride, const Element* panel, int64_t k, int64_t height, int64_t width,
             int32_t* sums) {
        dot_tile_of(height, width / W)(a, stride, panel, k / GROUP, sums);
    }
    // take(sums) gets those of a tile of all `rows` and `columns` in registers; they start at `start`, row by row.
    template <class F>
    __attribute__((always_inline)) static void whole(const Element* a, int64_t stride, const Element* panel, int64_t k,
                                                     const int32_t* start, const F& take) {
        I s[MR][NV];
        for (int i = 0; i < MR; ++i)
            for (int j = 0; j < NV; ++j) s[i][j] = splat<I>(start[i]);
        add_dots(a, stride, panel, k / GROUP, s);
        take(s);
    }
};
