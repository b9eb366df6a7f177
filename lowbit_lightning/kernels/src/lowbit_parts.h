// The last step of a product whose K was cut into parts: their sums, in order, and the bias.
#pragma once

// work [parts][rows][columns]; out [rows][columns]
extern "C" __global__ void __launch_bounds__(256) sum_parts(
    const float* work, int64_t parts, int64_t rows, int64_t columns, const BIAS* bias, ELEMENT* out) {
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x, count = rows * columns;
    if (i >= count) return;
    float sum = 0.0f;
    for (int64_t p = 0; p < parts; ++p) sum += work[p * count + i];
    out[i] = narrow<ELEMENT>(bias ? sum + widen(bias[i % columns]) : sum);
}
