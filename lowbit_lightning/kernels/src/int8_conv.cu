// A convolution of int8 matrices on tensor cores, by a table, without patches in memory:
//   out[m][n] = b_scales[n] * sum over taps t of a_scales[p] * (A[p] . B[n][t]) (+ bias[n]),   p = table[m][t]
// and the gradient by the input, with a table that was turned round. A is [rows][K], B is [N][taps][K], table
// [M][taps] of one image's rows, -1: none. Image i of `images` has rows i * rows_of_image of A, i * M of out.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), BIAS (the same, of the bias), STAGES.
//
// A CUDA block computes a tile of 128 x 128, a warp 64 x 32 of it, as int8_product.cu does; chunks lie in shared memory
// as there. The table is read where A's rows are copied into shared memory: that is the whole of im2col. After each tap
// its exact sums are scaled by its rows and added in float32: 64 sums and 64 totals a thread.
// K must be a multiple of 16, and A and B start at multiples of 16 bytes.
#include "int8_tiles.h"

constexpr int TILE = 128, THREADS = 256;
constexpr int STAGE_BYTES = 2 * TILE * TILE_K, STEP = THREADS / CHUNKS, COPIES = TILE / STEP;
constexpr int TAPS = 4;  // whose scales are kept: one is added, and STAGES - 1 may be on their way

// What a row of the tile reads: in shared memory, since divisions by the size of an image take long.
struct alignas(16) Row { int64_t entry, image; };  // of the table, its first; of A, its image's first row

struct Table {
    const int32_t* at;
    const Row* rows;  // of the tile; a row that does not exist has no entry: -1
    // The row of A that tap t of the tile's r-th result reads, or -1.
    LB_METHOD int64_t row(int r, int64_t t) const {
        const Row mine = rows[r];
        if (mine.entry < 0) return -1;
        const int32_t from = at[mine.entry + t];
        return from < 0 ? -1 : mine.image + from;
    }
};
LB_FN Row row_of(int64_t m, int64_t M, int64_t all, int64_t taps, int64_t rows_of_image) {
    if (m >= all) return {-1, 0};
    const int64_t image = (m | M) >> 32 ? m / M : (uint32_t)m / (uint32_t)M;
    return {(m - image * M) * taps, image * rows_of_image};
}

// Copies of a step, in their order: steps of a tap, then the next tap. What a thread reads only moves on within a tap;
// the table is asked when one begins.
struct Copies {
    const int8_t *of_a[COPIES], *of_b[COPIES];  // the chunks that are copied next
    bool has_a[COPIES], has_b[COPIES];
    int64_t tap, k;
    LB_METHOD Copies(const int8_t* b, int64_t first_column, int64_t N, int64_t K, int64_t taps) : tap(0), k(0) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int64_t n = first_column + threadIdx.x / CHUNKS + i * STEP;
            has_b[i] = n < N;
            of_b[i] = b + (has_b[i] ? n : 0) * taps * K + threadIdx.x % CHUNKS * CHUNK;
        }
    }
    // scales: of the rows of the tile that a tap reads, of TAPS taps.
    LB_METHOD void start(const int8_t* a, const Table& table, int64_t K, const float* a_scales, float* scales,
                         int8_t* stage) {
        const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
        if (k == 0)
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int64_t from = table.row(row + i * STEP, tap);
                has_a[i] = from >= 0;
                of_a[i] = a + (has_a[i] ? from : 0) * K + chunk * CHUNK;
                if (chunk == 0) scales[(int)tap % TAPS * TILE + row + i * STEP] = has_a[i] ? a_scales[from] : 0.0f;
            }
        const bool exists = k + chunk * CHUNK < K;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            start_copy(stage + OfA::place(row + i * STEP, chunk), of_a[i], has_a[i] && exists);
            start_copy(stage + TILE * TILE_K + OfB::place(row + i * STEP, chunk), of_b[i], has_b[i] && exists);
            of_a[i] += TILE_K;
            of_b[i] += k + TILE_K < K ? TILE_K : K - k;
        }
        k += TILE_K;
        if (k >= K) k = 0, ++tap;
    }
};

// totals += the sums of a tap, times the scales of its rows; the sums are zero afterwards
LB_FN void add_tap(int32_t (&sums)[4][4][4], const float* scales, float (&totals)[4][4][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float scale = scales[i * 8 + (int)threadIdx.x % 32 / 4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            int32_t& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
            totals[i / 2][j / 2][i % 2 * 2 + j % 2] += (float)sum * scale;
            sum = 0;
        }
    }
}

LB_FN void store_totals(const float (&totals)[4][4][4], int64_t row, int64_t column, int64_t M, int64_t N,
                        const float* b_scales, const BIAS* bias, ELEMENT* out) {
    const int lane = threadIdx.x % 32;
    const int64_t n = column + lane % 4 * 8;
    const int count = (int)min((int64_t)8, N - n);  // may be negative
    const bool whole = count == 8 && N * sizeof(ELEMENT) % 16 == 0;
    float scale[8], shift[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        scale[j] = j < count ? b_scales[n + j] : 0.0f;
        shift[j] = bias && j < count ? widen(bias[n + j]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t m = row + i * 8 + lane / 4;
        if (m >= M) continue;
        ELEMENT result[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float scaled = totals[i / 2][j / 2][i % 2 * 2 + j % 2] * scale[j];
            result[j] = narrow<ELEMENT>(bias ? scaled + shift[j] : scaled);
        }
        ELEMENT* to = out + m * N + n;
        if (whole) store_whole<8>(to, result);
        else
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) to[j] = result[j];
    }
}

// Grid: one CUDA block for each tile, all of a band of columns first. Dynamic shared memory: STAGES stages, TILE Rows.
extern "C" __global__ void __launch_bounds__(THREADS) int8_conv(
    const int8_t* a, const int8_t* b, const int32_t* at, int64_t M, int64_t taps, int64_t rows_of_image, int64_t images,
    int64_t N, int64_t K, const float* a_scales, const float* b_scales, const BIAS* bias, ELEMENT* out) {
    extern __shared__ __align__(128) int8_t ring[];
    const int64_t all = M * images;
    Row* rows = (Row*)(ring + STAGES * STAGE_BYTES);
    __shared__ float scales[TAPS * TILE];
    const Table table{at, rows};
    const uint32_t tiles_n = (uint32_t)((N + TILE - 1) / TILE);  // those that run together share A's rows
    const int64_t tile_row = (int64_t)TILE * (blockIdx.x / tiles_n);
    const int64_t tile_column = (int64_t)TILE * (blockIdx.x % tiles_n);
    const int warp = threadIdx.x / 32, row = warp % 2 * 64, column = warp / 2 * 32;

    if (threadIdx.x < TILE) rows[threadIdx.x] = row_of(tile_row + threadIdx.x, M, all, taps, rows_of_image);
    __syncthreads();

    const int64_t steps_of_tap = (K + TILE_K - 1) / TILE_K, steps = steps_of_tap * taps;
    Copies copies(b, tile_column, N, K, taps);
    const auto start_next = [&](int stage) {
        copies.start(a, table, K, a_scales, scales, ring + stage * STAGE_BYTES);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) start_next(s);
        close_group();
    }
    int32_t sums[4][4][4] = {};
    float totals[4][4][4] = {};
    int full = 0, empty = STAGES - 1;  // the stage that is multiplied next, and the one that is filled next
    int64_t tap = 0, left = steps_of_tap;
    for (int64_t step = 0; step < steps; ++step) {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();  // everyone's copies into `full` have arrived, and everyone has read `empty`
        if (step + STAGES - 1 < steps) start_next(empty);
        close_group();  // with nothing in it at the end, so that the count above stays right
        const int8_t* stage = ring + full * STAGE_BYTES;
        multiply_stage(stage + row * TILE_K, stage + (TILE + column) * TILE_K, sums);
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
        if (--left == 0) {
            add_tap(sums, scales + (int)tap % TAPS * TILE + row, totals);
            ++tap, left = steps_of_tap;
        }
    }
    store_totals(totals, tile_row + row, tile_column + column, all, N, b_scales, bias, out);
}
