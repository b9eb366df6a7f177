// The table of parameters that the optimizer kernels read; structs.py builds it.
#pragma once

constexpr int STATES = RULE_STATES ? RULE_STATES : 1;
constexpr int HYPER = RULE_HYPER ? RULE_HYPER : 1;

// One parameter. One more row ends the table; only its first_block counts.
struct Parameter {
    void* p;
    const void* g;
    float* step;
    void* state[STATES];
    float* scales[STATES];
    uint8_t* remainder;  // the bits of int8, or null
    int64_t row_length, blocks_per_row, ordinal, offset;
    int64_t first_block;  // the number of its first block among those of all parameters
};
