// What the optimizer kernels do with one quantisation block: find it, load it, apply the rule.
//
// Specialised by macros: BLOCK (elements), PARAM and GRAD (float, Half, BFloat16), CODED (bit s: state s is 8-bit
// codes, else float), REMAINDER (1: bfloat16 parameters have eight more bits); and by the rule's generated text.
#pragma once
#include "gpu.h"
#include "scale.h"
#include "group.h"
#include "dynamic_tables.h"  // generated from formats/maps.py
#include "dynamic_lines.h"
#include "dynamic_map.h"
#include "rule_scalars.h"
#include "rule.h"  // generated from the rule
#include "master.h"
#include "parameter.h"

typedef Share<16 / sizeof(PARAM)> Mine;  // 16 bytes per access to the parameter
constexpr int TEMPORARIES = RULE_TEMPORARIES ? RULE_TEMPORARIES : 1;

template <int S> LB_FN constexpr bool coded() { return S < RULE_STATES && (CODED >> S & 1); }
template <int S> using Map = typename MapOf<RULE_NON_NEGATIVE[S]>::Constants;

template <int S = 0> LB_FN bool uses_map(bool is_signed) {
    if constexpr (S < RULE_STATES) return (coded<S>() && Map<S>::is_signed == is_signed) || uses_map<S + 1>(is_signed);
    else return false;
}

// A thread's eight elements.
struct Elements {
    float p[PER_THREAD], g[PER_THREAD], s[STATES][PER_THREAD], t[TEMPORARIES][PER_THREAD];
    float scale[STATES];  // of the block's states, 1 in 32 bits
};

// The addresses of one block.
struct Block {
    PARAM* p;
    const GRAD* g;
    void* state[STATES];
    float* scale[STATES];
    uint8_t* remainder;
    Position at;
    bool packets;

    template <int S> LB_METHOD auto state_at() const {
        if constexpr (coded<S>()) return (uint8_t*)state[S];
        else return (float*)state[S];
    }
};

template <int S = 0> LB_FN void point_to_states(const Parameter& q, Block& b) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) {
            b.state[S] = (uint8_t*)q.state[S] + b.at.start;
            b.scale[S] = q.scales[S] + b.at.block;
        } else {
            b.state[S] = (float*)q.state[S] + b.at.start;
        }
        point_to_states<S + 1>(q, b);
    }
}
template <int S = 0> LB_FN bool states_aligned(const Block& b) {
    if constexpr (S < RULE_STATES) return Mine::aligned(b.template state_at<S>()) && states_aligned<S + 1>(b);
    else return true;
}
LB_FN Block block_at(const Parameter& q, const Position& at) {
    Block b;
    b.at = at;
    b.p = (PARAM*)q.p + at.start;
    b.g = (const GRAD*)q.g + at.start;
#if REMAINDER
    b.remainder = q.remainder + at.start;
#endif
    point_to_states(q, b);
    return b;
}
LB_FN bool aligned(const Block& b) {
#if REMAINDER
    if (!Mine::aligned(b.remainder)) return false;
#endif
    return Mine::aligned(b.p) && Mine::aligned(b.g) && states_aligned(b);
}

// The parameter that block `number` belongs to: the last whose first block is not after it.
LB_FN int64_t find_parameter(const Parameter* parameters, int64_t count, int64_t number) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (parameters[middle].first_block <= number) low = middle;
        else high = middle;
    }
    return low;
}

// Goes from block to block, forward, and remembers what it knows of a parameter.
struct Walk {
    const Parameter* parameters;
    int64_t count;
    int64_t i = -1, end = 0;  // the parameter, and the number of the first block after it
    bool whole = false;       // every block of it is full, and every access to it aligned

    LB_METHOD Block to(int64_t number) {
        if (number >= end) {
            if (i < 0) i = find_parameter(parameters, count, number);
            while (number >= parameters[i + 1].first_block) ++i;
            end = parameters[i + 1].first_block;
            whole = parameters[i].row_length % BLOCK == 0 && aligned(block_at(parameters[i], {}));
        }
        const Parameter& q = parameters[i];
        const int64_t mine = number - q.first_block;
        Block b = block_at(q, whole ? Position{mine * BLOCK, mine, BLOCK}
                                    : position_of(mine, q.blocks_per_row, q.row_length));
        b.packets = whole || (b.at.n == BLOCK && aligned(b));
        return b;
    }
};

template <bool PACKETS, int S = 0> LB_FN void load_states(const Block& b, Elements& e) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) {
            int32_t code[PER_THREAD];
            assume_global(b.scale[S]);
            e.scale[S] = *b.scale[S];
            Mine::load<PACKETS>((const uint8_t*)b.state[S], b.at.n, code);
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) e.s[S][i] = decode<Map<S>, V, I>(code[i]);
        } else {
            e.scale[S] = 1.0f;
            Mine::load<PACKETS>((const float*)b.state[S], b.at.n, e.s[S]);
        }
        load_states<PACKETS, S + 1>(b, e);
    }
}
template <bool PACKETS> LB_FN void load(const Block& b, Elements& e) {
    Mine::load<PACKETS>(b.p, b.at.n, e.p);
#if REMAINDER
    int32_t remainder[PER_THREAD];
    Mine::load<PACKETS>((const uint8_t*)b.remainder, b.at.n, remainder);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const uint32_t upper = (uint32_t)to_bits(e.p[i]) >> 16;
        e.p[i] = from_bits((int32_t)join_master(upper, (uint32_t)(int8_t)remainder[i]));
    }
#endif
    Mine::load<PACKETS>(b.g, b.at.n, e.g);
    load_states<PACKETS>(b, e);
}

enum Part { DIRECTION, FINISH };
template <Part PART> LB_FN void apply(const Scalars& c, Elements& e, int i) {
    float s[STATES], t[TEMPORARIES];
#pragma unroll
    for (int k = 0; k < RULE_STATES; ++k) s[k] = e.s[k][i];
    if (PART == FINISH)
#pragma unroll
        for (int k = 0; k < RULE_TEMPORARIES; ++k) t[k] = e.t[k][i];
    if (PART == DIRECTION) rule_direction(c, e.p[i], e.g[i], s, e.scale, t);
    else rule_finish(c, e.p[i], e.g[i], s, t);
#pragma unroll
    for (int k = 0; k < RULE_STATES; ++k) e.s[k][i] = s[k];
#pragma unroll
    for (int k = 0; k < RULE_TEMPORARIES; ++k) e.t[k][i] = t[k];
}
