// Encode and decode of the 8-bit dynamic maps: the maths of formats/maps.py, once for every compiled backend.
//
// V is a float or a vector of floats, I the int32 of the same width. C is DynamicSignedConstants or
// DynamicUnsignedConstants, generated from maps.py. The includer's shim defines LB_FN (function qualifiers) and, for
// its V and I:
//   fused(V a, V b, V c) (a * b + c, rounded once), splat<V>(float), splat<I>(int), to_bits(V), from_bits(I),
//   minimum(V, V), maximum(V, V), maximum(I, I), where(mask, a, b), magnitude_from(V x, float low) (the larger of |x|
//   and low)
//   decode_line<C>(V n, V& slope, V& offset, Place...): the line of f = |n| / 4, with a quarter of its slope; its
//     number is the low four bits of n's exponent field
//   encode_line<C>(V magnitude, V& slope, I& shift, Place...): the line whose number is how many thresholds are below
// Place: where a backend has its tables, if it asks.
// Every operation, `fused` as one, is rounded by itself, in this order, as in the reference.
#pragma once

// The constants of the map of a state that can be negative, or cannot.
template <bool NON_NEGATIVE> struct MapOf { typedef DynamicSignedConstants Constants; };
template <> struct MapOf<true> { typedef DynamicUnsignedConstants Constants; };

constexpr int32_t SIGN_BIT = (int32_t)0x80000000, BITS_OF_2_25 = 0x4c000000;

// `counted`: code | BITS_OF_2_25, the bits of 2^25 + 4 code, since a float of 2^25 counts in fours.
template <class C, class V, class I, class... Place> LB_FN V decode(I counted, Place... place) {
    const V n = from_bits(counted) - (0x1p25f + 4 * C::bias);
    V slope, offset;
    decode_line<C>(n, slope, offset, place...);
    return fused(n, slope, C::is_signed ? from_bits(to_bits(offset) ^ (to_bits(n) & SIGN_BIT)) : offset);
}

// The code's f (see maps.py) of y, a value divided by its block's scale: in the low byte, other bits above. It is 0
// for f = 256.
template <class C, class V, class I, class... Place> LB_FN I encode_bits(V y, Place... place) {
    const V magnitude = C::is_signed ? magnitude_from(y, C::low) : maximum(y, splat<V>(C::low));
    V slope;
    I shift;
    encode_line<C>(magnitude, slope, shift, place...);
    const V u = fused(magnitude, slope, splat<V>(C::encode_offset));
    return to_bits(minimum(u, splat<V>(C::encode_top))) >> shift;
}
// The code of x in a block whose scale's reciprocal is `inverse`. There is no -1.0: its neighbour is the nearest.
template <class C, class V, class I, class... Place> LB_FN I encode(V x, float inverse, Place... place) {
    const V y = x * inverse;
    const I f = encode_bits<C, V, I>(y, place...) & 255;
    if (C::is_signed) return maximum(where(y < 0.0f, -f, f) + C::bias, splat<I>(0));
    return where(x > 0.0f, (f + C::bias) & 255, splat<I>(0));
}
