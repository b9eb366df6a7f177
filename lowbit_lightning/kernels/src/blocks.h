// One block of the CPU backend: its scale and its codes, from values in a buffer that is padded with zeros to a
// multiple of W.
#pragma once
#include "dynamic_tables.h"  // generated from formats.py
#include "dynamic_map.h"
#include "scale.h"

// What a pass over a block's values collects for its scale. NON_NEGATIVE: no value is below zero (but a NaN may be
// any).
struct Extremes {
    V high{};  // of the values, never below 0; only where they can be negative
    I top{};   // of the magnitudes' bits, unsigned: at least INFINITE if any is not finite
    template <bool NON_NEGATIVE> void see(V x) {
        top = unsigned_maximum(top, NON_NEGATIVE ? to_bits(x) : to_bits(absolute(x)));
        if (!NON_NEGATIVE) high = maximum(x, high);
    }
    bool finite() const { return highest_unsigned(top) < INFINITE; }
    // The value of largest magnitude, positive on a tie.
    template <bool NON_NEGATIVE> float scale() const {
        const uint32_t bits = highest_unsigned(top);
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return not_too_small(NON_NEGATIVE || highest(high) == magnitude ? magnitude : -magnitude);
    }
};

// `ahead(i)` is called for every vector of the block but a few: the place to fetch memory that is needed next.
template <class C, class F>
LB_FN void encode_block(const float* values, int n, float scale, uint8_t* codes, const F& ahead) {
    const float inverse = reciprocal(scale);
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        I number[4];
        for (int j = 0; j < 4; ++j) {
            ahead(i + j * W);
            number[j] = encode_number<C, V, I>(load(values + i + j * W, W), inverse);
        }
        const ManyBytes packed = pack(number, C::bias);
        memcpy(codes + i, &packed, sizeof packed);
    }
    for (; i < n; i += W) {
        const int count = i + W <= n ? W : n - i;
        store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), count);
    }
}
