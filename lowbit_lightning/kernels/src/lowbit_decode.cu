// Rows of a low-bit weight as floats, all of them or those that indices name. A thread decodes a unit.
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the result), and those of lowbit_units.h.
#include "lowbit_units.h"

// indices: int32 or int64, by index_bytes; null for all rows in order. out [count][form.length]
extern "C" __global__ void __launch_bounds__(256) decode(
    const uint8_t* packed, const uint8_t* scales, int64_t rows, const void* indices, int32_t index_bytes, int64_t count,
    const __grid_constant__ Form form, ELEMENT* out) {
    const Values values(form);
    const int64_t units = ceil_div(form.length, UNIT), place = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (place >= count * units) return;
    const bool small = ((place | units) >> 32) == 0;  // a 64-bit division takes five times as long
    const int64_t to = small ? (uint32_t)place / (uint32_t)units : place / units, u = place - to * units;
    int64_t row = to;
    if (indices) {
        row = index_bytes == 4 ? ((const int32_t*)indices)[to] : ((const int64_t*)indices)[to];
        if (row < 0 || row >= rows) __trap();
    }
    const Unit unit = load_unit(form, packed + row * form.packed_stride, u, has_packets(form, packed));
    const Scale scale = load_scale(form, scales + row * form.scales_stride, block_of(u * UNIT));
    float result[UNIT];
#pragma unroll
    for (int i = 0; i < UNIT; ++i) result[i] = decoded(values, unit, i, scale);

    ELEMENT* there = out + to * form.length + u * UNIT;
    if ((u + 1) * UNIT <= form.length && (uint64_t)there % 16 == 0) {
        store_rounded<UNIT>(there, result);
        return;
    }
#pragma unroll
    for (int i = 0; i < UNIT; ++i)
        if (u * UNIT + i < form.length) there[i] = narrow<ELEMENT>(result[i]);
}
