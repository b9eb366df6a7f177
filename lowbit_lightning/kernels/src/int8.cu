// Row-wise and column-wise int8 quantisation on the GPU. What the ops mean is said in the reference.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the matrix), ROW_THREADS (32 or 256: how many threads share
// a row), DITHERED (2: columns are dithered, 1: rows too, 0: rounded to nearest).
#define BLOCK 256
#include "gpu.h"
#include "scale.h"
#include "group.h"
#include "dither.h"

constexpr int ROWS = 256 / ROW_THREADS;  // of a CUDA block
constexpr int WIDTH = 16 / sizeof(ELEMENT);  // elements of one access

// The words of N neighbours in a row, from `column` on.
template <int N> LB_FN void dither_run(uint64_t seed, int64_t row, int64_t column, uint32_t (&word)[N]) {
#if DITHERED
    const uint32_t start = dither_start(seed, row, column);
#pragma unroll
    for (int i = 0; i < N; ++i) word[i] = (start + i * DITHER_COLUMN) >> 17;
#endif
}

// The int8, in the low byte, ties to even: |x * inverse| is at most 127 + 2^-17 by the choice of the inverse, and what
// is added at most 1/2 - 2^-16. A row without scale gives zeros.
template <bool DITHERS> LB_FN int32_t rounded(float x, float inverse, uint32_t word) {
    if (inverse == 0.0f) return 0;
    if (DITHERS) return __float2int_rn(x * inverse + (((float)word + 0.5f) * 0x1p-15f - 0.5f)) & 255;
    return __float2int_rn(x * inverse) & 255;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows alone: x [rows][columns] -> q of the same shape, scales [rows]

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
#pragma unroll 2
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
        uint32_t word[WIDTH];
        load_packet<WIDTH>(from + c, v);
        dither_run(seed, row, c, word);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) r[i] = rounded<DITHERED == 1>(v[i], s.inverse, word[i]);
        store_packet<WIDTH>(to + c, r);
    }
    for (int64_t c = in_packets + lane; c < columns; c += ROW_THREADS) {
        uint32_t word[1];
        dither_run(seed, row, c, word);
        to[c] = (uint8_t)rounded<DITHERED == 1>(widen(from[c]), s.inverse, word[0]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns, and rows in passing: x [rows][columns] -> column_q [columns][rows], column_scales [columns], and what
// quantize_rows gives. Two readings: one for the largest magnitudes, one that rounds and turns. A CUDA block sees a
// tile as wide as its threads' packets together, and takes several, one below the other.

// Of one row, from `column` on; zeros after the end. packets: whole ones, aligned.
LB_FN void load_some(const ELEMENT* row, int64_t column, int64_t columns, bool packets, float (&v)[WIDTH]) {
    if (packets) {
        if (column < columns) load_packet<WIDTH>(row + column, v);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
            if (column + j < columns) v[j] = widen(row[column + j]);
    }
}

constexpr int STRIP_ROWS = 64;  // that a CUDA block of find_tops looks at together
constexpr int FLIGHT = 4;       // rows whose packets a thread waits for together

// The bits of the largest magnitudes: column_tops [columns] and, unless null, row_tops [rows]; zero before. A maximum
// does not depend on the order.
extern "C" __global__ void __launch_bounds__(256) find_tops(
    const ELEMENT* x, int64_t rows, int64_t columns, uint32_t* column_tops, uint32_t* row_tops) {
    constexpr int STRIDE = 32 + 32 / WIDTH;  // neighbouring columns of several lanes lie in different banks
    __shared__ uint32_t of_warp[8][WIDTH * STRIDE];  // [warp][i * STRIDE + lane]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = (int64_t)blockIdx.x * 32 * WIDTH, column = first + lane * WIDTH;
    const bool packets = columns % WIDTH == 0 && (uint64_t)x % 16 == 0;
    uint32_t top[WIDTH] = {};
    for (int64_t strip = blockIdx.y; strip * STRIP_ROWS < rows; strip += gridDim.y) {
        const int64_t end = min(rows, (strip + 1) * STRIP_ROWS);
        for (int64_t r = strip * STRIP_ROWS + warp * FLIGHT; r < end; r += 8 * FLIGHT) {
            float v[FLIGHT][WIDTH] = {};
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i)
                if (r + i < end) load_some(x + (r + i) * columns, column, columns, packets, v[i]);
            uint32_t of_row = 0;  // lane i's: of row r + i
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                uint32_t highest = 0;
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    const uint32_t bits = magnitude_bits(v[i][j]);
                    top[j] = max(top[j], bits);
                    highest = max(highest, bits);
                }
                if (row_tops) {
                    highest = lanes_max<32>(highest);
                    if (lane == i) of_row = highest;
                }
            }
            if (row_tops && lane < FLIGHT && r + lane < end) atomicMax(row_tops + r + lane, of_row);
        }
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) of_warp[warp][j * STRIDE + lane] = top[j];
    __syncthreads();
    for (int slot = threadIdx.x; slot < 32 * WIDTH; slot += 256) {
        uint32_t highest = 0;
#pragma unroll
        for (int w = 0; w < 8; ++w) highest = max(highest, of_warp[w][slot % WIDTH * STRIDE + slot / WIDTH]);
        if (first + slot < columns) atomicMax(column_tops + first + slot, highest);
    }
}

constexpr int PATCH = 4;                   // rows of a thread's patch, WIDTH columns wide
constexpr int TILE_ROWS = 16 * PATCH;      // of 16 x 16 threads
constexpr int TILE_COLUMNS = 16 * WIDTH;

// Where a column of the tile begins in shared memory: 16 words of four rows each. No two lanes of a warp then meet in a
// bank, neither those that write (one word of 16 patches, two deep) nor those that read (see `out_column`).
LB_FN int place_of(int column) { return 16 * column + 2 * (column / WIDTH); }
// The column that a group of four threads writes out: neighbouring groups take two columns each of two patches.
LB_FN int out_column(int group) {
    const int rest = group / 4;
    const int patch = group / 2 % 2 + rest / (WIDTH / 2) * 2, inside = group % 2 + rest % (WIDTH / 2) * 2;
    return patch * WIDTH + inside;
}

// row_q, row_scales, row_tops: null where the rows are not wanted
extern "C" __global__ void __launch_bounds__(256, 2) quantize_tiles(
    const ELEMENT* x, int64_t rows, int64_t columns, uint64_t seed, const uint32_t* column_tops, int8_t* column_q,
    float* column_scales, const uint32_t* row_tops, int8_t* row_q, float* row_scales) {
    constexpr int STRIDE = 16 + 32 / WIDTH;  // as in find_tops
    __shared__ __align__(8) uint32_t turned[16 * TILE_COLUMNS + 2 * 16];
    __shared__ float inverses[WIDTH * STRIDE];  // [j * STRIDE + patch]
    const int across = threadIdx.x % 16, down = threadIdx.x / 16;  // this thread's patch
    const int64_t column = (int64_t)blockIdx.x * TILE_COLUMNS + across * WIDTH;
    const bool packets = columns % WIDTH == 0 && (uint64_t)x % 16 == 0 && (uint64_t)row_q % WIDTH == 0;
    if (threadIdx.x < TILE_COLUMNS) {
        const int64_t mine = (int64_t)blockIdx.x * TILE_COLUMNS + threadIdx.x;
        const RowScale s = mine < columns ? row_scale(column_tops[mine]) : RowScale{0.0f, 0.0f};
        inverses[threadIdx.x % WIDTH * STRIDE + threadIdx.x / WIDTH] = s.inverse;
        if (blockIdx.y == 0 && mine < columns) column_scales[mine] = s.scale;
    }
    __syncthreads();
    float inverse[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) inverse[j] = inverses[j * STRIDE + across];

    for (int64_t tile = blockIdx.y; tile * TILE_ROWS < rows; tile += gridDim.y) {
        const int64_t first = tile * TILE_ROWS + down * PATCH;
        float v[PATCH][WIDTH] = {};
#pragma unroll
        for (int i = 0; i < PATCH; ++i)
            if (first + i < rows) load_some(x + (first + i) * columns, column, columns, packets, v[i]);
        uint32_t four[WIDTH] = {};
#pragma unroll
        for (int i = 0; i < PATCH; ++i) {
            uint32_t word[WIDTH];
            dither_run(seed, first + i, column, word);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j)
                four[j] |= (uint32_t)rounded<DITHERED != 0>(v[i][j], inverse[j], word[j]) << (8 * i);
            if (!row_q || first + i >= rows) continue;
            const RowScale s = row_scale(row_tops[first + i]);
            if (blockIdx.x == 0 && across == 0) row_scales[first + i] = s.scale;
            int32_t r[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) r[j] = rounded<DITHERED == 1>(v[i][j], s.inverse, word[j]);
            uint8_t* to = (uint8_t*)row_q + (first + i) * columns + column;
            if (packets) {
                if (column < columns) store_packet<WIDTH>(to, r);
            } else {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j)
                    if (column + j < columns) to[j] = (uint8_t)r[j];
            }
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) turned[place_of(across * WIDTH + j) + down] = four[j];
        __syncthreads();

        for (int item = threadIdx.x; item < 4 * TILE_COLUMNS; item += 256) {  // 16 rows of a column each
            const int inside = out_column(item / 4), piece = item % 4;
            const int64_t out = (int64_t)blockIdx.x * TILE_COLUMNS + inside, row = tile * TILE_ROWS + piece * 16;
            if (out >= columns || row >= rows) continue;
            const uint2* pairs = (const uint2*)(turned + place_of(inside) + 4 * piece);
            const uint2 low = pairs[0], high = pairs[1];
            int8_t* to = column_q + out * rows + row;
            if (row + 16 <= rows && (uint64_t)to % 16 == 0) {
                *(uint4*)to = make_uint4(low.x, low.y, high.x, high.y);
            } else {
                const uint32_t word[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    if (row + i < rows) to[i] = (int8_t)(word[i / 4] >> (8 * (i % 4)));
            }
        }
        __syncthreads();
    }
}
