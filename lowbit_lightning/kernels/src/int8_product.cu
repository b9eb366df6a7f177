// out [M][N] = (A [M][K] @ B [N][K]^T) * a_scales [M] * b_scales [N] (+ bias [N], or null) of int8 matrices, on tensor
// cores. The sums stay in registers until they are scaled: no int32 goes through memory.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), BIAS (the same, of the bias), TILE_N (128 or
// 256 columns of a tile), STAGES.
//
// A CUDA block computes a tile of 128 x TILE_N, a warp 64 x 64 of it: 128 sums a thread. The rows of A and B that the
// tile needs come through shared memory in steps of 64 along K, STAGES of them in a ring: while one is multiplied,
// STAGES - 1 are on their way. A and B must start at multiples of 16 bytes and K be one; M and N are free.
#include "int8_tiles.h"

constexpr int TILE_M = 128, WARP_TILE = 64;
constexpr int WARPS_M = TILE_M / WARP_TILE, WARPS_N = TILE_N / WARP_TILE, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * TILE_K;
constexpr int BAND = 16;  // tiles down: of the 100 to 200 that run at a time, so that they form about a square

// Starts the copies of rows `first` to first + ROWS - 1, columns k to k + TILE_K - 1; what does not exist becomes zero.
template <class Of, int ROWS>
LB_FN void start_tile(const int8_t* matrix, int64_t first, int64_t rows, int64_t K, int64_t k, int8_t* tile) {
    constexpr int STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const int64_t column = k + chunk * CHUNK;
    const int8_t* from = matrix + (first + row) * K + column;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP)
        start_copy(tile + Of::place(row + i, chunk), from + i * K, first + row + i < rows && column < K);
}

// In the reference's order: the exact sum as float, times its scales, plus the bias, rounded to ELEMENT.
LB_FN void store_sums(const int32_t (&sums)[4][8][4], int64_t row, int64_t column, int64_t M, int64_t N,
                      const float* a_scales, const float* b_scales, const BIAS* bias, ELEMENT* out) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t n = column + half * 32 + lane % 4 * 8;
        const int count = (int)min((int64_t)8, N - n);  // may be negative
        float scale[8], shift[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            scale[j] = j < count ? b_scales[n + j] : 0.0f;
            shift[j] = bias && j < count ? widen(bias[n + j]) : 0.0f;
        }
        const bool whole = count == 8 && N * sizeof(ELEMENT) % 16 == 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t m = row + i * 8 + lane / 4;
            if (m >= M) continue;
            const float a_scale = a_scales[m];
            ELEMENT result[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int32_t sum = sums[i / 2][half * 4 + j / 2][i % 2 * 2 + j % 2];
                const float scaled = scale_sum(sum, a_scale, scale[j]);
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
}

// Grid: one CUDA block for each tile. Dynamic shared memory: STAGES * STAGE_BYTES.
extern "C" __global__ void __launch_bounds__(THREADS) int8_product(
    const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales, const float* b_scales,
    const BIAS* bias, ELEMENT* out) {
    extern __shared__ __align__(128) int8_t ring[];

    // Tiles down a band of BAND rows of them, before the next column: those that run together share what L2 holds.
    const uint32_t tiles_m = (uint32_t)((M + TILE_M - 1) / TILE_M), tiles_n = (uint32_t)((N + TILE_N - 1) / TILE_N);
    const uint32_t band = blockIdx.x / (BAND * tiles_n) * BAND, place = blockIdx.x % (BAND * tiles_n);
    const uint32_t height = min((uint32_t)BAND, tiles_m - band);
    const int64_t tile_row = (int64_t)TILE_M * (band + place % height);
    const int64_t tile_column = (int64_t)TILE_N * (place / height);
    const int warp = threadIdx.x / 32, row = warp % WARPS_M * WARP_TILE, column = warp / WARPS_M * WARP_TILE;

    const int64_t steps = (K + TILE_K - 1) / TILE_K;
    const auto start_step = [&](int64_t step, int stage) {
        int8_t* to = ring + stage * STAGE_BYTES;
        start_tile<OfA, TILE_M>(a, tile_row, M, K, step * TILE_K, to);
        start_tile<OfB, TILE_N>(b, tile_column, N, K, step * TILE_K, to + TILE_M * TILE_K);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) start_step(s, s);
        close_group();
    }
    int32_t sums[4][8][4] = {};
    int full = 0, empty = STAGES - 1;  // the stage that is multiplied next, and the one that is filled next
    for (int64_t step = 0; step < steps; ++step) {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();  // everyone's copies into `full` have arrived, and everyone has read `empty`
        if (step + STAGES - 1 < steps) start_step(step + STAGES - 1, empty);
        close_group();  // with nothing in it at the end, so that the count above stays right
        const int8_t* stage = ring + full * STAGE_BYTES;
        multiply_stage(stage + row * TILE_K, stage + (TILE_M + column) * TILE_K, sums);
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
    }
    store_sums(sums, tile_row + row, tile_column + column, M, N, a_scales, b_scales, bias, out);
}
