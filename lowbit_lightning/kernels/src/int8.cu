// Row-wise and column-wise int8 quantisation on the GPU. What the ops mean is said in reference.py.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16), ROW_THREADS (32 or 256: how many threads share a row),
// STOCHASTIC (1: rounded at random).
#define BLOCK 256
#include "gpu.h"
#include "scale.h"
#include "group.h"
#include "philox.h"

constexpr float TINY_ROW = 0x1p-120f;  // a row with a smaller largest magnitude counts as zero
constexpr int ROWS = 256 / ROW_THREADS;  // of a CUDA block
constexpr int WIDTH = 16 / sizeof(ELEMENT);  // elements of one access

struct RowScale { float inverse, scale; };

// From the bits of the largest magnitude, which order like the magnitudes, infinity and NaN on top.
LB_FN RowScale row_scale(uint32_t top) {
    const float absmax = from_bits((int32_t)top);
    if (top >= INFINITE) return {0.0f, from_bits(0x7fc00000)};  // the scale is NaN: the row's results show it
    if (absmax < TINY_ROW) return {0.0f, 0.0f};
    return {127.0f / absmax, absmax / 127.0f};
}
// To nearest, ties to even. |x * inverse| is below 127.5 by the choice of the inverse; a row without scale gives zeros.
// At random: by the random word of the element, whose index in the matrix is `index`.
LB_FN int32_t rounded(float x, float inverse, uint64_t seed, uint64_t index) {
    if (inverse == 0.0f) return 0;
#if STOCHASTIC
    const float u = ((float)random_word(philox(seed, 0, 0, index >> 3), index) + 0.5f) * 0x1p-16f;
    const float y = x * inverse;
    return max(-127, min(127, __float2int_rz(y + copysignf(u, y))));
#else
    return __float2int_rn(x * inverse);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows: x [rows][columns] -> q of the same shape, scales [rows]

extern "C" __global__ void __launch_bounds__(256) quantize_rows(
    const ELEMENT* x, int64_t rows, int64_t columns, uint64_t seed, int8_t* q, float* scales) {
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / ROW_THREADS;
    const int lane = threadIdx.x % ROW_THREADS;
    const bool active = row < rows;
    const ELEMENT* from = x + (active ? row : 0) * columns;
    uint8_t* to = (uint8_t*)q + (active ? row : 0) * columns;
    const bool packets = (uint64_t)from % 16 == 0 && (uint64_t)to % WIDTH == 0;
    const int64_t in_packets = packets ? columns / WIDTH * WIDTH : 0;  // the rest goes one by one

    uint32_t top[1] = {0};
    if (active) {
        for (int64_t c = lane * WIDTH; c < in_packets; c += ROW_THREADS * WIDTH) {
            float v[WIDTH];
            load_packet<WIDTH>(from + c, v);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) top[0] = max(top[0], magnitude_bits(v[i]));
        }
        for (int64_t c = in_packets + lane; c < columns; c += ROW_THREADS)
            top[0] = max(top[0], magnitude_bits(widen(from[c])));
    }
    group_max<ROW_THREADS>(top);
    if (!active) return;

    const RowScale s = row_scale(top[0]);
    if (lane == 0) scales[row] = s.scale;
    for (int64_t c = lane * WIDTH; c < in_packets; c += ROW_THREADS * WIDTH) {  // from the caches, the second time
        float v[WIDTH];
        int32_t r[WIDTH];
        load_packet<WIDTH>(from + c, v);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) r[i] = rounded(v[i], s.inverse, seed, row * columns + c + i) & 255;
        store_packet<WIDTH>(to + c, r);
    }
    for (int64_t c = in_packets + lane; c < columns; c += ROW_THREADS)
        to[c] = (uint8_t)rounded(widen(from[c]), s.inverse, seed, row * columns + c);
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns: x [rows][columns] -> q [columns][rows], scales [columns]. First the largest magnitudes, then tiles turn.

constexpr int TILE = 64;          // rows and columns
constexpr int STRIP_ROWS = 256;   // that one CUDA block of column_tops looks at
constexpr int PATCH = 4;          // rows and columns that one thread turns

// tops: [columns], zero before: the bits of the largest magnitudes. A maximum does not depend on the order.
extern "C" __global__ void __launch_bounds__(256) column_tops(
    const ELEMENT* x, int64_t rows, int64_t columns, uint32_t* tops) {
    __shared__ uint32_t of_row[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = (int64_t)blockIdx.x * 32 + lane;
    uint32_t top = 0;
    for (int64_t strip = blockIdx.y; strip * STRIP_ROWS < rows; strip += gridDim.y) {
        const int64_t end = min(rows, (strip + 1) * STRIP_ROWS);
        if (column < columns)
#pragma unroll 8
            for (int64_t r = strip * STRIP_ROWS + warp; r < end; r += 8)
                top = max(top, magnitude_bits(widen(x[r * columns + column])));
    }
    of_row[warp][lane] = top;
    __syncthreads();
    if (warp) return;
    for (int w = 1; w < 8; ++w) top = max(top, of_row[w][lane]);
    if (column < columns) atomicMax(tops + column, top);
}

// One CUDA block turns a tile: column tile blockIdx.x, row tiles blockIdx.y, blockIdx.y + gridDim.y, ...
extern "C" __global__ void __launch_bounds__(256) quantize_columns(
    const ELEMENT* x, int64_t rows, int64_t columns, const uint32_t* tops, uint64_t seed, int8_t* q, float* scales) {
    __shared__ uint32_t turned[TILE][TILE / 4 + 1];  // [column][rows, four to a word]; the odd pitch spreads the banks
    const int across = threadIdx.x % 16, down = threadIdx.x / 16;  // this thread's patch
    const int64_t column = (int64_t)blockIdx.x * TILE + across * PATCH;
    const bool aligned = columns % PATCH == 0 && (uint64_t)x % (PATCH * sizeof(ELEMENT)) == 0;
    const bool whole = aligned && column + PATCH <= columns;
    RowScale s[PATCH] = {};
    for (int j = 0; j < PATCH; ++j) {
        if (column + j >= columns) continue;
        s[j] = row_scale(tops[column + j]);
        if (blockIdx.y == 0 && down == 0) scales[column + j] = s[j].scale;
    }

    for (int64_t tile = blockIdx.y; tile * TILE < rows; tile += gridDim.y) {
        const int64_t first = tile * TILE + down * PATCH;
        float v[PATCH][PATCH] = {};
#pragma unroll
        for (int i = 0; i < PATCH; ++i) {
            if (first + i >= rows) continue;
            const ELEMENT* from = x + (first + i) * columns + column;
            if (whole) load_packet<PATCH>(from, v[i]);
            else
                for (int j = 0; j < PATCH; ++j) v[i][j] = column + j < columns ? widen(from[j]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < PATCH; ++j) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < PATCH; ++i) {
                const uint64_t index = (first + i) * columns + column + j;
                word |= (uint32_t)(rounded(v[i][j], s[j].inverse, seed, index) & 255) << (8 * i);
            }
            turned[across * PATCH + j][down] = word;
        }
        __syncthreads();

        // Out: 64 columns, four pieces of 16 rows each.
        const int64_t out_column = (int64_t)blockIdx.x * TILE + threadIdx.x / 4;
        const int64_t out_row = tile * TILE + threadIdx.x % 4 * 16;
        if (out_column < columns && out_row < rows) {
            const uint32_t* words = &turned[threadIdx.x / 4][threadIdx.x % 4 * 4];
            int8_t* to = q + out_column * rows + out_row;
            if (out_row + 16 <= rows && (uint64_t)to % 16 == 0) {
                *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
            } else {
                for (int i = 0; i < 16 && out_row + i < rows; ++i) to[i] = (int8_t)(words[i / 4] >> (8 * (i % 4)));
            }
        }
        __syncthreads();
    }
}
