// What both backends know of the Hadamard rotation, which the reference defines: the signs, the factors, and how a
// segment of up to 64 elements is cut into blocks of powers of two, the largest first. After vec.h or gpu.h.
#pragma once

constexpr int SEGMENT = 64;

// The block that position i of a segment of `length` elements belongs to: its size, a power of two.
LB_FN int block_of(int i, int length) {
    int size = SEGMENT;
    while (i >= (length & -size)) size /= 2;
    return size;
}
// Whether the sign of position i is negative: bits 0, 2 and 4 and the ones above them, multiplied and added.
LB_FN bool is_negative(int i) {
    const int pairs = i & i >> 1;
    return (pairs ^ pairs >> 2 ^ pairs >> 4) & 1;
}
// 1 / sqrt(size), with the sign of position i
LB_FN float factor_of(int i, int size) {
    const float even = size == 64 ? 0.125f : size == 16 ? 0.25f : size == 4 ? 0.5f : 1.0f;
    const float odd = size == 32 ? 0.17677669529663687f : size == 8 ? 0.35355339059327373f : 0.70710678118654752f;
    const float factor = size == 32 || size == 8 || size == 2 ? odd : even;
    return is_negative(i) ? -factor : factor;
}
