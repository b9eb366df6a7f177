// A block's scale and its reciprocal, as in reference.py, once for every compiled backend.
#pragma once

constexpr float SMALLEST_SCALE = 0x1p-126f;  // a smaller one would have no finite reciprocal
constexpr uint32_t INFINITE = 0x7f800000;    // the bits of infinity: those of every finite magnitude are below

LB_FN float not_too_small(float scale) {
    if (scale == 0.0f) return 0.0f;
    return fabsf(scale) >= SMALLEST_SCALE ? scale : copysignf(SMALLEST_SCALE, scale);
}
LB_FN float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }
