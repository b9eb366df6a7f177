// Low-bit weights on the GPU: where a row's codes and scales lie (formats/weights.py says what they mean), in units.
//
// A *unit* is 8 neighbouring elements of a row, from a multiple of 8 on: 8, 4 or 2 bytes of codes; of 3 bits 2 bytes,
// and one more of the plane of high bits. Blocks are multiples of 32, so a unit has one scale.
//
// Specialised by macros: BITS (8, 4, 3, 2), BLOCK (elements that share a scale; 0: a row does), SQUARE (scales are
// codes of 8 bits with an exponent), AFFINE (and there are offsets).
#pragma once
#include "gpu.h"
#include "lowbit_scales.h"

struct Form {  // Form in cuda/lowbit_form.py
    int64_t length, packed_stride, scales_stride;  // of a row; strides in bytes
    float unit;                                    // of the values
    float values[16];                              // by code; of 8 bits unused
};

constexpr int UNIT = 8, UNIT_BYTES = BITS == 8 ? 8 : BITS == 4 ? 4 : 2;  // bytes of the low plane, where there are two

LB_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LB_FN int64_t low_width(const Form& form) { return ceil_div(form.length * (BITS == 3 ? 2 : BITS), 8); }

// ---- codes

struct Unit { uint32_t low[UNIT_BYTES > 4 ? 2 : 1], high; };

// Whether every whole unit can be loaded in one access.
LB_FN bool has_packets(const Form& form, const uint8_t* packed) {
    return (((uint64_t)packed | (uint64_t)form.packed_stride) & (UNIT_BYTES - 1)) == 0;
}
// Unit u of a row; zeros after the row's end.
LB_FN Unit load_unit(const Form& form, const uint8_t* row, int64_t u, bool packets) {
    Unit unit = {};
    const uint8_t* from = row + u * UNIT_BYTES;
    if (packets && (u + 1) * UNIT <= form.length) {
#if BITS < 4
        unit.low[0] = *(const uint16_t*)from;
#else
        Packet<UNIT_BYTES> packet;
        copy((const Packet<UNIT_BYTES>*)from, &packet);
#pragma unroll
        for (int i = 0; i < UNIT_BYTES / 4; ++i) unit.low[i] = packet.word[i];
#endif
    } else {
        const int64_t left = low_width(form) - u * UNIT_BYTES;
#pragma unroll
        for (int i = 0; i < UNIT_BYTES; ++i)
            if (i < left) unit.low[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
    }
    if (BITS == 3) unit.high = row[low_width(form) + u];
    return unit;
}
// The i-th: in each byte the first is in the highest bits.
LB_FN int32_t code_of(const Unit& unit, int i) {
    if (BITS == 8) return (int8_t)(unit.low[i / 4] >> (8 * (i % 4)));
    if (BITS == 4) return unit.low[0] >> (8 * (i / 2) + 4 - i % 2 * 4) & 15;
    const int32_t low = unit.low[0] >> (8 * (i / 4) + 6 - i % 4 * 2) & 3;
    return BITS == 2 ? low : low | (unit.high >> (7 - i) & 1) << 2;
}

// ---- values and scales

// The table, in shared memory: its 16 values lie in banks of their own, so lanes never wait for each other.
struct Values {
    const float* table;
    LB_METHOD explicit Values(const Form& form) {  // every thread of the CUDA block has to call it
        __shared__ float values[16];
        if (threadIdx.x < 16) values[threadIdx.x] = form.values[threadIdx.x];
        __syncthreads();
        table = values;
    }
    LB_METHOD float of(int32_t code) const { return BITS == 8 ? (float)code : table[code]; }
};

struct Scale { float scale, offset; };

LB_FN int64_t blocks_of(const Form& form) { return BLOCK ? ceil_div(form.length, BLOCK ? BLOCK : 1) : 1; }
LB_FN int64_t block_of(int64_t element) { return BLOCK ? element / (BLOCK ? BLOCK : 1) : 0; }
LB_FN Scale load_scale(const Form& form, const uint8_t* row, int64_t block) {
    if (!SQUARE) return {((const float*)row)[block], 0.0f};
    const uint8_t* codes = row + (AFFINE ? 2 : 1) + block;
    const float scale = square_scale((float)codes[0], power(row[0]));
    if (!AFFINE) return {scale, 0.0f};
    return {scale, square_offset((float)(int8_t)codes[blocks_of(form)], power(row[1]))};
}
LB_FN float decoded(const Values& values, int32_t code, Scale s) {
    const float value = values.of(code) * s.scale;
    return AFFINE ? value + s.offset : value;
}
