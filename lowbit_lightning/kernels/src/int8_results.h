// The results of a product: exact sums become ELEMENTs in the reference's order, and are written.
#pragma once
#include "tensor_core.h"

constexpr int BAND = 16;  // tiles down: of the 100 to 200 that run at a time, so that they form about a square

// The first row and column of a CUDA block's tile. Tiles go down a band of BAND rows of them, before the next column:
// those that run together share what L2 holds.
struct Tile { int64_t row, column; };
template <int ROWS, int COLUMNS> LB_FN Tile tile_of(uint32_t block, int64_t M, int64_t N) {
    const uint32_t tiles_m = (uint32_t)((M + ROWS - 1) / ROWS), tiles_n = (uint32_t)((N + COLUMNS - 1) / COLUMNS);
    const uint32_t band = block / (BAND * tiles_n) * BAND, place = block % (BAND * tiles_n);
    const uint32_t height = min((uint32_t)BAND, tiles_m - band);
    return {(int64_t)ROWS * (band + place % height), (int64_t)COLUMNS * (place / height)};
}

// 8 neighbouring columns from n on, of ROWS rows 8 apart from m on. sum(i, j): that of the i-th row and column n + j.
template <int ROWS, class Sum>
LB_FN void store_columns(Sum sum, int64_t m, int64_t n, int64_t M, int64_t N, const float* a_scales,
                         const float* b_scales, const BIAS* bias, ELEMENT* out) {
    const int count = (int)min((int64_t)8, N - n);  // may be negative
    float scale[8], shift[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        scale[j] = j < count ? b_scales[n + j] : 0.0f;
        shift[j] = bias && j < count ? widen(bias[n + j]) : 0.0f;
    }
    const bool whole = count == 8 && N * sizeof(ELEMENT) % 16 == 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (m + i * 8 >= M) continue;
        const float a_scale = a_scales[m + i * 8];
        ELEMENT result[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float scaled = scale_sum(sum(i, j), a_scale, scale[j]);
            result[j] = narrow<ELEMENT>(bias ? scaled + shift[j] : scaled);
        }
        ELEMENT* to = out + (m + i * 8) * N + n;
        if (whole) store_whole<8>(to, result);
        else
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) to[j] = result[j];
    }
}
