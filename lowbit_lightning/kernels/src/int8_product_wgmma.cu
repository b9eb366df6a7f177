// int8_product.cu for Hopper (sm_90a), by wgmma: the same product, the same bits.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), BIAS (the same, of the bias), TILE_M (128 or
// 192 rows of a tile), TILE_N (128 or 256 columns), STAGES.
//
// A CUDA block computes a tile of TILE_M x TILE_N, a warpgroup 64 rows of it: up to 128 sums a thread. Operands come
// through shared memory in steps of 128 along K, STAGES of them in a ring. A step's products are started while those of
// the step before still run, so the tensor units need not wait for a barrier. The price is a stage: one is multiplied,
// one may still be, and STAGES - 2 are on their way.
// A and B must start at multiples of 16 bytes and K be one; M and N are free.
#include "int8_results.h"
#include "wgmma.h"

constexpr int THREADS = TILE_M / WARPGROUP_ROWS * WARPGROUP, AHEAD = STAGES - 2;
constexpr int CHUNK = 16, CHUNKS = LINE / CHUNK, STAGE_BYTES = (TILE_M + TILE_N) * LINE;
constexpr int COPYING = 256, AT_ONCE = COPYING / CHUNKS;  // threads that copy, and rows that they copy at a time

// Columns. A lane holds two neighbouring columns of each fragment of 8. Rows of B lie in shared memory in such an order
// that four of these pairs are neighbours in the result, and a lane writes 8 columns of a row at a time:
//   row 8 f + 2 t + j of 32 in shared memory  <-  row 8 t + 2 f + j of B
LB_FN int dealt(int r) { return (r & 1) | (r >> 2 & 6) | (r << 2 & 24); }

// Starts the copies of rows first, first + AT_ONCE, ... of `matrix`, of one chunk from `column` on; what does not
// exist becomes zero.
template <int TILE>
LB_FN void start_rows(const int8_t* matrix, int64_t first, int64_t rows, int64_t K, int64_t column, int8_t* to) {
    const int8_t* from = matrix + first * K + column;
#pragma unroll
    for (int i = 0; i < TILE; i += AT_ONCE)
        start_copy(to + i * LINE, from + i * K, first + i < rows && column < K);
}

// Grid: one CUDA block for each tile. Dynamic shared memory: STAGES * STAGE_BYTES, and 1024 bytes more.
extern "C" __global__ void __launch_bounds__(THREADS) int8_product_wgmma(
    const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales, const float* b_scales,
    const BIAS* bias, ELEMENT* out) {
    extern __shared__ __align__(128) int8_t unaligned[];
    int8_t* ring = unaligned + (-shared_address(unaligned) & (8 * LINE - 1));

    const Tile tile = tile_of<TILE_M, TILE_N>(blockIdx.x, M, N);
    const int group = threadIdx.x / WARPGROUP, warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;

    const int64_t steps = (K + LINE - 1) / LINE;
    const auto start_step = [&](int64_t step, int stage) {
        if (THREADS > COPYING && threadIdx.x >= COPYING) return;
        int8_t* to = ring + stage * STAGE_BYTES + place_in_lines(row, chunk);
        const int64_t column = step * LINE + chunk * CHUNK;
        start_rows<TILE_M>(a, tile.row + row, M, K, column, to);
        start_rows<TILE_N>(b, tile.column + dealt(row), N, K, column, to + TILE_M * LINE);
    };
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) {
        if (s < steps) start_step(s, s);
        close_group();
    }
    int32_t sums[TILE_N / 2] = {};
    int full = 0, empty = AHEAD;  // the stage that is multiplied next, and the one that is filled next
    for (int64_t step = 0; step < steps; ++step) {
        wait_for_all_but<AHEAD - 1>();
        share_with_products();
        __syncthreads();  // everyone's copies into `full` have arrived, and the products of `empty` are done
        const int8_t* stage = ring + full * STAGE_BYTES;
        const uint64_t of_a = described(stage + group * WARPGROUP_ROWS * LINE), of_b = described(stage + TILE_M * LINE);
        order_sums();
#pragma unroll
        for (int k = 0; k < LINE / 32; ++k) start_product(sums, of_a + k * NEXT_32_COLUMNS, of_b + k * NEXT_32_COLUMNS);
        close_products();
        if (step + AHEAD < steps) start_step(step + AHEAD, empty);
        close_group();  // with nothing in it at the end, so that the count above stays right
        wait_for_products_but<1>();
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
    }
    wait_for_sums(sums);
    const int64_t m = tile.row + group * WARPGROUP_ROWS + warp * 16 + lane / 4;
#pragma unroll
    for (int q = 0; q < TILE_N / 32; ++q) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // a row at a time: more of them need too many registers at once
            const auto sum = [&](int, int j) { return sums[q * 16 + j / 2 * 4 + i * 2 + j % 2]; };
            const int64_t n = tile.column + q * 32 + lane % 4 * 8;
            store_columns<1>(sum, m + i * 8, n, M, N, a_scales, b_scales, bias, out);
        }
    }
}
