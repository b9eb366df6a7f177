// out [M][N] = x [M][K] @ weight [N][K]^T (+ bias) for a low-bit weight and up to 8 rows of x, without tensor cores: in
// float32, where no operand is rounded. The packed weight is read once.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of x and the result), BIAS (the same, of the bias), COLUMNS
// (1, 2, 4, 8: rows of x that there may be), and those of lowbit_units.h.
//
// A CUDA block has 4 rows of the weight. Its threads take units along K in turns: 8 elements of x serve the 4 rows. A
// unit's products are summed first, then multiplied by its scale. Sums are added over the lanes, then over the warps,
// in a fixed order.
#include "lowbit_units.h"

constexpr int THREADS = 256, WARPS = THREADS / 32, ROWS = 4;

// Unit u of a row of x, zeros after its end.
LB_FN void load_x(const ELEMENT* row, int u, int length, bool packets, float (&v)[UNIT]) {
    const ELEMENT* from = row + u * UNIT;
    if (packets && (u + 1) * UNIT <= length) load_packet<UNIT>(from, v);
    else
#pragma unroll
        for (int i = 0; i < UNIT; ++i) v[i] = u * UNIT + i < length ? widen(from[i]) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) lowbit_gemv_plain(
    const ELEMENT* x, const uint8_t* packed, const uint8_t* scales, const __grid_constant__ Form form, int64_t M,
    int64_t N, const BIAS* bias, ELEMENT* out) {
    __shared__ float of_warp[WARPS][ROWS * COLUMNS];
    const Values values(form);
    const int64_t first = (int64_t)blockIdx.x * ROWS;
    const int units = (int)ceil_div(form.length, UNIT), length = (int)form.length;
    const bool packets = has_packets(form, packed);
    const bool x_packets = (uint64_t)x % 16 == 0 && form.length * sizeof(ELEMENT) % 16 == 0;
    float sums[ROWS][COLUMNS] = {};
    const uint8_t *rows[ROWS], *scale_rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = min(first + r, N - 1);  // the last one again where there are no more
        rows[r] = packed + row * form.packed_stride;
        scale_rows[r] = scales + row * form.scales_stride;
    }
    for (int u = threadIdx.x; u < units; u += THREADS) {
        Unit unit[ROWS];
        Scale scale[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            unit[r] = load_unit(form, rows[r], u, packets);
            scale[r] = load_scale(form, scale_rows[r], block_of(u * UNIT));
        }
        float v[COLUMNS][UNIT];
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m)
            load_x(x + min((int64_t)m, M - 1) * form.length, u, length, x_packets, v[m]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float part[COLUMNS] = {};
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                const float value = values.of(unit[r], i);
#pragma unroll
                for (int m = 0; m < COLUMNS; ++m) part[m] = fused(value, v[m][i], part[m]);
            }
#pragma unroll
            for (int m = 0; m < COLUMNS; ++m) sums[r][m] = fused(scale[r].scale, part[m], sums[r][m]);
        }
        if (!AFFINE) continue;
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) {
            float of_x = v[m][0];
#pragma unroll
            for (int i = 1; i < UNIT; ++i) of_x += v[m][i];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r][m] = fused(scale[r].offset, of_x, sums[r][m]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; ++i) {
        float sum = sums[i / COLUMNS][i % COLUMNS];
#pragma unroll
        for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, half);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= ROWS * COLUMNS) return;
    const int64_t n = first + threadIdx.x % ROWS, m = threadIdx.x / ROWS;
    if (n >= N || m >= M) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += of_warp[w][threadIdx.x % ROWS * COLUMNS + m];
    out[m * N + n] = narrow<ELEMENT>(bias ? sum + widen(bias[n]) : sum);
}
