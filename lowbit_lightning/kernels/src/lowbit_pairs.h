// Codes of formats with a table, and of 8 bits, as pairs of 16-bit values, for products on tensor cores.
#pragma once
#include "lowbit_units.h"
#include "tensor_core.h"

LB_FN constexpr bool is_half(Half) { return true; }
LB_FN constexpr bool is_half(BFloat16) { return false; }

// Formats with a table: the values of every pair of codes, 32 times, for each lane in a bank of its own.
constexpr int ENTRIES = BITS == 8 || AFFINE ? 0 : 256;

template <int THREADS> LB_FN void fill_table(const Form& form, uint32_t* table) {
    for (int i = threadIdx.x; i < ENTRIES * 8; i += THREADS) {
        const int entry = i / 8;
        const float first = form.values[entry >> 4], second = form.values[entry & 15];
        const uint32_t pair = narrow_pair(first, second, ELEMENT());
        ((uint4*)table)[i] = make_uint4(pair, pair, pair, pair);
    }
}
// The pairs of eight codes of 4 bits. column: this lane's word of the table's first entry; each has 128 bytes.
LB_FN void look_up_pairs(uint32_t word, SharedPlace column, uint32_t (&pair)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = column.word(__byte_perm(word, 0, 0x4440 + i) * 128);
}

LB_FN uint32_t bytes_to_pair(uint32_t word, uint32_t bytes, Half) {  // 1024 + 128 + x, less what is too much
    return subtract_pairs(__byte_perm(word ^ 0x80808080, 0x64646464, bytes), 0x64806480, Half());
}
LB_FN uint32_t bytes_to_pair(uint32_t word, uint32_t bytes, BFloat16) {  // 128 + 7 bits, less 128 or 256
    const uint32_t apart = __byte_perm(word, 0, bytes);
    return subtract_pairs((apart & 0x007f007f) | 0x43004300, (apart & 0x00800080) | 0x43004300, BFloat16());
}
// The pairs of eight codes of 8 bits.
LB_FN void convert_pairs(uint32_t first, uint32_t second, uint32_t (&pair)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = bytes_to_pair(i < 2 ? first : second, i % 2 ? 0x4342 : 0x4140, ELEMENT());
}
