// Random words for the CPU backend, a vector of Philox blocks at a time.
#pragma once
#include "vec.h"

typedef uint64_t Words __attribute__((vector_size(4 * W)));  // of BLOCKS Philox blocks, in the lanes' lower halves
constexpr int BLOCKS = W / 2;

LB_FN void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
#if LB_AVX512
    low = (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LB_AVX2
    low = (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    low = (a & 0xffffffff) * b;
#endif
    high = low >> 32;
}
#include "philox.h"

// What random words depend on, beside the element's index.
struct RandomKey {
    uint64_t seed;
    uint32_t ordinal, step;
};

// words[8 k + i] = the random word of element i of group `group` + k, for BLOCKS groups
LB_FN void random_blocks(const RandomKey& key, uint64_t group, uint16_t* words) {
    Words order;  // a constant, unlike the sum lane by lane
    for (int p = 0; p < BLOCKS; ++p) order[p] = p / 2 + p % 2 * (BLOCKS / 2);
    const Words groups = order + group;
    const Words step = Words{} + key.step, ordinal = Words{} + key.ordinal;
    const PhiloxOf<Words> block = philox(key.seed, PhiloxOf<Words>{{groups, groups >> 32, step, ordinal}});
    const Words low = (block.word[0] & 0xffffffff) | block.word[1] << 32;
    const Words high = (block.word[2] & 0xffffffff) | block.word[3] << 32;
    Words ordered[2];
#if LB_AVX512
    ordered[0] = (Words)_mm512_unpacklo_epi64((__m512i)low, (__m512i)high);
    ordered[1] = (Words)_mm512_unpackhi_epi64((__m512i)low, (__m512i)high);
#elif LB_AVX2
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
    RandomWords() {  // also where none are asked for, addresses are computed from `row`
        for (int k = 0; k < ROWS; ++k) row[k] = words[k];
    }
    void fill(int k, const RandomKey& key, uint64_t first, int64_t count) {  // first: index of the first element
        const int64_t before = first % 8;
        for (int64_t n = 0; n < before + count; n += 8 * BLOCKS) random_blocks(key, (first + n) / 8, words[k] + n);
        row[k] = words[k] + before;
    }
};
