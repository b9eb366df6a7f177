// Block-wise quantisation on the GPU. What the ops mean is said in the reference.
//
// Specialised by macros: BLOCK (elements), ELEMENT (float, Half, BFloat16), MAP (0 dynamic signed, 1 dynamic unsigned,
// 2 custom: a codebook of up to 256 sorted values).
#include "gpu.h"
#include "scale.h"
#include "group.h"
#include "dynamic_tables.h"  // generated from formats/maps.py
#include "dynamic_lines.h"
#include "dynamic_map.h"

typedef Share<16 / sizeof(ELEMENT)> Mine;  // 16 bytes per access

#if MAP == 2

__shared__ float book[256], middles[256];

// Every thread of the CUDA block has to call it. What lies after the codebook's end is zero and never chosen.
LB_FN uint32_t prepare(const float* values, int count) {
    for (int i = threadIdx.x; i < 256; i += THREADS) {
        book[i] = i < count ? values[i] : 0.0f;
        middles[i] = i + 1 < count ? (values[i + 1] + values[i]) * 0.5f : 3e38f;
    }
    __syncthreads();
    return 0;
}
LB_FN bool has_negative() { return book[0] < 0.0f; }
LB_FN bool carries_sign() { return has_negative() && book[0] > -1.0f; }
LB_FN float decoded(int32_t counted, uint32_t) { return book[counted & 255]; }
// The nearest code, the lower one on a tie: the number of middles below y.
LB_FN int32_t encoded(float x, float inverse, uint32_t) {
    const float y = x * inverse;
    int32_t code = 0;
#pragma unroll
    for (int step = 128; step; step /= 2)
        if (middles[code + step - 1] < y) code += step;
    return code == 0 && x > 0.0f && book[0] == 0.0f ? 1 : code;
}

#else

#if MAP == 0
typedef DynamicSignedConstants Map;
#else
typedef DynamicUnsignedConstants Map;
#endif
LB_FN uint32_t prepare(const float*, int) { return prepare_tables(Map::is_signed, !Map::is_signed); }
LB_FN bool has_negative() { return Map::is_signed; }
LB_FN bool carries_sign() { return Map::is_signed; }
LB_FN float decoded(int32_t counted, uint32_t place) { return decode<Map, V, I>(counted, place); }
LB_FN int32_t encoded(float x, float inverse, uint32_t place) { return encode<Map, V, I>(x, inverse, place); }

#endif

LB_FN Position mine(int64_t rows, int64_t row_length) {
    const int64_t per_row = (row_length + BLOCK - 1) / BLOCK;
    const int64_t block = (int64_t)blockIdx.x * GROUPS + threadIdx.x / GROUP;
    return block < rows * per_row ? position_of(block, per_row, row_length) : Position{0, 0, 0};
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize(
    const ELEMENT* x, int64_t rows, int64_t row_length, const float* values, int count, uint8_t* codes, float* scales) {
    const uint32_t place = prepare(values, count);
    const Position at = mine(rows, row_length);
    const ELEMENT* from = x + at.start;
    uint8_t* to = codes + at.start;
    const bool packets = at.n == BLOCK && Mine::aligned(from) && Mine::aligned(to);

    float v[PER_THREAD];
    if (packets) Mine::load<true>(from + Mine::index(0), at.n, v);
    else Mine::load<false>(from, at.n, v);
    uint32_t key[1] = {0};
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        v[i] = magnitude_bits(v[i]) < INFINITE ? v[i] : 0.0f;
        const uint32_t one = scale_key(v[i], has_negative());
        key[0] = key[0] > one ? key[0] : one;
    }
    group_max<GROUP>(key);
    if (at.n == 0) return;

    const float signed_scale = scale_of(key[0], has_negative());
    const float scale = carries_sign() ? signed_scale : fabsf(signed_scale), inverse = reciprocal(scale);
    int32_t code[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) code[i] = encoded(v[i], inverse, place);
    if (packets) Mine::store<true>(to + Mine::index(0), at.n, code);
    else Mine::store<false>(to, at.n, code);
    if (threadIdx.x % GROUP == 0) scales[at.block] = scale;
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    const uint8_t* codes, const float* scales, int64_t rows, int64_t row_length, const float* values, int count,
    ELEMENT* out) {
    const uint32_t place = prepare(values, count);
    const Position at = mine(rows, row_length);
    if (at.n == 0) return;
    const uint8_t* from = codes + at.start;
    ELEMENT* to = out + at.start;
    const bool packets = at.n == BLOCK && Mine::aligned(from) && Mine::aligned(to);
    const float scale = scales[at.block];

    int32_t code[PER_THREAD];
    if (packets) Mine::load<true>(from + Mine::index(0), at.n, code);
    else Mine::load<false>(from, at.n, code);
    ELEMENT v[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) v[i] = narrow<ELEMENT>(decoded(code[i], place) * scale);
    if (packets) Mine::store<true>(to + Mine::index(0), at.n, v);
    else Mine::store<false>(to, at.n, v);
}
