// The 24-bit master copy of a bfloat16 parameter, as in reference/step.py, once for every compiled backend: the
// parameter has the upper 16 bits of a float, rounded to nearest, and an int8 remainder the rest. U is uint32_t or a
// vector of them.
#pragma once

template <class U> struct Master { U upper, remainder; };  // the parameter's bits, and an int8 in the low byte

// Of the bits of a finite float: rounded to 24 bits, ties to even.
template <class U> LB_FN Master<U> split_master(U bits) {
    const U master = (bits + 0x7f + ((bits >> 8) & 1)) >> 8, upper = (master + 0x80) >> 8;
    return {upper & 0xffff, (master - (upper << 8)) & 0xff};
}
// The bits of the float; `remainder` with its sign.
template <class U> LB_FN U join_master(U upper, U remainder) { return (upper << 16) + (remainder << 8); }
