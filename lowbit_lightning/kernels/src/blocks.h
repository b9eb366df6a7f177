// One block of the CPU backend: its scale and its codes, from values in a buffer that is padded with zeros to a multiple of W.
#pragma once
#include "dynamic_tables.h"  // generated from formats.py
#include "dynamic_map.h"

constexpr float SMALLEST_SCALE = 0x1p-126f;
constexpr int32_t INFINITY_BITS = 0x7f800000;

LB_FN float not_too_small(float scale) {
    if (scale == 0.0f) return 0.0f;
    return fabsf(scale) >= SMALLEST_SCALE ? scale : copysignf(SMALLEST_SCALE, scale);
}
LB_FN float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// The constants of the map of a state that can be negative, or cannot.
template <bool NON_NEGATIVE> struct MapOf { typedef DynamicSignedConstants Constants; };
template <> struct MapOf<true> { typedef DynamicUnsignedConstants Constants; };

// What a pass over a block's values collects for its scale.
struct Extremes {
    V high{};  // of the values, never below 0
    I top{};   // of the magnitudes' bits: at least INFINITY_BITS if any is not finite
    void see(V x) {
        top = maximum(top, to_bits(absolute(x)));
        high = maximum(x, high);
    }
    bool finite() const { return highest(top) < INFINITY_BITS; }
    // Signed: the value of largest magnitude, positive on a tie. Unsigned: the largest value.
    float scale(bool is_signed) const {
        const float high_value = highest(high);
        if (!is_signed) return not_too_small(high_value);
        const int32_t bits = highest(top);
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return not_too_small(high_value == magnitude ? high_value : -magnitude);
    }
};

template <class C> LB_FN void encode_block(const float* values, int n, float scale, uint8_t* codes) {
    const float inverse = reciprocal(scale);
    int i = 0;
    for (; i + W <= n; i += W) store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), W);
    if (i < n) store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), n - i);
}
