// What int8_quantize.cpp is made of: random words, lines of memory, and the transposition of a square of words.
#pragma once
#include "vec.h"

// ---- random words

typedef uint64_t Words __attribute__((vector_size(4 * W)));  // of BLOCKS Philox blocks, in the lanes' lower halves
constexpr int BLOCKS = W / 2;

LB_FN void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
#if defined(__AVX512F__)
    low = (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    low = (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    low = (a & 0xffffffff) * b;
#endif
    high = low >> 32;
}
#include "philox.h"

// words[8 k + i] = the random word of element i of group `group` + k, for BLOCKS groups
LB_FN void random_blocks(uint64_t seed, uint64_t group, uint16_t* words) {
    Words groups;
    for (int p = 0; p < BLOCKS; ++p) groups[p] = group + p / 2 + p % 2 * (BLOCKS / 2);
    const PhiloxOf<Words> block = philox(seed, PhiloxOf<Words>{{groups, groups >> 32, Words{}, Words{}}});
    const Words low = (block.word[0] & 0xffffffff) | block.word[1] << 32;
    const Words high = (block.word[2] & 0xffffffff) | block.word[3] << 32;
    Words ordered[2];
#if defined(__AVX512F__)
    ordered[0] = (Words)_mm512_unpacklo_epi64((__m512i)low, (__m512i)high);
    ordered[1] = (Words)_mm512_unpackhi_epi64((__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
    ordered[0] = (Words)_mm256_unpacklo_epi64((__m256i)low, (__m256i)high);
    ordered[1] = (Words)_mm256_unpackhi_epi64((__m256i)low, (__m256i)high);
#else
    for (int k = 0; k < 2; ++k) ordered[k] = Words{low[k], high[k]};
#endif
    memcpy(words, ordered, sizeof ordered);
}

// The random words of up to WIDTH elements in each of ROWS rows.
template <int ROWS, int WIDTH> struct RandomWords {
    uint16_t words[ROWS][WIDTH + 8 + 8 * BLOCKS];
    const uint16_t* row[ROWS];
    void fill(int k, uint64_t seed, uint64_t first, int64_t count) {  // first: index of the first element
        const int64_t before = first % 8;
        for (int64_t n = 0; n < before + count; n += 8 * BLOCKS) random_blocks(seed, (first + n) / 8, words[k] + n);
        row[k] = words[k] + before;
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
