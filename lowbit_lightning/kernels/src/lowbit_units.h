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

// Bits that are moved from one place to another; constants decide which instruction that is.
LB_FN uint32_t moved(uint32_t word, int from, int to) { return from > to ? word >> (from - to) : word << (to - from); }

// (bits & mask) | others, as one instruction: left to itself the compiler regroups longer chains into more.
LB_FN uint32_t insert_bits(uint32_t bits, uint32_t mask, uint32_t others) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(others));
    return result;
#else
    return (bits & mask) | others;
#endif
}

struct Unit { uint32_t low[UNIT_BYTES > 4 ? 2 : 1], high; };

// Whether every whole unit can be loaded in one access.
LB_FN bool has_packets(const Form& form, const uint8_t* packed) {
    return (((uint64_t)packed | (uint64_t)form.packed_stride) & (UNIT_BYTES - 1)) == 0;
}
// Unit u of a row, all of which exists.
template <class T> LB_FN Unit load_whole_unit(const Form& form, const uint8_t* row, T u) {
    Unit unit = {};
    const uint8_t* from = row + u * UNIT_BYTES;
#if BITS < 4
    unit.low[0] = *(const uint16_t*)from;
#else
    Packet<UNIT_BYTES> packet;
    copy((const Packet<UNIT_BYTES>*)from, &packet);
#pragma unroll
    for (int i = 0; i < UNIT_BYTES / 4; ++i) unit.low[i] = packet.word[i];
#endif
    if (BITS == 3) unit.high = row[low_width(form) + u];
    return unit;
}
// Unit u of a row; zeros after the row's end.
template <class T> LB_FN Unit load_unit(const Form& form, const uint8_t* row, T u, bool packets) {
    if (packets && (u + 1) * UNIT <= form.length) return load_whole_unit(form, row, u);
    Unit unit = {};
    const uint8_t* from = row + u * UNIT_BYTES;
    const int64_t left = low_width(form) - u * UNIT_BYTES;
#pragma unroll
    for (int i = 0; i < UNIT_BYTES; ++i)
        if (i < left) unit.low[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
    if (BITS == 3) unit.high = row[low_width(form) + u];
    return unit;
}
// Where the i-th code begins in its byte: the first is in the highest bits.
LB_FN constexpr int shift_of(int i) {
    return BITS == 8 ? i % 4 * 8 : BITS == 4 ? i / 2 * 8 + 4 - i % 2 * 4 : i / 4 * 8 + 6 - i % 4 * 2;
}

// ---- values and scales

// The value of an affine format's code: the code, less a half of the largest. Where it stands in its word, it is the
// mantissa of a power of two; the bit that is worth a half has to be in it too. from, high: where the code begins, and
// where the third of 3 bits is, in a plane of its own.
LB_FN float level(const Unit& unit, int from, int high) {
    const int to = from == 0 ? 1 : from > 19 ? from - 16 : from;
    const float power = (float)(1 << (23 - to)), middle = ((1 << BITS) - 1) * 0.5f;
    uint32_t bits = from > 19 ? unit.low[0] >> 16 : moved(unit.low[0], from, to);
    bits = insert_bits(bits, (BITS == 4 ? 15u : 3u) << to, (uint32_t)to_bits(power));
    if (BITS == 3) bits = insert_bits(moved(unit.high, high, to + 2), 4u << to, bits);
    return from_bits((int32_t)bits) - (power + middle);
}

// The table, in shared memory: its 16 values lie in banks of their own, so lanes never wait for each other.
struct Values {
    const float* table;
    LB_METHOD explicit Values(const Form& form) {  // every thread of the CUDA block has to call it
        __shared__ float values[16];
        if (threadIdx.x < 16) values[threadIdx.x] = form.values[threadIdx.x];
        __syncthreads();
        table = values;
    }
    LB_METHOD float of(const Unit& unit, int i) const {  // the i-th
        if (BITS == 8) return (float)(int8_t)(unit.low[i / 4] >> shift_of(i));
        if (AFFINE) return level(unit, shift_of(i), 7 - i);
        // The code times four, which is its value's place in bytes.
        return *(const float*)((const uint8_t*)table + (moved(unit.low[0], shift_of(i), 2) & 60));
    }
};

struct Scale { float scale, offset; };

LB_FN int64_t blocks_of(const Form& form) { return BLOCK ? ceil_div(form.length, BLOCK ? BLOCK : 1) : 1; }
template <class T> LB_FN T block_of(T element) { return BLOCK ? element / (BLOCK ? BLOCK : 1) : 0; }
template <class T> LB_FN Scale load_scale(const Form& form, const uint8_t* row, T block) {
    if (!SQUARE) return {((const float*)row)[block], 0.0f};
    const uint8_t* codes = row + (AFFINE ? 2 : 1) + block;
    const float scale = square_scale((float)codes[0], power(row[0]));
    if (!AFFINE) return {scale, 0.0f};
    return {scale, square_offset((float)(int8_t)codes[blocks_of(form)], power(row[1]))};
}
LB_FN float decoded(const Values& values, const Unit& unit, int i, Scale s) {
    const float value = values.of(unit, i) * s.scale;
    return AFFINE ? value + s.offset : value;
}
