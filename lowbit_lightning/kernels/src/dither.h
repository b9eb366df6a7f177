// Dithered rounding: what is added to an element before it is rounded to nearest, as the reference's `dither` says.
#pragma once

constexpr uint32_t DITHER_SEED = 0x9E3779B1, DITHER_ROW = 0xC13FA9A9, DITHER_COLUMN = 0x91E10DA5;

// Element (row, column + i) has the word (dither_start + i * DITHER_COLUMN) >> 17.
LB_FN uint32_t dither_start(uint64_t seed, int64_t row, int64_t column) {
    return (uint32_t)seed * DITHER_SEED + (uint32_t)row * DITHER_ROW + (uint32_t)column * DITHER_COLUMN;
}
