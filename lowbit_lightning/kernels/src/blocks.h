// One block of the CPU backend: its scale and its codes, from values in a buffer that is padded with zeros to a
// multiple of W.
#pragma once
#include "dynamic_tables.h"  // generated from formats/maps.py
#include "dynamic_map.h"
#include "scale.h"

// What a pass over a block's values collects for its scale: maxima of their bits. NON_NEGATIVE: no value is below zero
// (but a NaN may be any).
struct Extremes {
    I top{};   // as unsigned numbers: of values below zero, if any, the one of largest magnitude, else the largest
    I high{};  // as signed numbers, never below 0: the largest value; only where they can be negative
    template <bool NON_NEGATIVE> void see(V x) {
        top = unsigned_maximum(top, to_bits(x));
        if (!NON_NEGATIVE) high = maximum(high, to_bits(x));
    }
    template <bool NON_NEGATIVE> bool finite() const {
        const uint32_t extreme = highest_unsigned(top);
        return NON_NEGATIVE ? extreme < INFINITE : (extreme & ~SIGN) < INFINITE && highest_unsigned(high) < INFINITE;
    }
    // The value of largest magnitude, positive on a tie.
    template <bool NON_NEGATIVE> float scale() const {
        const uint32_t extreme = highest_unsigned(top), positive = highest_unsigned(high);
        const bool negative = !NON_NEGATIVE && extreme > SIGN && (extreme & ~SIGN) > positive;
        const uint32_t bits = NON_NEGATIVE || negative ? extreme : positive;
        float value;
        memcpy(&value, &bits, 4);
        return not_too_small(value);
    }

  private:
    static constexpr uint32_t SIGN = 0x80000000u;
};

// The codes of four vectors: encode, but for the steps that can be taken on bytes.
template <class C> LB_FN ManyBytes encode_many(const V* x, float inverse) {
    I f[4];
#if LB_AVX512_BW
    for (int j = 0; j < 4; ++j) f[j] = encode_bits<C, V, I>(x[j] * inverse);
    const __m512i byte = (__m512i)low_bytes(f), bias = _mm512_set1_epi8((char)C::bias);
    if (!C::is_signed) return (ManyBytes)_mm512_maskz_add_epi8(above_zero(x), byte, bias);
    const __mmask64 negative = inverse < 0 ? ~below_zero(x) : below_zero(x);  // of zeros either
    return (ManyBytes)_mm512_mask_subs_epu8(_mm512_add_epi8(byte, bias), negative, bias, byte);
#else
    for (int j = 0; j < 4; ++j) f[j] = encode<C, V, I>(x[j], inverse);
    return low_bytes(f);
#endif
}

template <class C> LB_FN void encode_block(const float* values, int n, float scale, uint8_t* codes) {
    const float inverse = reciprocal(scale);
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        V x[4];
        for (int j = 0; j < 4; ++j) x[j] = load(values + i + j * W, W);
        const ManyBytes many = encode_many<C>(x, inverse);
        memcpy(codes + i, &many, sizeof many);
    }
    for (; i < n; i += W) {
        const int count = i + W <= n ? W : n - i;
        store_codes(codes + i, encode<C, V, I>(load(values + i, W), inverse), count);
    }
}
