// Philox4x32-10 (Salmon et al., 2011): 16 random bits for an element, keyed by seed, parameter, step and global
// index, as in reference.py.
#pragma once

struct Philox { uint32_t word[4]; };

LB_FN Philox philox(uint64_t seed, uint32_t ordinal, uint32_t step, uint64_t group) {
    Philox c = {{(uint32_t)group, (uint32_t)(group >> 32), step, ordinal}};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)c.word[0] * 0xD2511F53u, b = (uint64_t)c.word[2] * 0xCD9E8D57u;
        const uint32_t high_a = (uint32_t)(a >> 32), high_b = (uint32_t)(b >> 32);
        c = {{high_b ^ c.word[1] ^ key0, (uint32_t)b, high_a ^ c.word[3] ^ key1, (uint32_t)a}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// The 16 bits of element `index` from the Philox block of its group, index / 8.
LB_FN uint32_t random_word(const Philox& block, uint64_t index) {
    return block.word[index >> 1 & 3] >> (16 * (index & 1)) & 0xffff;
}
