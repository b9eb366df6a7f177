// The outlier columns of x [M][K] (LLM.int8()): which they are, and their product with an int8 weight [N][K]. How many
// there are stays on the device: nothing waits for it.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of x).
#include "gpu.h"

constexpr int WIDTH = 16 / sizeof(ELEMENT);  // columns of a thread: one access
constexpr int THREADS = 256;

// flags [K], zero before: 1 where a magnitude of the column is at least the threshold; a NaN is not.
extern "C" __global__ void __launch_bounds__(THREADS) flag_columns(
    const ELEMENT* x, int64_t M, int64_t K, float threshold, int32_t* flags) {
    const int64_t column = ((int64_t)blockIdx.x * 32 + threadIdx.x % 32) * WIDTH;
    if (column >= K) return;
    const bool packets = K % WIDTH == 0 && (uint64_t)x % 16 == 0;
    bool found[WIDTH] = {};
    for (int64_t m = (int64_t)blockIdx.y * 8 + threadIdx.x / 32; m < M; m += 8 * gridDim.y) {
        float v[WIDTH] = {};
        if (packets) load_packet<WIDTH>(x + m * K + column, v);
        else
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (column + i < K) v[i] = widen(x[m * K + column + i]);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) found[i] = found[i] || fabsf(v[i]) >= threshold;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
        if (found[i] && column + i < K) atomicOr(flags + column + i, 1);
}

// columns [K]: the flagged ones in ascending order, as many as count [1] says. Grid: one CUDA block.
extern "C" __global__ void __launch_bounds__(1024) list_columns(
    const int32_t* flags, int64_t K, int32_t* columns, int32_t* count) {
    __shared__ int32_t of_warp[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t so_far = 0;
    for (int64_t first = 0; first < K; first += 1024) {
        const int64_t column = first + threadIdx.x;
        const bool flagged = column < K && flags[column];
        const uint32_t mine = __ballot_sync(ALL_LANES, flagged);
        __syncthreads();  // the counts of the last turn have been read
        if (lane == 0) of_warp[warp] = __popc(mine);
        __syncthreads();
        int32_t place = so_far + __popc(mine & ((1u << lane) - 1));
        for (int w = 0; w < 32; ++w) {
            if (w < warp) place += of_warp[w];
            so_far += of_warp[w];
        }
        if (flagged) columns[place] = (int32_t)column;
    }
    if (threadIdx.x == 0) *count = so_far;
}

constexpr int TILE = 64, DEPTH = 32, EACH = 4;  // of a CUDA block; columns at a time; rows and outputs of a thread

// out [M][N] = x @ (codes * scales [N])^T over the listed columns, in float32, in their order.
extern "C" __global__ void __launch_bounds__(THREADS) multiply_columns(
    const ELEMENT* x, const int8_t* codes, const float* scales, const int32_t* columns, const int32_t* count, int64_t M,
    int64_t N, int64_t K, float* out) {
    __shared__ float of_x[DEPTH][TILE + 1], of_w[DEPTH][TILE + 1];
    const int64_t tile_m = (int64_t)blockIdx.y * TILE, tile_n = (int64_t)blockIdx.x * TILE;
    const int across = threadIdx.x % 16, down = threadIdx.x / 16, listed = *count;
    float sums[EACH][EACH] = {};
    for (int first = 0; first < listed; first += DEPTH) {
        __syncthreads();  // the last columns have been read
        for (int i = threadIdx.x; i < DEPTH * TILE; i += THREADS) {
            const int d = i % DEPTH, r = i / DEPTH;
            const bool exists = first + d < listed;
            const int64_t column = exists ? columns[first + d] : 0, m = tile_m + r, n = tile_n + r;
            of_x[d][r] = exists && m < M ? widen(x[m * K + column]) : 0.0f;
            of_w[d][r] = exists && n < N ? (float)codes[n * K + column] : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (int d = 0; d < DEPTH; ++d)
#pragma unroll
            for (int i = 0; i < EACH; ++i)
#pragma unroll
                for (int j = 0; j < EACH; ++j)
                    sums[i][j] = fused(of_x[d][down + 16 * i], of_w[d][across + 16 * j], sums[i][j]);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int64_t m = tile_m + down + 16 * i, n = tile_n + across + 16 * j;
            if (m < M && n < N) out[m * N + n] = listed ? sums[i][j] * scales[n] : 0.0f;
        }
}
