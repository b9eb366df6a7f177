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
#include "quick_codes.h"

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

// A group of threads takes `turns` blocks, GROUPS apart. Where every block is full and aligned, it goes from one to the
// next without a division.
struct Walk {
    int64_t blocks, per_row, row_length, first;
    int whole;  // turns with a block of such a matrix
    LB_METHOD Walk(const ELEMENT* x, const uint8_t* codes, int64_t rows, int64_t row_length, int turns)
        : per_row((row_length + BLOCK - 1) / BLOCK), row_length(row_length) {
        blocks = rows * per_row;
        first = (int64_t)blockIdx.x * turns * GROUPS + threadIdx.x / GROUP;
        const int64_t left = first < blocks ? (blocks - first + GROUPS - 1) / GROUPS : 0;
        const bool full = row_length % BLOCK == 0 && Mine::aligned(x) && Mine::aligned(codes);
        whole = !full ? 0 : left < turns ? (int)left : turns;
    }
    LB_METHOD Position position(int turn) const {
        const int64_t block = first + (int64_t)turn * GROUPS;
        return block < blocks ? position_of(block, per_row, row_length) : Position{0, 0, 0};
    }
    // This thread's first element of a whole matrix.
    LB_METHOD int64_t element() const { return first * BLOCK + Mine::index(0); }
};

LB_FN void quantize_carefully(const ELEMENT* x, const Position& at, uint8_t* codes, float* scales, uint32_t place) {
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

// A block of numbers of both signs, none of which is special; otherwise false, and nothing is done.
LB_FN bool quantize_quickly(const ELEMENT* from, uint8_t* to, float* scale_to, uint32_t place) {
#if MAP == 0
    float v[PER_THREAD], scale;
    Mine::load<true>(from, BLOCK, v);
    float most = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < PER_THREAD; ++i) most = raised(most, v[i]);
    uint32_t key[1] = {(uint32_t)to_bits(most)}, word[PER_THREAD / 4];
    group_max<GROUP>(key);
    if (!encode_signed<Map>(v, from_bits((int32_t)key[0]), place, word, scale)) return false;
    Mine::store_bytes(to, word);
    if (threadIdx.x % GROUP == 0) *scale_to = scale;
    return true;
#else
    return false;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize(
    const ELEMENT* x, int64_t rows, int64_t row_length, const float* values, int count, int turns, uint8_t* codes,
    float* scales) {
    const uint32_t place = prepare(values, count);
    const Walk walk(x, codes, rows, row_length, turns);
    const ELEMENT* from = x + walk.element();
    uint8_t* to = codes + walk.element();
    float* scale_to = scales + walk.first;
    for (int turn = 0; turn < turns; ++turn) {
        const bool quick = MAP == 0 && holds_for_all(turn < walk.whole);
        if (!(quick && quantize_quickly(from, to, scale_to, place)))
            quantize_carefully(x, walk.position(turn), codes, scales, place);
        from += GROUPS * BLOCK, to += GROUPS * BLOCK, scale_to += GROUPS;
    }
}

template <bool PACKETS>
LB_FN void dequantize_block(const uint8_t* from, int n, float scale, ELEMENT* to, uint32_t place) {
    int32_t code[PER_THREAD];
    Mine::load<PACKETS>(from, n, code);
    float v[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) v[i] = decoded(code[i], place) * scale;
    Mine::store_rounded<PACKETS>(to, n, v);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    const uint8_t* codes, const float* scales, int64_t rows, int64_t row_length, const float* values, int count,
    int turns, ELEMENT* out) {
    const uint32_t place = prepare(values, count);
    const Walk walk(out, codes, rows, row_length, turns);
    const uint8_t* from = codes + walk.element();
    ELEMENT* to = out + walk.element();
    const float* scale = scales + walk.first;
    for (int turn = 0; turn < walk.whole; ++turn) {
        dequantize_block<true>(from, BLOCK, *scale, to, place);
        from += GROUPS * BLOCK, to += GROUPS * BLOCK, scale += GROUPS;
    }
    for (int turn = walk.whole; turn < turns; ++turn) {
        const Position at = walk.position(turn);
        if (at.n == 0) return;
        const uint8_t* its = codes + at.start;
        ELEMENT* there = out + at.start;
        const int first = Mine::index(0);
        if (at.n == BLOCK && Mine::aligned(its) && Mine::aligned(there))
            dequantize_block<true>(its + first, BLOCK, scales[at.block], there + first, place);
        else dequantize_block<false>(its, at.n, scales[at.block], there, place);
    }
}
