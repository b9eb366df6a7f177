// The Hadamard rotation on the GPU. What it means is said in the reference.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the matrix), ROTATED (float, BFloat16: of the result).
#include "gpu.h"
#include "hadamard.h"

LB_FN ROTATED signed_as(float x, int i) { return narrow<ROTATED>(is_negative(i) ? -x : x); }

// Along the rows of x [rows][columns]: a warp takes a segment of a row, its lanes positions `lane` and `lane + 32`, so
// that all stages but the last are between lanes.
extern "C" __global__ void __launch_bounds__(256) rotate_rows(
    const ELEMENT* x, int64_t rows, int64_t columns, ROTATED* out) {
    const int lane = threadIdx.x % 32;
    const int64_t segments = (columns + SEGMENT - 1) / SEGMENT;
    const int64_t number = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
    if (number >= rows * segments) return;  // the whole warp
    const int64_t row = number / segments, first = (number - row * segments) * SEGMENT;
    const int length = (int)min((int64_t)SEGMENT, columns - first);
    const int64_t at = row * columns + first + lane;
    float v[2] = {};
    int size[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int i = lane + 32 * k;
        if (i >= length) continue;
        size[k] = block_of(i, length);
        v[k] = widen(x[at + 32 * k]) * factor_of(i, size[k]);
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float other = __shfl_xor_sync(ALL_LANES, v[k], h);
            if (h < size[k]) v[k] = lane & h ? other - v[k] : v[k] + other;
        }
    }
    if (length == SEGMENT) {
        const float sum = v[0] + v[1], difference = v[0] - v[1];
        v[0] = sum;
        v[1] = difference;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if (lane + 32 * k < length) out[at + 32 * k] = signed_as(v[k], lane + 32 * k);
}

// Across the rows: a thread takes a column of a segment of rows.
extern "C" __global__ void __launch_bounds__(256) rotate_columns(
    const ELEMENT* x, int64_t rows, int64_t columns, ROTATED* out) {
    const int64_t column = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (column >= columns) return;
    for (int64_t first = (int64_t)blockIdx.y * SEGMENT; first < rows; first += (int64_t)gridDim.y * SEGMENT) {
        const int length = (int)min((int64_t)SEGMENT, rows - first);
        const bool whole = length == SEGMENT;
        const int64_t at = first * columns + column;
        float v[SEGMENT] = {};
#pragma unroll
        for (int i = 0; i < SEGMENT; ++i)
            if (i < length)
                v[i] = widen(x[at + i * columns]) * factor_of(i, whole ? SEGMENT : block_of(i, length));
#pragma unroll
        for (int h = 1; h < SEGMENT; h *= 2) {
#pragma unroll
            for (int i = 0; i < SEGMENT; ++i) {
                if (i & h || !(whole || (i < length && h < block_of(i, length)))) continue;
                const float a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
        }
#pragma unroll
        for (int i = 0; i < SEGMENT; ++i)
            if (i < length) out[at + i * columns] = signed_as(v[i], i);
    }
}
