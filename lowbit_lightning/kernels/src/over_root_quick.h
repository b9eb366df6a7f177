// over_root.h's maths on a GPU in 13 instructions and no branch: correctly rounded roots and quotients from the
// hardware's approximations, if all numbers lie in a range where no step overflows or becomes subnormal. Whether they
// do is asked once, after all elements of a thread: `sure`. If not, everything is done again with Exact.
//
// In the range, and with approximations as PTX promises them (1 ulp for rcp.approx, 2^-22.9 for rsqrt.approx), one step
// of Newton's method rounds every root correctly, two every reciprocal; one for the reciprocal and two corrections of
// the quotient every quotient.
// tests/kernels/test_quick_step.py proves it for all numbers
// (but three, of which CUDA's own functions, made of the same instructions, are the proof).
#pragma once
#include "over_root.h"

constexpr uint32_t LOWEST_SQUARE = 0x0d000000, HIGHEST_SQUARE = 0x5d800000;  // bits of 2^-101 and 2^60

// What a non-negative number says about a packet: the largest key decides. Of a number that is too small, below zero,
// too large or NaN it is too large.
LB_FN uint32_t square_key(float x) { return (uint32_t)to_bits(x) - LOWEST_SQUARE; }
LB_FN bool square_in_range(uint32_t key) { return key <= HIGHEST_SQUARE - LOWEST_SQUARE; }

// From an approximation of 1 / sqrt(x), of 1 / b. A reciprocal's first improvement is not always the nearest number.
LB_FN float nearest_root(float x, float inverse) {
    const float root = x * inverse;
    return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
}
LB_FN float improved_reciprocal(float b, float inverse) { return fmaf(fmaf(-b, inverse, 1.0f), inverse, inverse); }
LB_FN float nearest_reciprocal(float b, float inverse) {
    return improved_reciprocal(b, improved_reciprocal(b, inverse));
}
LB_FN float nearest_quotient(float a, float b, float inverse) {
    const float improved = improved_reciprocal(b, inverse), first = a * improved;
    const float second = fmaf(fmaf(-b, first, a), improved, first);
    return fmaf(fmaf(-b, second, a), improved, second);
}

LB_FN float quick_root(float x) { return nearest_root(x, approximate_inverse_root(x)); }
LB_FN float quick_reciprocal(float b) { return nearest_reciprocal(b, approximate_reciprocal(b)); }
LB_FN float quick_quotient(float a, float b) { return nearest_quotient(a, b, approximate_reciprocal(b)); }

struct Quick {
    uint32_t key = 0;  // of the squares
    uint32_t wrong = 0;  // bits 29 and 30: of quotients that are not in [2^-63, 2)

    LB_METHOD static bool allows(float c, float eps) {
        return eps >= 0x1p-38f && eps <= 0x1p20f && c >= 0.0f && c <= 0x1p20f;
    }

    LB_METHOD float over(float f, float a, float x, float c, float eps) {
        const uint32_t one = square_key(x);
        key = key > one ? key : one;
        const float quotient = quick_quotient(f * a, quick_root(x) * c + eps);
        wrong |= (uint32_t)to_bits(quotient) ^ 0x20000000u;
        return quotient;
    }
    LB_METHOD bool sure() const { return square_in_range(key) && (wrong & 0x60000000u) == 0; }
};
