// Engines of a product of low-bit weights with few rows of x: how values are decoded, and multiplied with x, which is
// brought into the order of a chunk's values.
//
// Values are floats, or pairs of bfloat16 where x is that and the processor multiplies pairs (vdpbf16ps): twice the
// products an instruction. The table is then rounded to bfloat16, in a unit in which that changes nf4 by 0.06 % (rms)
// and every other format not at all. FOLDED: scales, and offsets of pairs, are applied to values before these meet x;
// what is rounded is then the result, as in a weight that is dequantised to bfloat16.
#pragma once
#include "lowbit.h"

template <bool FOLDED> struct Plain {  // floats
    typedef float Element;
    typedef V Vector;
    static constexpr int phases = PHASES;  // vectors of a chunk
    static constexpr int lanes = W;        // elements of a vector
    static constexpr bool folded = FOLDED, has_offsets = false;
    Values values;
    Spread spread;
    explicit Plain(const Form& form) : values(form), spread(form) {}
    static float unit(const Form&) { return 1; }  // of the products with values

    struct Chunk {  // of a row
        const Plain* engine;
        V scale;
        LB_METHOD V of(const Codes& codes, int p) const {
            const V value = engine->values.of(codes, p);
            return FOLDED ? value * scale : value;
        }
    };
    LB_METHOD Chunk chunk(const float* scales, const float*, int64_t c) const {
        return {this, FOLDED ? spread.of(scales, c) : V{}};
    }
    static LB_METHOD V add(V sum, V a, V b) { return multiply_add(a, b, sum); }

    // A chunk of x from the natural order into that in which values are decoded
    static void in_order(const float* from, float* to) {
        if (BITS == 8) {
            memcpy(to, from, CHUNK * sizeof *to);
            return;
        }
        for (int p = 0; p < phases; ++p)
            for (int l = 0; l < lanes; ++l) to[p * lanes + l] = from[l * phases + p];
    }
};

#if LB_AVX512_BF16 && LB_AVX512_BW
#define LB_PAIRS 1
struct Places {  // of words
    alignas(64) uint16_t even[32], odd[32], paired[32];
    constexpr Places() : even(), odd(), paired() {
        for (int l = 0; l < 32; ++l) {
            even[l] = 2 * l;
            odd[l] = 2 * l + 1;
            paired[l] = l / 2 + l % 2 * 16;
        }
    }
};
constexpr Places PLACES;

// The words of n vectors by their remainders modulo n: to[r * step] has words r, r + n, r + 2 n and so on.
template <int n> static void by_remainder(const __m512i* from, __m512i* to, int step) {
    __m512i even[n / 2], odd[n / 2];
    for (int i = 0; i < n / 2; ++i) {
        even[i] = _mm512_permutex2var_epi16(from[2 * i], _mm512_load_si512(PLACES.even), from[2 * i + 1]);
        odd[i] = _mm512_permutex2var_epi16(from[2 * i], _mm512_load_si512(PLACES.odd), from[2 * i + 1]);
    }
    if constexpr (n > 2) {
        by_remainder<n / 2>(even, to, 2 * step);
        by_remainder<n / 2>(odd, to + step, 2 * step);
    } else {
        to[0] = even[0];
        to[step] = odd[0];
    }
}
// Each word beside that of the upper half.
LB_FN __m512i halves_paired(__m512i x) { return _mm512_permutexvar_epi16(_mm512_load_si512(PLACES.paired), x); }

// Pairs of bfloat16; a lane of 16 bits holds half as many codes. The table has room for 32 values: folded it holds
// those of several blocks, each multiplied by its scale, and lanes look into that of their block.
template <bool FOLDED> struct Pairs {
    typedef uint16_t Element;
    typedef __m512i Vector;
    static constexpr int phases = PHASES / 2;
    static constexpr int lanes = 2 * W;
    static constexpr bool folded = FOLDED, has_offsets = FOLDED;
    static constexpr int CODE = BITS < 8 ? BITS : 5;
    static constexpr int tables = 32 >> CODE;  // blocks of a chunk for which there is room
    __m512i table, mask;
    __m512i own;        // where the table of a lane's block begins
    __m512i low, high;  // the blocks of the table's entries, first and second half
    __m512 values16;
    Values values;
    Spread spread;
    explicit Pairs(const Form& form)
        : table(_mm512_loadu_si512(form.narrow)), mask(_mm512_set1_epi16((1 << CODE) - 1)),
          values16(_mm512_loadu_ps(form.values)), values(form), spread(form) {
        alignas(64) uint16_t begins[32];
        alignas(64) int32_t blocks[32];
        for (int l = 0; l < 32; ++l) {
            begins[l] = l * tables / 32 << CODE;
            blocks[l] = (l >> CODE) * spread.fine / tables;
        }
        own = _mm512_load_si512(begins);
        low = _mm512_load_si512(blocks);
        high = _mm512_load_si512(blocks + 16);
    }
    static float unit(const Form& form) { return BITS == 8 || FOLDED ? 1 : 1 / form.factor; }

    struct Chunk {
        const Pairs* engine;
        __m512i table;
        LB_METHOD __m512i of(const Codes& codes, int p) const {
#if BITS == 8
            // integers of 8 bits end in the upper half of a float
            return _mm512_or_si512(_mm512_srli_epi32((__m512i)engine->values.of(codes, 2 * p), 16),
                                   (__m512i)engine->values.of(codes, 2 * p + 1));
#else
            __m512i index = _mm512_srli_epi16((__m512i)codes.low, shift_of(p));
#if BITS == 3
            const int by = high_shift_of(p) - 2;
            const __m512i bytes = _mm512_cvtepu8_epi16((__m256i)codes.high);
            const __m512i high = by < 0 ? _mm512_slli_epi16(bytes, -by) : _mm512_srli_epi16(bytes, by);
            index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), high, index, 0xca);
#endif
            // index & mask | own
            if (FOLDED) index = _mm512_ternarylogic_epi32(index, engine->mask, engine->own, 0xea);
            return _mm512_permutexvar_epi16(index, table);
#endif
        }
    };
    LB_METHOD Chunk chunk(const float* scales, const float* offsets, int64_t c) const {
        if (!FOLDED) return {this, table};
        const int64_t block = spread.block(c);
        const __m512 scale = _mm512_loadu_ps(scales + block), offset = _mm512_loadu_ps(offsets + block);
        const auto entries = [&](__m512i blocks) LB_LAMBDA {
            return _mm512_fmadd_ps(values16, _mm512_permutexvar_ps(blocks, scale),
                                   _mm512_permutexvar_ps(blocks, offset));
        };
        return {this, (__m512i)_mm512_cvtne2ps_pbh(entries(high), entries(low))};
    }
    static LB_METHOD V add(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

    static void in_order(const uint16_t* from, uint16_t* to) {
        __m512i x[phases], ordered[phases];
        memcpy(x, from, sizeof x);
        if (BITS < 8) by_remainder<phases>(x, ordered, 1);
        for (int p = 0; p < phases && BITS == 8; ++p) ordered[p] = halves_paired(x[p]);
        memcpy(to, ordered, sizeof ordered);
    }
};
#else
#define LB_PAIRS 0
#endif
