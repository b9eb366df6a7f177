// Rows of a low-bit weight as floats, all of them or those that indices name. A warp decodes TURNS times 32 units of a
// row, side by side; where all of them exist, it has asked for all before it decodes the first.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), and those of lowbit_units.h.
#include "lowbit_units.h"

constexpr int TURNS = 4, UNITS = 32 * TURNS;  // of a warp

LB_FN void decode_unit(const Values& values, const Unit& unit, Scale scale, float (&result)[UNIT]) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) result[i] = decoded(values, unit, i, scale);
}

// indices: int32 or int64, by index_bytes; null for all rows in order. out [count][form.length]
extern "C" __global__ void __launch_bounds__(256) decode(
    const uint8_t* packed, const uint8_t* scales, int64_t rows, const void* indices, int32_t index_bytes, int64_t count,
    const __grid_constant__ Form form, ELEMENT* out) {
    const Values values(form);
    const int64_t of_row = ceil_div(form.length, UNIT * UNITS), warp = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
    if (warp >= count * of_row) return;
    const bool small = ((warp | of_row) >> 32) == 0;  // a 64-bit division takes five times as long
    const int64_t to = small ? (uint32_t)warp / (uint32_t)of_row : warp / of_row;
    int64_t row = to;
    if (indices) {
        row = index_bytes == 4 ? ((const int32_t*)indices)[to] : ((const int64_t*)indices)[to];
        if (row < 0 || row >= rows) __trap();
    }
    const int first = (int)(warp - to * of_row) * UNITS, mine = first + (int)threadIdx.x % 32;
    const uint8_t *codes = packed + row * form.packed_stride, *its_scales = scales + row * form.scales_stride;
    ELEMENT* there = out + to * form.length;
    const bool packets = has_packets(form, packed);
    float result[UNIT];
    if (packets && (int64_t)(first + UNITS) * UNIT <= form.length && (uint64_t)there % 16 == 0) {
        Unit unit[TURNS];
        Scale scale[TURNS];
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            unit[i] = load_whole_unit(form, codes, mine + i * 32);
            scale[i] = load_scale(form, its_scales, block_of((mine + i * 32) * UNIT));
        }
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            decode_unit(values, unit[i], scale[i], result);
            store_rounded<UNIT>(there + (mine + i * 32) * UNIT, result);
        }
        return;
    }
    for (int64_t u = mine; u < first + UNITS && u * UNIT < form.length; u += 32) {
        const Scale scale = load_scale(form, its_scales, block_of(u * UNIT));
        decode_unit(values, load_unit(form, codes, u, packets), scale, result);
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (u * UNIT + i < form.length) there[u * UNIT + i] = narrow<ELEMENT>(result[i]);
    }
}
