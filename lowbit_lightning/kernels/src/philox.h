// Philox4x32-10 (Salmon et al., 2011): 16 random bits for an element, keyed by seed, parameter, step and global
// index, as in the reference.
#pragma once

template <class Word> struct PhiloxOf { Word word[4]; };  // of one block, or of as many as a vector has lanes
typedef PhiloxOf<uint32_t> Philox;

LB_FN void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    const uint64_t product = (uint64_t)a * b;
    high = (uint32_t)(product >> 32);
    low = (uint32_t)product;
}

// Of vectors too, where multiply_wide for them stands before this file.
template <class Word> LB_FN PhiloxOf<Word> philox(uint64_t seed, PhiloxOf<Word> c) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        Word high_a, low_a, high_b, low_b;
        multiply_wide(c.word[0], 0xD2511F53u, high_a, low_a);
        multiply_wide(c.word[2], 0xCD9E8D57u, high_b, low_b);
        c = {{high_b ^ c.word[1] ^ key0, low_b, high_a ^ c.word[3] ^ key1, low_a}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}
LB_FN Philox philox(uint64_t seed, uint32_t ordinal, uint32_t step, uint64_t group) {
    return philox(seed, Philox{{(uint32_t)group, (uint32_t)(group >> 32), step, ordinal}});
}

// The step as it enters the random words: 0 if the count is not a valid one, as in a damaged checkpoint.
LB_FN uint32_t step_word(float step) { return step >= 0.0f && step < 0x1p32f ? (uint32_t)step : 0; }

// The 16 bits of element `index` from the Philox block of its group, index / 8.
LB_FN uint32_t random_word(const Philox& block, uint64_t index) {
    return block.word[index >> 1 & 3] >> (16 * (index & 1)) & 0xffff;
}
