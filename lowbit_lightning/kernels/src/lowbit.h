// Low-bit weights in registers: where a row's codes and scales lie (formats/weights.py says what they mean), and how a
// vector register full of packed codes becomes vectors of values.
//
// A *chunk* is the elements whose codes fill one register. Lane l of it holds the codes of PHASES neighbours, elements
// PHASES * l to PHASES * l + PHASES - 1, and *phase* p is the vector of the p-th of them in each lane: one shift and
// one look-up in a table of 16 values, since a look-up heeds only the low four bits of its index. So values come in
// the order [phase][lane]. Products do not mind: x is brought into the same order once.
//
//   bits  PHASES  a chunk of 16 lanes
//    8      4     64 elements, and here a phase is 16 neighbours: [phase][lane] is the natural order
//    4      8     128
//    3, 2  16     256; of 3 bits the third comes from a plane of its own, 16 bits to a lane
//
// BITS is defined by the includer.
#pragma once
#include "vec.h"
#include "lowbit_scales.h"

struct Form {          // _Form in cpu/lowbit.py
    int64_t block;     // elements that share a scale
    int64_t blocks;    // in a row
    int64_t length;    // of a row: K
    int64_t packed_stride, scales_stride;  // bytes of a row
    int32_t square;    // scales are codes in 8 bits, with an exponent
    int32_t affine;    // and there are offsets
    float factor;      // what the bfloat16 table is too large by
    int32_t unused;
    float values[16];  // by code, repeated to 16; of 8 bits unused
    uint16_t narrow[32];  // values * factor in bfloat16, repeated to 32
};

constexpr int PHASES = BITS == 8 ? 4 : BITS == 4 ? 8 : 16;
constexpr int CHUNK = PHASES * W;
constexpr int CHUNK_BYTES = BITS == 8 ? CHUNK : CHUNK / (BITS == 4 ? 2 : 4);  // of the low plane, where there are two

#define LB_METHOD inline __attribute__((always_inline))

struct Slot { V vector; };  // of a std::vector

LB_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- codes

struct Codes {  // of a chunk
#if BITS == 8
    const uint8_t* from;  // widened from memory
#else
    I low;
#endif
#if BITS == 3
    Halves high;
#endif
};

constexpr int low_bits = BITS == 3 ? 2 : BITS;
// Where the code of phase p starts in its lane: bytes in order, in each the first code highest.
constexpr int shift_of(int p) { return 8 * (p * low_bits / 8) + 8 - low_bits - p * low_bits % 8; }
constexpr int high_shift_of(int p) { return 8 * (p / 8) + 7 - p % 8; }

LB_FN Codes load_codes(const uint8_t* low, const uint8_t* high) {
    Codes codes;
    (void)high;
#if BITS == 8
    codes.from = low;
#else
    memcpy(&codes.low, low, sizeof(I));
#endif
#if BITS == 3
    memcpy(&codes.high, high, 2 * W);
#endif
#if LB_AVX512 && BITS < 8
    __asm__("" : "+v"(codes.low));  // once from memory: every shift would load it again
#endif
    return codes;
}
LB_FN const uint8_t* high_plane(const Form& form, const uint8_t* row) {
    return BITS == 3 ? row + ceil_div(form.length, 4) : row;
}

// The codes of a row's last chunk, if that is not whole: zeros after the row's end.
struct LastCodes {
    alignas(64) uint8_t low[CHUNK_BYTES] = {}, high[2 * W] = {};
    void copy(const Form& form, const uint8_t* row) {
        const int64_t c = form.length / CHUNK, left = form.length % CHUNK;
        memcpy(low, row + c * CHUNK_BYTES, ceil_div(left * low_bits, 8));
        if (BITS == 3) memcpy(high, high_plane(form, row) + c * 2 * W, ceil_div(left, 8));
    }
};
// Of chunk c of a row that has `whole` ones.
LB_FN Codes load_codes(const Form& form, const uint8_t* row, int64_t c, int64_t whole, const LastCodes& last) {
    return load_codes(c < whole ? row + c * CHUNK_BYTES : last.low,
                      c < whole ? high_plane(form, row) + c * 2 * W : last.high);
}

// ---- values

LB_FN I shifted(I x, int by) {  // right, or left where `by` is negative; what comes in from above is not looked at
    return by >= 0 ? x >> by : x << -by;
}
#if BITS < 8
LB_FN I index_of(const Codes& codes, int p) {
#if BITS == 3
    return (shifted(widen(codes.high), high_shift_of(p) - 2) & 4) | (shifted(codes.low, shift_of(p)) & ~4);
#else
    return shifted(codes.low, shift_of(p));
#endif
}
#endif

#if BITS == 8
struct Values {
    explicit Values(const Form&) {}
    LB_METHOD V of(const Codes& codes, int p) const {
        return to_float(widen_signed(load_raw<Bytes>(codes.from + p * W, W)));
    }
};
#elif LB_NEON
struct Values {
    uint8x16x4_t table;
    explicit Values(const Form& form) { table = vld1q_u8_x4((const uint8_t*)form.values); }
    LB_METHOD V of(const Codes& codes, int p) const {  // four bytes of the table for each index
        const I bytes = (index_of(codes, p) & 15) * 0x04040404 + 0x03020100;
        return (V)vqtbl4q_u8(table, (uint8x16_t)bytes);
    }
};
#else
struct Values {
    Table<float, 16> table;
    explicit Values(const Form& form) { memcpy(&table, form.values, sizeof table); }
    LB_METHOD V of(const Codes& codes, int p) const { return lookup(table, index_of(codes, p)); }
};
#endif

// ---- scales

constexpr int PADDING = W;  // floats after a row's scales that may be read

template <class F> LB_FN void for_vectors(int64_t n, const F& body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, W);
    if (i < n) body(i, (int)(n - i));
}
// Scales of a row, and its offsets where there are any: form.blocks floats each, zeros after them.
static inline void decode_scales(const Form& form, const uint8_t* row, float* scales, float* offsets) {
    const int64_t n = form.blocks;
    memset(scales + n, 0, PADDING * sizeof(float));
    if (!form.square) {
        memcpy(scales, row, n * sizeof(float));
        return;
    }
    const uint8_t* codes = row + (form.affine ? 2 : 1);
    const V unit = splat<V>(power(row[0]));
    for_vectors(n, [&](int64_t b, int width) __attribute__((always_inline)) {
        const V root = to_float(widen(load_raw<Bytes>(codes + b, width)));
        store(scales + b, square_scale(root, unit), width);
    });
    if (!form.affine) return;
    memset(offsets + n, 0, PADDING * sizeof(float));
    const V offset_unit = splat<V>(power(row[1]));
    for_vectors(n, [&](int64_t b, int width) __attribute__((always_inline)) {
        const V root = to_float(widen_signed(load_raw<Bytes>(codes + n + b, width)));
        store(offsets + b, square_offset(root, offset_unit), width);
    });
}

// The scales (or offsets) of a chunk's lanes, from those of its row.
struct Spread {
    int fine;   // blocks in a chunk, at least one
    int shift;  // chunks in a block: 2^shift; of 8 bits a row is one block
    I lane;
    explicit Spread(const Form& form)
        : fine(BITS < 8 && form.block < CHUNK ? (int)(CHUNK / form.block) : 1), shift(BITS < 8 ? 0 : 62) {
        while (BITS < 8 && (int64_t)CHUNK << shift < form.block) ++shift;
        for (int l = 0; l < W; ++l) lane[l] = l / (W / fine);
    }
    LB_METHOD int64_t block(int64_t c) const { return c * fine >> shift; }  // the first of a chunk
    LB_METHOD V of(const float* scales, int64_t c) const {
        const float* from = scales + block(c);
#if LB_AVX512
        return _mm512_permutexvar_ps((__m512i)lane, _mm512_loadu_ps(from));
#elif LB_AVX2
        return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), (__m256i)lane);
#else
        V result;
        for (int l = 0; l < W; ++l) result[l] = from[lane[l]];
        return result;
#endif
    }
};
