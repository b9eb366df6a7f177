// Low-bit weights are made: blocks are fitted, values become codes, codes are packed. reference/lowbit.py says what
// each step means; the fit "absmax" is equal to it to the bit.
#include "vec.h"
#include "int8_vectors.h"
#include "lowbit_fit.h"
#include "parallel.h"
#include <vector>

// ---- a row's memory

struct Row {
    std::vector<float> x, y;  // values, and in units of their block's largest; blocks padded to whole ones
    std::vector<float> absmax, scale, offset;
    std::vector<uint8_t> codes;
    bool bad;                 // has a non-finite value, which x has as zero
    explicit Row(const Rule& r)
        : x(r.blocks * r.block), y(r.block), absmax(r.blocks), scale(r.blocks), offset(r.blocks),
          codes(r.blocks * r.block + 8) {}
    void normalise(const Rule& rule, int64_t b) {  // y of block b
        const float inverse = inverse_of(rule, absmax[b]);
        for (int i = 0; i < rule.block; i += W) store(&y[i], load(&x[b * rule.block + i], W) * inverse, W);
    }
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
    for (int64_t b = 0; b < n; ++b) top = fabsf(x[b]) > top ? fabsf(x[b]) : top;
    const int32_t exponent = exponent_of(top, largest);
    const float unit = power(exponent);
    for (int64_t b = 0; b < n; ++b) {
        const float root = root_of(x[b], unit, largest);
        codes[b] = (uint8_t)(int32_t)copysignf(root, x[b]);
        x[b] = copysignf(root * root, x[b]) * unit;
    }
    return (uint8_t)exponent;
}

// ---- blocks

LB_FN I rank_of(const Rule& rule, V y) {  // the nearest value; half-way between two it is the lower one
    I rank{};
#pragma GCC unroll 16
    for (int i = 0; i < 15; ++i) rank -= (I)(y > rule.middles[i]);
    return rank;
}

struct Block {  // lowbit_fit.h says what of
    const Rule& rule;
    const Table<float, 16>& ascending;
    const float* y;  // padded with zeros to whole vectors
    int count;
    template <class F> inline __attribute__((always_inline)) void each(const F& f) const {
        int i = 0;
        for (; i + W <= count; i += W) f(load(y + i, W), W);
        if (i < count) f(load(y + i, W), count - i);
    }
    inline __attribute__((always_inline)) V nearest(V v) const { return lookup(ascending, rank_of(rule, v)); }
    inline __attribute__((always_inline)) float sum(V v) const { return sum_of(v); }
    inline __attribute__((always_inline)) bool settled(bool same) const { return same; }
};

// ---- codes and scales of a row

static void quantize_codebook(const Rule& rule, Row& row, uint8_t* scales) {
    Table<float, 16> ascending;
    Table<int32_t, 16> order;
    memcpy(&ascending, rule.ascending, sizeof ascending);
    memcpy(&order, rule.order, sizeof order);
    for (int64_t b = 0; b < rule.blocks; ++b) {
        row.scale[b] = row.absmax[b];
        if (!rule.least_squares) continue;
        row.normalise(rule, b);
        row.scale[b] *= fit_codebook(rule, Block{rule, ascending, row.y.data(), count_of(rule, b)});
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

static Line extremes(const Rule& rule, const float* y, int count) {
    float low = y[0], high = y[0];
    for (int i = 0; i < count; ++i) {
        low = y[i] < low ? y[i] : low;
        high = y[i] > high ? y[i] : high;
    }
    return line_through(rule, low, high);
}

static void quantize_affine(const Rule& rule, Row& row, uint8_t* scales) {
    const Table<float, 16> none{};
    const int64_t n = rule.blocks;
    for (int64_t b = 0; b < n; ++b) {
        row.normalise(rule, b);
        const int count = count_of(rule, b);
        Line line = extremes(rule, row.y.data(), count);
        if (rule.least_squares) line = fit_affine(rule, Block{rule, none, row.y.data(), count}, line);
        row.scale[b] = line.scale * row.absmax[b];
        row.offset[b] = line.offset * row.absmax[b];
    }
    scales[0] = encode_squares(row.scale.data(), n, SCALE_SQUARE, scales + 2);
    for (int64_t b = 0; rule.least_squares && b < n; ++b) {  // the best one for the scale that is kept
        const Block block{rule, none, &row.x[b * rule.block], count_of(rule, b)};
        row.offset[b] = refit_offset(rule, block, {row.scale[b], row.offset[b]});
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
