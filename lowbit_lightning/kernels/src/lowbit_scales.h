// Scales in 8 bits (formats/weights.py), once for every compiled backend: the square of a code times a power of two.
#pragma once

constexpr float SCALE_SQUARE = 255 * 255, OFFSET_SQUARE = 127 * 127;  // the largest of each
constexpr int32_t LOWEST_EXPONENT = 1, HIGHEST_EXPONENT = 254, NAN_EXPONENT = 255;

LB_FN float power(int32_t exponent) {  // 2^(exponent - 127); infinite for 255, so that times zero it is NaN
    const uint32_t bits = (uint32_t)exponent << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// Of codes as floats, those of offsets with their signs.
template <class T> LB_FN T square_scale(T root, T unit) { return root * root * unit; }
template <class T> LB_FN T square_offset(T root, T unit) { return root * absolute(root) * unit; }

// The lowest exponent for which `top`, the largest magnitude of a row, is at most largest * 2^(exponent - 127).
LB_FN int32_t exponent_of(float top, float largest) {
    const float ratio = top / largest;
    int32_t bits;
    memcpy(&bits, &ratio, 4);
    const int32_t exponent = (bits + 0x7fffff) >> 23;
    return exponent < LOWEST_EXPONENT ? LOWEST_EXPONENT : exponent > HIGHEST_EXPONENT ? HIGHEST_EXPONENT : exponent;
}
// The magnitude of x's code: the root of x in that unit, to nearest, ties to even.
LB_FN float root_of(float x, float unit, float largest) {
    const float root = rintf(sqrtf(fabsf(x) / unit)), limit = largest == SCALE_SQUARE ? 255.0f : 127.0f;
    return root > limit ? limit : root;
}
