// How a block of a low-bit weight is fitted, once for every compiled backend; reference/lowbit.py says what each step
// means. The includer brings V (a vector of floats, or one float of one GPU thread), and blocks as
//
//     struct Block {
//         int count;                     // elements that exist
//         void each(f);                  // f(V values, int existing) for all vectors; the first lanes exist
//         float sum(V v);                // over the block
//         V nearest(V y);                // the values of the nearest codes
//         bool settled(bool same);       // whether further rounds may be left out when `same`
//     };
#pragma once
#include "lowbit_scales.h"

struct Rule {  // FitRule in structs.py
    int64_t length, block, blocks, packed_stride, scales_stride;  // of a row; strides in bytes
    int32_t bits, affine, square, least_squares, signs;
    int32_t starts, codebook_rounds, affine_rounds;
    float start[8];
    float smallest_divisor;
    float ascending[16], middles[16];  // the codebook's values, and what lies half-way between them
    int32_t order[16];                 // their codes
};

LB_FN float inverse_of(const Rule& rule, float scale) {
    const float size = fabsf(scale);
    return 1.0f / copysignf(size < rule.smallest_divisor ? rule.smallest_divisor : size, scale);
}

// ---- codebooks

// The scale of least squared error that is found, of values in [-1, 1], zero where they do not exist.
template <class Block> LB_FN float fit_codebook(const Rule& rule, const Block& block) {
    float best = 1, gain = -1;
    for (int start = 0; start < rule.starts * rule.signs; ++start) {
        float scale = rule.start[start / rule.signs] * (start % rule.signs ? -1 : 1);
        for (int round = 0; round < rule.codebook_rounds; ++round) {
            const float inverse = inverse_of(rule, scale);
            V products{}, squares{};
            block.each([&](V v, int) LB_LAMBDA {
                const V c = block.nearest(v * inverse);
                products = fused(v, c, products);
                squares = fused(c, c, squares);
            });
            const float yc = block.sum(products), cc = block.sum(squares);
            if (cc > 0) scale = yc / cc;
            if (cc > 0 && yc * scale > gain) best = scale, gain = yc * scale;
        }
    }
    return best;
}

// ---- affine formats

struct Line { float scale, offset; };

LB_FN float half_of(const Rule& rule) { return ((1 << rule.bits) - 1) * 0.5f; }
LB_FN V levels(const Rule& rule, V x, Line line) {  // codes as floats
    const float inverse = line.scale < rule.smallest_divisor ? 0 : 1 / line.scale, half = half_of(rule);
    const V t = (x - line.offset) * inverse + half;
    return to_float(to_nearest(minimum(maximum(t, V{}), splat<V>(2 * half))));
}
LB_FN Line line_through(const Rule& rule, float low, float high) {
    return {(high - low) * (1.0f / (2 * half_of(rule))), (high + low) * 0.5f};
}

// The line of least squared error that is found: the regression of y on the levels of the nearest codes.
template <class Block> LB_FN Line fit_affine(const Rule& rule, const Block& block, Line widest) {
    V values{};
    block.each([&](V v, int existing) LB_LAMBDA { values = values + first_lanes(v, existing); });
    const float mean = block.sum(values) / block.count, half = half_of(rule);
    Line best = widest;
    float gain = -1;
    for (int start = 0; start < rule.starts; ++start) {
        const float part = rule.start[start];
        Line line{widest.scale * part, widest.offset * part + mean * (1 - part)};
        for (int round = 0; round < rule.affine_rounds; ++round) {
            V sums{}, squares{}, products{};  // of t, t * t, t * (y - mean)
            block.each([&](V v, int existing) LB_LAMBDA {
                const V t = first_lanes(levels(rule, v, line) - half, existing);
                sums = sums + t;
                squares = fused(t, t, squares);
                products = fused(t, v - mean, products);
            });
            const float t_mean = block.sum(sums) / block.count, covariance = block.sum(products);
            const float variance = block.sum(squares) - t_mean * t_mean * block.count;
            const float scale = variance > 0 ? covariance / variance : line.scale;
            const Line next{scale, mean - scale * t_mean};
            const bool same = next.scale == line.scale && next.offset == line.offset;
            line = next;
            if (variance > 0 && covariance * scale > gain) best = line, gain = covariance * scale;
            if (block.settled(same)) break;  // and so would be every further round
        }
    }
    return best;
}

// The best offset for a scale and the codes that both give now.
template <class Block> LB_FN float refit_offset(const Rule& rule, const Block& block, Line line) {
    const float half = half_of(rule), share = 1.0f / block.count;
    V t{}, values{};
    block.each([&](V v, int existing) LB_LAMBDA {
        t = t + first_lanes(levels(rule, v, line) - half, existing);
        values = values + first_lanes(v * share, existing);
    });
    return block.sum(values) - line.scale * (block.sum(t) / block.count);
}
