// What int8_quantize.cpp is made of: random words, lines of memory, and the transposition of a square of words.
#pragma once
#include "vec.h"

// ---- random words

typedef uint32_t Words __attribute__((vector_size(4 * W)));  // of W Philox blocks

LB_FN void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32((int)b), odd_a = _mm512_srli_epi64((__m512i)a, 32);
    const __m512i even = _mm512_mul_epu32((__m512i)a, factor), odd = _mm512_mul_epu32(odd_a, factor);
    high = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32((int)b), odd_a = _mm256_srli_epi64((__m256i)a, 32);
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor), odd = _mm256_mul_epu32(odd_a, factor);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
    for (int i = 0; i < W; ++i) {
        const uint64_t product = (uint64_t)a[i] * b;
        high[i] = (uint32_t)(product >> 32);
        low[i] = (uint32_t)product;
    }
#endif
}
#include "philox.h"

// words[8 k + i] = the random word of element i of group[k]
static void random_blocks(uint64_t seed, const uint64_t (&group)[W], uint16_t* words) {
    Words low, high;
    for (int p = 0; p < W; ++p) {  // in the order in which the transposition below restores theirs
        const uint64_t g = group[W > 4 ? p % 4 * (W / 4) + p / 4 : p];
        low[p] = (uint32_t)g;
        high[p] = (uint32_t)(g >> 32);
    }
    const PhiloxOf<Words> block = philox(seed, PhiloxOf<Words>{{low, high, Words{}, Words{}}});
    Words quarter[4];  // each all four words of W / 4 blocks
#define LB_TRANSPOSE(prefix, suffix)                                                      \
    const auto a = prefix##_unpacklo_epi32((suffix)block.word[0], (suffix)block.word[1]); \
    const auto b = prefix##_unpackhi_epi32((suffix)block.word[0], (suffix)block.word[1]); \
    const auto c = prefix##_unpacklo_epi32((suffix)block.word[2], (suffix)block.word[3]); \
    const auto d = prefix##_unpackhi_epi32((suffix)block.word[2], (suffix)block.word[3]); \
    quarter[0] = (Words)prefix##_unpacklo_epi64(a, c);                                    \
    quarter[1] = (Words)prefix##_unpackhi_epi64(a, c);                                    \
    quarter[2] = (Words)prefix##_unpacklo_epi64(b, d);                                    \
    quarter[3] = (Words)prefix##_unpackhi_epi64(b, d);
#if defined(__AVX512F__)
    LB_TRANSPOSE(_mm512, __m512i)
#elif defined(__AVX2__)
    LB_TRANSPOSE(_mm256, __m256i)
#else
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 4; ++i) quarter[k][i] = block.word[i][k];
#endif
    memcpy(words, quarter, sizeof quarter);
}

// The random words of WIDTH elements in each of ROWS rows.
template <int ROWS, int WIDTH> struct RandomWords {
    uint16_t words[ROWS * (WIDTH + 8) + 8 * W];
    const uint16_t* row[ROWS];
    // first: index of the first element; the rows are `stride` elements apart
    void fill(uint64_t seed, uint64_t first, uint64_t stride) {
        const int groups = WIDTH / 8 + ((first | stride) % 8 != 0), all = ROWS * groups;
        for (int k = 0; k < ROWS; ++k) row[k] = words + 8 * groups * k + (first + k * stride) % 8;
        for (int n = 0, k = 0, g = 0; n < all; n += W) {
            uint64_t group[W];
            for (int p = 0; p < W; ++p) {
                group[p] = ((first + k * stride) >> 3) + g;
                if (++g == groups) g = 0, ++k;
            }
            random_blocks(seed, group, words + 8 * n);
        }
    }
};

// ---- memory

constexpr int64_t STREAM = 4 << 20;  // a result larger than this does not pass through the caches

LB_FN void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the L2 cache; any address will do

// 64 values from 0 to 255, as bytes
LB_FN void narrow_line(const I (&v)[64 / W], uint8_t* line) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_store_si512(line, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int half = 0; half < 2; ++half) {
        const I* from = v + 4 * half;
        const __m256i low = _mm256_packs_epi32((__m256i)from[0], (__m256i)from[1]);
        const __m256i high = _mm256_packs_epi32((__m256i)from[2], (__m256i)from[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_store_si256((__m256i*)line + half, bytes);
    }
#else
    for (int k = 0; k < 64 / W; ++k) store_codes(line + k * W, v[k], W);
#endif
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
