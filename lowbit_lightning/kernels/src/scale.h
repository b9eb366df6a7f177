// The scale of a block, of a row in int8, and their reciprocals, as in the reference, once for every compiled backend.
#pragma once

constexpr float SMALLEST_SCALE = 0x1p-126f;  // a smaller one would have no finite reciprocal
constexpr uint32_t INFINITE = 0x7f800000;    // the bits of infinity: those of every finite magnitude are below

LB_FN float not_too_small(float scale) {
    if (scale == 0.0f) return 0.0f;
    return fabsf(scale) >= SMALLEST_SCALE ? scale : copysignf(SMALLEST_SCALE, scale);
}
LB_FN float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Int8 rows and columns: from the bits of the largest magnitude, which order like the magnitudes, infinity and NaN on
// top. A NaN as the scale shows in the row's results.
constexpr float TINY_ROW = 0x1p-120f;  // a row with a smaller largest magnitude counts as zero

struct RowScale { float inverse, scale; };

LB_FN RowScale row_scale(uint32_t top) {
    const uint32_t bits = top < INFINITE ? top : 0x7fc00000u;
    float absmax;
    memcpy(&absmax, &bits, 4);
    if (top >= INFINITE) return {0.0f, absmax};
    if (absmax < TINY_ROW) return {0.0f, 0.0f};
    return {127.0f / absmax, absmax / 127.0f};
}
