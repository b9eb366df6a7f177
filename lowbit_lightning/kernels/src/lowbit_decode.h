// Rows of low-bit weights as floats, in the order in which codes are decoded or in the natural one.
#pragma once
#include "int8_vectors.h"
#include "lowbit.h"
#include "parallel.h"
#include <vector>

// Chunk c of a row in the order [phase][lane].
LB_FN void decode_chunk(const Values& values, const Codes& codes, V scale, bool affine, V offset, V* out) {
#pragma GCC unroll 16
    for (int p = 0; p < PHASES; ++p) {
        out[p] = values.of(codes, p) * scale;
        if (affine) out[p] = out[p] + offset;
    }
}
// The same in the natural order: PHASES * W elements.
LB_FN void to_natural_order(V* v, float* out) {
    if (BITS == 8) {
        memcpy(out, v, CHUNK * sizeof(float));
        return;
    }
    if (PHASES < W) {  // the square is filled up with zeros
        I square[W] = {};
        for (int p = 0; p < PHASES; ++p) square[p] = to_bits(v[p]);
        transpose(square);
        for (int l = 0; l < W; ++l) memcpy(out + l * PHASES, &square[l], PHASES * sizeof(float));
        return;
    }
    for (int t = 0; t < PHASES; t += W) {
        I square[W];
        for (int p = 0; p < W; ++p) square[p] = to_bits(v[(t + p) % PHASES]);
        transpose(square);
        for (int l = 0; l < W; ++l) memcpy(out + l * PHASES + t, &square[l], sizeof(I));
    }
}

#if LB_AVX512 && BITS < 8
// The codes of 16 neighbouring elements, in bits that a look-up heeds: their bytes in every lane, shifted by the lane's
// own number of bits.
struct Neighbours {
    I shift, high_shift, halves;
    Neighbours() {
        for (int l = 0; l < W; ++l) {
            shift[l] = BITS == 4 ? 8 * (l % 8 / 2) + 4 - 4 * (l % 2) : 8 * (l / 4) + 6 - 2 * (l % 4);
            high_shift[l] = 8 * (l / 8) + 7 - l % 8;
            halves[l] = l / 8;
        }
    }
    LB_METHOD I of(const Form& form, const uint8_t* row, int64_t k) const {
#if BITS == 4
        int64_t bytes;
        memcpy(&bytes, row + k / 2, 8);
        const __m512i both = _mm512_permutexvar_epi32((__m512i)halves, _mm512_set1_epi64(bytes));
        return (I)_mm512_srlv_epi32(both, (__m512i)shift);
#else
        int32_t bytes;
        memcpy(&bytes, row + k / 4, 4);
        const I low = (I)_mm512_srlv_epi32(_mm512_set1_epi32(bytes), (__m512i)shift);
        if (BITS == 2) return low;
        uint16_t high;
        memcpy(&high, row + ceil_div(form.length, 4) + k / 8, 2);
        return (low & 3) | ((I)_mm512_srlv_epi32(_mm512_set1_epi32(high), (__m512i)high_shift) & 1) << 2;
#endif
    }
};
#endif

// A whole chunk in the natural order: CHUNK elements.
template <class T>
LB_FN void decode_whole(const Form& form, const Values& values, const Spread& spread, const uint8_t* packed,
                        const float* scales, const float* offsets, int64_t c, T* out) {
#if LB_AVX512 && BITS < 8
    const Neighbours neighbours;
    const int64_t first = spread.block(c);
#pragma GCC unroll 16
    for (int p = 0; p < PHASES; ++p) {
        const int64_t block = first + p * spread.fine / PHASES;
        const I codes = neighbours.of(form, packed, c * CHUNK + p * W);
        V v = lookup(values.table, codes) * splat<V>(scales[block]);
        if (form.affine) v = v + splat<V>(offsets[block]);
        store(out + p * W, v, W);
    }
#else
    V v[PHASES];
    const V offset = form.affine ? spread.of(offsets, c) : V{};
    const Codes codes = load_codes(packed + c * CHUNK_BYTES, high_plane(form, packed) + c * 2 * W);
    decode_chunk(values, codes, spread.of(scales, c), form.affine, offset, v);
    alignas(64) float ordered[CHUNK];
    if (BITS < 8) to_natural_order(v, ordered);
    for (int p = 0; p < PHASES; ++p) store(out + p * W, BITS < 8 ? load(ordered + p * W, W) : v[p], W);
#endif
}

#if LB_AVX512_BW && BITS < 8
// The codes of 32 neighbouring elements, as above in lanes of 16 bits.
struct Lanes {
    alignas(64) uint16_t word[32], shift[32], high_word[32], high_shift[32];
    constexpr Lanes() : word(), shift(), high_word(), high_shift() {
        constexpr int each = 16 / low_bits;  // codes in a word
        for (int l = 0; l < 32; ++l) {
            word[l] = l / each;
            shift[l] = shift_of(l % each);
            high_word[l] = l / 16;
            high_shift[l] = high_shift_of(l % 16);
        }
    }
};
LB_FN __m512i neighbours(const Form& form, const uint8_t* row, int64_t k) {
    static constexpr Lanes lanes;
    const auto words = [](const uint16_t* from, __m512i of, const uint16_t* shift) LB_LAMBDA {
        return _mm512_srlv_epi16(_mm512_permutexvar_epi16(_mm512_load_si512(from), of), _mm512_load_si512(shift));
    };
#if BITS == 4
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(row + k / 2));
#else
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)(row + k / 4));
#endif
    const __m512i low = words(lanes.word, _mm512_castsi128_si512(bytes), lanes.shift);
#if BITS == 3
    int32_t bits;
    memcpy(&bits, row + ceil_div(form.length, 4) + k / 8, 4);
    const __m512i high = words(lanes.high_word, _mm512_set1_epi32(bits), lanes.high_shift);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), _mm512_slli_epi16(high, 2), low, 0xca);
#else
    (void)form;
    return low;
#endif
}
// In bfloat16 it is the table of a block that is decoded and rounded; elements are looked up in it.
LB_FN void decode_whole(const Form& form, const Values& values, const Spread& spread, const uint8_t* packed,
                        const float* scales, const float* offsets, int64_t c, BFloat16* out) {
    const int64_t first = spread.block(c);
    const int tables = spread.fine;
    for (int t = 0; t < tables; ++t) {
        V v;
        memcpy(&v, values.table.at, sizeof v);
        v = v * splat<V>(scales[first + t]);
        if (form.affine) v = v + splat<V>(offsets[first + t]);
        const __m512i table = _mm512_broadcast_i64x4((__m256i)narrow_bfloat16(v));
        for (int k = t * (CHUNK / tables); k < (t + 1) * (CHUNK / tables); k += 32)
            _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(neighbours(form, packed, c * CHUNK + k), table));
    }
}
#endif

// Chunks first_chunk to last_chunk - 1 of a row. NATURAL: elements in order, none after the row's end; otherwise
// [phase][lane], the last chunk whole.
template <bool NATURAL, class T>
static void decode_row(const Form& form, const Values& values, const Spread& spread, const uint8_t* packed,
                       const float* scales, const float* offsets, int64_t first_chunk, int64_t last_chunk, T* out) {
    const int64_t whole = form.length / CHUNK;
    LastCodes last;
    if (whole < last_chunk) last.copy(form, packed);
    for (int64_t c = first_chunk; c < last_chunk; ++c, out += CHUNK) {
        const int64_t left = form.length - c * CHUNK;
        if (NATURAL && left >= CHUNK) {
            decode_whole(form, values, spread, packed, scales, offsets, c, out);
            continue;
        }
        const Codes codes = load_codes(form, packed, c, whole, last);
        V v[PHASES];
        decode_chunk(values, codes, spread.of(scales, c), form.affine, form.affine ? spread.of(offsets, c) : V{}, v);
        if (!NATURAL) {
            for (int p = 0; p < PHASES; ++p) store(out + p * W, v[p], W);
            continue;
        }
        alignas(64) float ordered[CHUNK];
        to_natural_order(v, ordered);
        for_vectors(left, [&](int64_t i, int width) LB_LAMBDA { store(out + i, load(ordered + i, W), width); });
    }
}
