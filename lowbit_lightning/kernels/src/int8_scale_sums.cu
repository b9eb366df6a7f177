// What follows cuBLASLt's int8 product: out [M][N] = sums [M][pitch] * a_scales [M] * b_scales [N] (+ bias [N], or
// null).
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result) and BIAS (the same, of the bias).
#include "tensor_core.h"

extern "C" __global__ void __launch_bounds__(256) scale_sums(
    const int32_t* sums, int64_t M, int64_t N, int64_t pitch, const float* a_scales, const float* b_scales,
    const BIAS* bias, ELEMENT* out) {
    const int64_t n = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (n >= N) return;
    const int count = (int)min((int64_t)4, N - n);
    float scale[4], shift[4];
    for (int i = 0; i < 4; ++i) {
        scale[i] = i < count ? b_scales[n + i] : 0.0f;
        shift[i] = bias && i < count ? widen(bias[n + i]) : 0.0f;
    }
    const bool packets = count == 4 && N % 4 == 0 && pitch % 4 == 0;
    for (int64_t m = blockIdx.y; m < M; m += gridDim.y) {
        const int32_t* from = sums + m * pitch + n;
        ELEMENT* to = out + m * N + n;
        const float a_scale = a_scales[m];
        int32_t sum[4];
        if (packets) copy((const Packet<16>*)from, (Packet<16>*)sum);
        else
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = i < count ? from[i] : 0;
        ELEMENT result[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float scaled = scale_sum(sum[i], a_scale, scale[i]);
            result[i] = narrow<ELEMENT>(bias ? scaled + shift[i] : scaled);
        }
        if (packets) store_whole<4>(to, result);
        else
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < count) to[i] = result[i];
    }
}
