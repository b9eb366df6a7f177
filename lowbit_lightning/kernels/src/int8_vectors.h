// What int8_quantize.cpp is made of: lines of memory, and the transposition of a square of words.
#pragma once
#include "vec.h"

// ---- memory

constexpr int64_t STREAM = 4 << 20;  // a result larger than this does not pass through the caches

LB_FN void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the L2 cache; any address will do

// 64 values from 0 to 255, as bytes
LB_FN void narrow_line(const I (&v)[64 / W], uint8_t* line) {
    for (int k = 0; k < 64 / W; k += 4) {
        const ManyBytes bytes = pack(v + k, 0);
        memcpy(line + k * W, &bytes, sizeof bytes);
    }
}
// 64 bytes, past the caches where the instruction set allows it; the address is then a multiple of 64
LB_FN void store_line(int8_t* to, const void* line, bool stream) {
#if defined(__AVX512F__)
    if (stream) return _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
#elif defined(__AVX2__)
    if (stream) {
        _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)line));
        return _mm256_stream_si256((__m256i*)to + 1, _mm256_load_si256((const __m256i*)line + 1));
    }
#endif
    memcpy(to, line, 64);
}
LB_FN void finish_stream() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}
LB_FN bool streams(const int8_t* q, int64_t rows, int64_t row_length) {
    return rows * row_length > STREAM && row_length % 64 == 0 && (uintptr_t)q % 64 == 0;
}

// ---- transposition

// Rows of W words to columns
LB_FN void transpose(I (&v)[W]) {
#if defined(__AVX512F__)
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
#elif defined(__AVX2__)
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
