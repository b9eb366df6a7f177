// Low-bit weights are made: blocks are fitted, values become codes, codes are packed. reference/lowbit.py says what
// each step means; the fit "absmax" is equal to it to the bit.
#include "vec.h"
#include "int8_vectors.h"
#include "parallel.h"
#include <vector>

struct Rule {  // _Rule in cpu/lowbit.py
    int64_t length, block, blocks, packed_stride, scales_stride;  // of a row; strides in bytes
    int32_t bits, affine, square, least_squares, signs;
    int32_t starts, codebook_rounds, affine_rounds;
    float start[8];
    float smallest_divisor;
    float ascending[16], middles[16];  // the codebook's values, and what lies half-way between them
    int32_t order[16];                 // their codes
};
constexpr float SCALE_SQUARE = 255 * 255, OFFSET_SQUARE = 127 * 127;
constexpr uint8_t NAN_EXPONENT = 255;

LB_FN float magnitude(float x) { return __builtin_fabsf(x); }
LB_FN float inverse_of(const Rule& rule, float scale) {
    const float size = magnitude(scale);
    return 1.0f / __builtin_copysignf(size < rule.smallest_divisor ? rule.smallest_divisor : size, scale);
}
LB_FN float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// ---- a row's memory

struct Row {
    std::vector<float> x, y;  // values, and in units of their block's largest; blocks padded to whole ones
    std::vector<float> absmax, scale, offset;
    std::vector<uint8_t> codes;
    bool bad;                 // has a non-finite value, which x has as zero
    explicit Row(const Rule& r)
        : x(r.blocks * r.block), y(r.block), absmax(r.blocks), scale(r.blocks), offset(r.blocks),
          codes(r.blocks * r.block + 8) {}
};
LB_FN int count_of(const Rule& rule, int64_t b) {
    const int64_t left = rule.length - b * rule.block;
    return (int)(left < rule.block ? left : rule.block);
}
// Block b of a row: values, the largest magnitude, whether all are finite.
template <class T> static bool gather(const Rule& rule, const T* from, int64_t b, Row& row) {
    const int count = count_of(rule, b);
    float* x = &row.x[b * rule.block];
    I top{};
    V largest{};
    for (int i = 0; i < count; i += W) {
        V v = load(from + b * rule.block + i, count - i < W ? count - i : W);
        const I bits = to_bits(absolute(v));
        top = maximum(top, bits);
        v = where(bits < 0x7f800000, v, V{});
        largest = maximum(largest, absolute(v));
        store(x + i, v, W);
    }
    for (int i = (count + W - 1) / W * W; i < rule.block; ++i) x[i] = 0;
    float absmax = 0;
    for (int l = 0; l < W; ++l) absmax = largest[l] > absmax ? largest[l] : absmax;
    row.absmax[b] = absmax;
    return highest_unsigned(top) < 0x7f800000;
}

// ---- scales in 8 bits

// The exponent and the codes of n values, which become what their codes stand for.
static uint8_t encode_squares(float* x, int64_t n, float largest, uint8_t* codes) {
    float top = 0;
    for (int64_t b = 0; b < n; ++b) top = magnitude(x[b]) > top ? magnitude(x[b]) : top;
    const float ratio = top / largest;
    int32_t bits;
    memcpy(&bits, &ratio, 4);
    int32_t exponent = (bits + 0x7fffff) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 254 ? 254 : exponent;
    const float unit = as_float((uint32_t)exponent << 23), limit = largest == SCALE_SQUARE ? 255 : 127;
    for (int64_t b = 0; b < n; ++b) {
        float root = __builtin_nearbyintf(__builtin_sqrtf(magnitude(x[b]) / unit));
        root = root > limit ? limit : root;
        codes[b] = (uint8_t)(int32_t)__builtin_copysignf(root, x[b]);
        x[b] = __builtin_copysignf(root * root, x[b]) * unit;
    }
    return (uint8_t)exponent;
}

// ---- codebooks

LB_FN I rank_of(const Rule& rule, V y) {  // the nearest value; half-way between two it is the lower one
    I rank{};
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) rank -= (I)(y > rule.middles[i]);
    return rank;
}

// The scale of least squared error that is found, of values y in [-1, 1].
static float fit_codebook(const Rule& rule, const Table<float, 16>& ascending, const float* y, int count) {
    float best = 1, gain = -1;
    for (int start = 0; start < rule.starts * rule.signs; ++start) {
        float scale = rule.start[start / rule.signs] * (start % rule.signs ? -1 : 1);
        for (int round = 0; round < rule.codebook_rounds; ++round) {
            const float inverse = inverse_of(rule, scale);
            V products{}, squares{};
            for (int i = 0; i < count; i += W) {  // y is zero after the end, and so is its code's value
                const V v = load(y + i, W), c = lookup(ascending, rank_of(rule, v * inverse));
                products = fused(v, c, products);
                squares = fused(c, c, squares);
            }
            const float yc = sum_of(products), cc = sum_of(squares);
            if (!(cc > 0)) break;
            scale = yc / cc;
            if (yc * scale > gain) best = scale, gain = yc * scale;
        }
    }
    return best;
}

static void quantize_codebook(const Rule& rule, Row& row, uint8_t* scales) {
    Table<float, 16> ascending;
    Table<int32_t, 16> order;
    memcpy(&ascending, rule.ascending, sizeof ascending);
    memcpy(&order, rule.order, sizeof order);
    for (int64_t b = 0; b < rule.blocks; ++b) {
        row.scale[b] = row.absmax[b];
        if (!rule.least_squares) continue;
        const float inverse = inverse_of(rule, row.absmax[b]);
        for (int i = 0; i < rule.block; i += W)
            store(&row.y[i], load(&row.x[b * rule.block + i], W) * inverse, W);
        row.scale[b] *= fit_codebook(rule, ascending, row.y.data(), count_of(rule, b));
    }
    if (rule.square) {
        std::vector<float> kept = row.scale;
        scales[0] = encode_squares(kept.data(), rule.blocks, SCALE_SQUARE, scales + 1);
        if (rule.least_squares) row.scale = kept;
    } else {
        memcpy(scales, row.scale.data(), rule.blocks * sizeof(float));
    }
    for (int64_t b = 0; b < rule.blocks; ++b) {
        const float inverse = inverse_of(rule, row.scale[b]);
        for (int64_t i = b * rule.block; i < b * rule.block + count_of(rule, b); i += W)
            store_codes(&row.codes[i], lookup(order, rank_of(rule, load(&row.x[i], W) * inverse)), W);
    }
}

// ---- affine formats

struct Line { float scale, offset; };

LB_FN float half_of(const Rule& rule) { return ((1 << rule.bits) - 1) * 0.5f; }
LB_FN V levels(const Rule& rule, V x, Line line) {  // codes as floats
    const float inverse = line.scale < rule.smallest_divisor ? 0 : 1 / line.scale, half = half_of(rule);
    const V t = (x - line.offset) * inverse + half;
    return to_float(to_nearest(minimum(maximum(t, V{}), splat<V>(2 * half))));
}
// The sum of f(i, width) over the vectors of a block; f's lanes after the end do not count.
template <class F> LB_FN V sum_over(int count, const F& f) {
    V sum{};
    int i = 0;
    for (; i + W <= count; i += W) sum = sum + f(i);
    return i < count ? sum + first_lanes(f(i), count - i) : sum;
}

static Line extremes(const Rule& rule, const float* y, int count) {
    float low = y[0], high = y[0];
    for (int i = 0; i < count; ++i) {
        low = y[i] < low ? y[i] : low;
        high = y[i] > high ? y[i] : high;
    }
    return {(high - low) * (1.0f / (2 * half_of(rule))), (high + low) * 0.5f};
}

// The line of least squared error that is found: the regression of y on the levels of the nearest codes.
static Line fit_affine(const Rule& rule, const float* y, int count) {
    const Line widest = extremes(rule, y, count);
    const float mean = sum_of(sum_over(count, [&](int i) { return load(y + i, W); })) / count, half = half_of(rule);
    Line best = widest;
    float gain = -1;
    for (int start = 0; start < rule.starts; ++start) {
        const float part = rule.start[start];
        Line line{widest.scale * part, widest.offset * part + mean * (1 - part)};
        for (int round = 0; round < rule.affine_rounds; ++round) {
            V sums{}, squares{}, products{};  // of t, t * t, t * (y - mean)
            const auto add = [&](int i, int width) __attribute__((always_inline)) {
                const V v = load(y + i, W), t = first_lanes(levels(rule, v, line) - half, width);
                sums = sums + t;
                squares = fused(t, t, squares);
                products = fused(t, v - mean, products);
            };
            int i = 0;
            for (; i + W <= count; i += W) add(i, W);
            if (i < count) add(i, count - i);
            const float t_mean = sum_of(sums) / count, covariance = sum_of(products);
            const float variance = sum_of(squares) - t_mean * t_mean * count;
            if (!(variance > 0)) break;
            const float scale = covariance / variance;
            const bool same = scale == line.scale && mean - scale * t_mean == line.offset;
            line = {scale, mean - scale * t_mean};
            if (covariance * scale > gain) best = line, gain = covariance * scale;
            if (same) break;  // and so would be every further round
        }
    }
    return best;
}

static void quantize_affine(const Rule& rule, Row& row, uint8_t* scales) {
    const int64_t n = rule.blocks;
    for (int64_t b = 0; b < n; ++b) {
        const float inverse = inverse_of(rule, row.absmax[b]);
        for (int i = 0; i < rule.block; i += W)
            store(&row.y[i], load(&row.x[b * rule.block + i], W) * inverse, W);
        const int count = count_of(rule, b);
        const Line line =
            rule.least_squares ? fit_affine(rule, row.y.data(), count) : extremes(rule, row.y.data(), count);
        row.scale[b] = line.scale * row.absmax[b];
        row.offset[b] = line.offset * row.absmax[b];
    }
    scales[0] = encode_squares(row.scale.data(), n, SCALE_SQUARE, scales + 2);
    for (int64_t b = 0; rule.least_squares && b < n; ++b) {  // the best one for the scale that is kept
        const float* x = &row.x[b * rule.block];
        const Line line{row.scale[b], row.offset[b]};
        const int count = count_of(rule, b);
        const float half = half_of(rule);
        const V t = sum_over(count, [&](int i) { return levels(rule, load(x + i, W), line) - half; });
        const V values = sum_over(count, [&](int i) { return load(x + i, W) * (1.0f / count); });
        row.offset[b] = sum_of(values) - line.scale * (sum_of(t) / count);
    }
    scales[1] = encode_squares(row.offset.data(), n, OFFSET_SQUARE, scales + 2 + n);
    for (int64_t b = 0; b < n; ++b)
        for (int64_t i = b * rule.block; i < b * rule.block + count_of(rule, b); i += W)
            store_raw(&row.codes[i],
                      narrow_to_bytes(to_int(levels(rule, load(&row.x[i], W), {row.scale[b], row.offset[b]}))), W);
}

// ---- codes in bytes: the first is in a byte's highest bits; there are zeros after the row's end

template <int EACH, class F> static void pack(int64_t length, uint8_t* to, const F& code) {
    constexpr int COUNT = 8 / EACH;
    for (int64_t i = 0; i < (length + COUNT - 1) / COUNT; ++i) {
        int byte = 0;
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j) byte = byte << EACH | code(i * COUNT + j);
        to[i] = (uint8_t)byte;
    }
}
static void pack_row(const Rule& rule, Row& row, uint8_t* to) {
    const uint8_t* codes = row.codes.data();
    for (int64_t i = rule.length; i < rule.length + 8; ++i) row.codes[i] = 0;
    if (rule.bits == 4) return pack<4>(rule.length, to, [=](int64_t i) { return codes[i]; });
    pack<2>(rule.length, to, [=](int64_t i) { return codes[i] & 3; });
    if (rule.bits == 3)
        pack<1>(rule.length, to + (rule.length + 3) / 4, [=](int64_t i) { return codes[i] >> 2; });
}

// ---- rows

template <class T> static void quantize(const Rule& rule, const T* weight, int64_t rows, uint8_t* packed,
                                        uint8_t* scales, int threads) {
    constexpr int64_t STEP = 4;
    parallel_for((rows + STEP - 1) / STEP, threads, [&](int64_t task) {
        Row row(rule);
        for (int64_t r = task * STEP; r < rows && r < (task + 1) * STEP; ++r) {
            uint8_t* scales_of_row = scales + r * rule.scales_stride;
            std::vector<int64_t> bad;
            for (int64_t b = 0; b < rule.blocks; ++b)
                if (!gather(rule, weight + r * rule.length, b, row)) bad.push_back(b);
            if (rule.affine) quantize_affine(rule, row, scales_of_row);
            else quantize_codebook(rule, row, scales_of_row);
            for (const int64_t b : bad) {
                if (rule.square) {
                    memset(scales_of_row, 0, rule.scales_stride);
                    memset(scales_of_row, NAN_EXPONENT, rule.affine ? 2 : 1);
                    break;
                }
                const float nan = __builtin_nanf("");
                memcpy(scales_of_row + 4 * b, &nan, 4);
                memset(&row.codes[b * rule.block], 0, count_of(rule, b));
            }
            pack_row(rule, row, packed + r * rule.packed_stride);
        }
    });
}

// dtype: 0 float32, 1 float16, 2 bfloat16.
extern "C" void lb_lowbit_quantize(const Rule* rule, const void* weight, int dtype, int64_t rows, uint8_t* packed,
                                   uint8_t* scales, int threads) {
    if (dtype == 0) quantize(*rule, (const float*)weight, rows, packed, scales, threads);
    else if (dtype == 1) quantize(*rule, (const Half*)weight, rows, packed, scales, threads);
    else quantize(*rule, (const BFloat16*)weight, rows, packed, scales, threads);
}
