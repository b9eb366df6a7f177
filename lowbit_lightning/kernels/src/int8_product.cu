// out [M][N] = (A [M][K] @ B [N][K]^T) * a_scales [M] * b_scales [N] (+ bias [N], or null) of int8 matrices, on tensor
// cores. The sums stay in registers until they are scaled: no int32 goes through memory.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), BIAS (the same, of the bias), TILE_N (128 or
// 256 columns of a tile), STAGES.
//
// A CUDA block computes a tile of 128 x TILE_N, a warp 64 x 64 of it: 128 sums a thread. The rows of A and B that the
// tile needs come through shared memory in steps of 64 along K, STAGES of them in a ring: while one is multiplied,
// STAGES - 1 are on their way. A and B must start at multiples of 16 bytes and K be one; M and N are free.
#include "int8_results.h"
#include "int8_tiles.h"

constexpr int TILE_M = 128, WARP_TILE = 64;
constexpr int WARPS_M = TILE_M / WARP_TILE, WARPS_N = TILE_N / WARP_TILE, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * TILE_K;

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

// Grid: one CUDA block for each tile. Dynamic shared memory: STAGES * STAGE_BYTES.
extern "C" __global__ void __launch_bounds__(THREADS) int8_product(
    const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales, const float* b_scales,
    const BIAS* bias, ELEMENT* out) {
    extern __shared__ __align__(128) int8_t ring[];

    const Tile tile = tile_of<TILE_M, TILE_N>(blockIdx.x, M, N);
    const int warp = threadIdx.x / 32, row = warp % WARPS_M * WARP_TILE, column = warp / WARPS_M * WARP_TILE;

    const int64_t steps = (K + TILE_K - 1) / TILE_K;
    const auto start_step = [&](int64_t step, int stage) {
        int8_t* to = ring + stage * STAGE_BYTES;
        start_tile<OfA, TILE_M>(a, tile.row, M, K, step * TILE_K, to);
        start_tile<OfB, TILE_N>(b, tile.column, N, K, step * TILE_K, to + TILE_M * TILE_K);
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
    const int64_t m = tile.row + row + threadIdx.x % 32 / 4, n = tile.column + column + threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto sum = [&](int i, int j) { return sums[i / 2][half * 4 + j / 2][i % 2 * 2 + j % 2]; };
        store_columns<8>(sum, m, n + half * 32, M, N, a_scales, b_scales, bias, out);
    }
}
