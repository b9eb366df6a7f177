// One block of the CPU backend: its scale and its codes, from values in a buffer that is padded with zeros to a
// multiple of W.
#pragma once
#include "dynamic_tables.h"  // generated from formats.py
#include "dynamic_map.h"

constexpr float SMALLEST_SCALE = 0x1p-126f;
constexpr uint32_t INFINITY_BITS = 0x7f800000;

LB_FN float not_too_small(float scale) {
    if (scale == 0.0f) return 0.0f;
    return fabsf(scale) >= SMALLEST_SCALE ? scale : copysignf(SMALLEST_SCALE, scale);
}
LB_FN float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// The constants of the map of a state that can be negative, or cannot.
template <bool NON_NEGATIVE> struct MapOf { typedef DynamicSignedConstants Constants; };
template <> struct MapOf<true> { typedef DynamicUnsignedConstants Constants; };

// What a pass over a block's values collects for its scale. NON_NEGATIVE: no value is below zero (but a NaN may be
// any).
struct Extremes {
    V high{};  // of the values, never below 0; only where they can be negative
    I top{};   // of the magnitudes' bits, unsigned: at least INFINITY_BITS if any is not finite
    template <bool NON_NEGATIVE> void see(V x) {
        top = unsigned_maximum(top, NON_NEGATIVE ? to_bits(x) : to_bits(absolute(x)));
        if (!NON_NEGATIVE) high = maximum(x, high);
    }
    bool finite() const { return highest_unsigned(top) < INFINITY_BITS; }
    // The value of largest magnitude, positive on a tie.
    template <bool NON_NEGATIVE> float scale() const {
        const uint32_t bits = highest_unsigned(top);
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return not_too_small(NON_NEGATIVE || highest(high) == magnitude ? magnitude : -magnitude);
    }
};

template <class C> LB_FN void encode_block(const float* values, int n, float scale, uint8_t* codes) {
    const float inverse = reciprocal(scale);
    int i = 0;
    for (; i + W <= n; i += W) store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), W);
    if (i < n) store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), n - i);
}
