// What int8_quantize.cpp is made of: lines of memory, values in pairs of vectors, bytes from integers, and the
// transposition of a square of words.
#pragma once
#include "vec.h"
#include "dither.h"
#include <limits>
#include <type_traits>

// ---- memory

constexpr int64_t STREAM = 3 << 19;  // a result larger than this does not pass through the caches

// 64 bytes, past the caches where the instruction set allows it; the address is then a multiple of 64
LB_FN void store_line(int8_t* to, const void* line, bool stream) {
#if LB_AVX512
    if (stream) return _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
#elif LB_AVX2
    if (stream) {
        _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)line));
        return _mm256_stream_si256((__m256i*)to + 1, _mm256_load_si256((const __m256i*)line + 1));
    }
#endif
    memcpy(to, line, 64);
}
LB_FN void finish_stream() {
#if LB_AVX512 || LB_AVX2
    _mm_sfence();
#endif
}
LB_FN bool streams(const int8_t* q, int64_t rows, int64_t row_length) {
    return rows * row_length > STREAM && row_length % 64 == 0 && (uintptr_t)q % 64 == 0;
}

// ---- magnitudes, which order like their bits: infinity and NaN on top

typedef int16_t Shorts __attribute__((vector_size(4 * W)));
template <class T> using Top = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;        // the bits of one
template <class T> using Tops = std::conditional_t<sizeof(T) == 2, Shorts, I>;              // of a vector of them
template <class T> constexpr int MANY = 4 * W / sizeof(T);                                  // in a vector

LB_FN Shorts maximum(Shorts a, Shorts b) {
#if LB_AVX512_BW
    return (Shorts)_mm512_max_epi16((__m512i)a, (__m512i)b);
#else
    return where(a > b, a, b);
#endif
}
template <class T> LB_FN Tops<T> magnitudes(const T* from, int count) {
    Tops<T> bits{};
    if (count == MANY<T>) memcpy(&bits, from, sizeof bits);
    else memcpy(&bits, from, sizeof(T) * count);
    return bits & std::numeric_limits<Top<T>>::max();
}
LB_FN uint32_t highest_of(I tops) { return highest_unsigned(tops); }
LB_FN uint32_t highest_of(Shorts tops) { return highest_unsigned(maximum((I)tops & 0xffff, (I)tops >> 16)); }
// The bits of the same magnitude as a float.
template <class T> LB_FN uint32_t as_float_bits(uint32_t top) {
    T value;
    memcpy(&value, &top, sizeof value);
    return (uint32_t)to_bits(load(&value, 1))[0];
}

// ---- values, in pairs of vectors: 2 * W elements of a row

struct Pair { V at[2]; };
struct IntPair { I at[2]; };

// Lane l of vector h is element place<T>(h, l). Bfloat16 is widened where it lies: even elements, then odd ones.
template <class T> constexpr bool ALTERNATE = std::is_same_v<T, BFloat16>;
template <class T> constexpr int place(int h, int l) { return ALTERNATE<T> ? 2 * l + h : h * W + l; }

template <class T> LB_FN Pair load_pair(const T* p) { return {load(p, W), load(p + W, W)}; }
LB_FN Pair load_pair(const BFloat16* p) {
    const I two = load_raw<I>(p, W);
    return {from_bits(two << 16), from_bits(two & (int32_t)0xffff0000)};
}

// ---- rounding

LB_FN I to_nearest(V x) {  // ties to even; |x| below 2^22, or any integer
#if LB_AVX512
    return (I)_mm512_cvtps_epi32(x);
#elif LB_AVX2
    return (I)_mm256_cvtps_epi32(x);
#else
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23
    return to_bits(x + ROUND) - to_bits(splat<V>(ROUND));
#endif
}
// Of W elements: 15 bits of each lane, in the middle of its 2^-15, less a half
LB_FN V dithers(U lanes) { return from_bits((I)(lanes >> 9 & 0x7fff00 | 0x3f800080)) - 1.5f; }

// The int8 values of a pair, times `inverses`; any integers where that is NaN. There is nothing to clamp: |x * inverse|
// is at most 127 + 2^-17 by the choice of inverse, and a dither at most 1/2 - 2^-16. start: of the first element's
template <class T, bool DITHERED> LB_FN IntPair rounded(Pair x, Pair inverses, uint32_t start) {
    const V low = x.at[0] * inverses.at[0], high = x.at[1] * inverses.at[1];
    if (!DITHERED) return {to_nearest(low), to_nearest(high)};
    U lanes;
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) lanes[l] = (uint32_t)place<T>(0, l) * DITHER_COLUMN;
    lanes += start;
    const uint32_t other = (uint32_t)place<T>(1, 0) * DITHER_COLUMN;
    return {to_nearest(low + dithers(lanes)), to_nearest(high + dithers(lanes + other))};
}

// ---- bytes

// Of 4 * W elements of a row, from two pairs.
template <class T> LB_FN ManyBytes bytes_of_row(const IntPair (&x)[2]) {
#if LB_AVX512_BW
    const auto half = [&](const IntPair& pair) __attribute__((always_inline)) {
        return _mm512_packs_epi32((__m512i)pair.at[0], (__m512i)pair.at[1]);
    };
    __m512i bytes = _mm512_packs_epi16(half(x[0]), half(x[1]));  // in each quarter four of each vector
    if (ALTERNATE<T>) {
        const __m128i even_odd = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(even_odd));
        return (ManyBytes)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (ManyBytes)_mm512_permutexvar_epi32(order, bytes);
#elif LB_AVX2
    const auto half = [&](const IntPair& pair) __attribute__((always_inline)) {
        return _mm256_packs_epi32((__m256i)pair.at[0], (__m256i)pair.at[1]);
    };
    __m256i bytes = _mm256_packs_epi16(half(x[0]), half(x[1]));
    if (ALTERNATE<T>) {
        const __m128i even_odd = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(even_odd));
        return (ManyBytes)_mm256_permute4x64_epi64(bytes, 0xd8);
    }
    return (ManyBytes)_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#else
    ManyBytes bytes;
    for (int g = 0; g < 2; ++g) {
        if (ALTERNATE<T>) {
            const Halves both = narrow_to_halves((x[g].at[0] & 255) | (x[g].at[1] & 255) << 8);
            memcpy((char*)&bytes + 2 * W * g, &both, sizeof both);
        } else {
            for (int h = 0; h < 2; ++h) {
                const Bytes part = narrow_to_bytes(x[g].at[h] & 255);
                memcpy((char*)&bytes + 2 * W * g + W * h, &part, sizeof part);
            }
        }
    }
    return bytes;
#endif
}
// Words whose bytes are those of four vectors.
LB_FN I words_of(I a, I b, I c, I d) {
#if LB_AVX512_BW
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b),
                                             _mm512_packs_epi32((__m512i)c, (__m512i)d));
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (I)_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(turned));
#elif LB_AVX2
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b),
                                             _mm256_packs_epi32((__m256i)c, (__m256i)d));
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (I)_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(turned));
#else
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
#endif
}

// ---- transposition

// Rows of W words to columns
LB_FN void transpose(I (&v)[W]) {
#if LB_AVX512
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; ++h) {
            b[i + 2 * h] = _mm512_unpacklo_epi64(a[i + h], a[i + 2 + h]);
            b[i + 2 * h + 1] = _mm512_unpackhi_epi64(a[i + h], a[i + 2 + h]);
        }
    for (int i = 0; i < 4; ++i) {  // b[4 k + i], quarter l: rows 4 k to 4 k + 3 of column 4 l + i
        const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        v[i] = (I)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
        v[4 + i] = (I)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        v[8 + i] = (I)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        v[12 + i] = (I)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
#elif LB_AVX2
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)v[i], (__m256i)v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)v[i], (__m256i)v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; ++h) {
            b[i + 2 * h] = _mm256_unpacklo_epi64(a[i + h], a[i + 2 + h]);
            b[i + 2 * h + 1] = _mm256_unpackhi_epi64(a[i + h], a[i + 2 + h]);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = (I)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        v[4 + i] = (I)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
#else
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            const int32_t below = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = below;
        }
#endif
}
