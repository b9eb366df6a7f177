// Encode and decode of the 8-bit dynamic maps: the maths of formats.py, once for every compiled backend.
//
// V is a float or a vector of floats, I the int32 of the same width. C is DynamicSignedConstants or
// DynamicUnsignedConstants, generated from formats.py. The includer's shim defines LB_FN (function qualifiers) and, for
// its V and I:
//   splat<V>(float), splat<I>(int), to_float(I), to_int(V) (towards zero), to_bits(V), from_bits(I), absolute(V),
//   minimum(V, V), maximum(V, V), maximum(I, I), where(mask, a, b)
//   decode_line<C>(V n, V& slope, V& offset): line k = floor(log2 n) - C::first_exponent, 0 to 8
//   encode_line<C>(V magnitude, V& slope, V& offset, V& limit): line d = the number of thresholds below it, 0 to 7
// Every operation is rounded by itself, in this order, as in reference.py.
#pragma once

// The constants of the map of a state that can be negative, or cannot.
template <bool NON_NEGATIVE> struct MapOf { typedef DynamicSignedConstants Constants; };
template <> struct MapOf<true> { typedef DynamicUnsignedConstants Constants; };

template <class C, class V, class I> LB_FN V decode(I code) {
    V slope, offset;
    if (C::is_signed) {
        const V distance = to_float(code - 127);
        const V n = absolute(distance) + 0.5f;
        decode_line<C>(n, slope, offset);
        return from_bits(to_bits(n * slope + offset) ^ (to_bits(distance) & (int32_t)0x80000000));
    }
    const V n = to_float(code + 1);
    decode_line<C>(n, slope, offset);
    return n * slope + offset;
}

// The code of x in a block whose scale's reciprocal is `inverse`.
template <class C, class V, class I> LB_FN I encode(V x, float inverse) {
    V slope, offset, limit;
    const V y = x * inverse;
    const V magnitude = C::is_signed ? absolute(y) : maximum(y, splat<V>(C::low));
    encode_line<C>(magnitude, slope, offset, limit);
    I f = to_int(minimum(magnitude * slope + offset, limit));
    if (C::is_signed) {
        const I sign = to_bits(y) >> 31;
        f = where(magnitude > C::low, f, splat<I>(0));
        return maximum(127 + ((f ^ sign) - sign), splat<I>(0));  // there is no -1.0: its neighbour is the nearest
    }
    return where(x > 0.0f, f - 1, splat<I>(0));
}
