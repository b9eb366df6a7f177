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
#include "over_root.h"
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

// The addresses of one block. In packets: those of the thread's first element.
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

template <int S = 0> LB_FN bool states_aligned(const Block& b) {
    if constexpr (S < RULE_STATES) return Mine::aligned(b.template state_at<S>()) && states_aligned<S + 1>(b);
    else return true;
}
LB_FN bool aligned(const Block& b) {
#if REMAINDER
    if (!Mine::aligned(b.remainder)) return false;
#endif
    return Mine::aligned(b.p) && Mine::aligned(b.g) && states_aligned(b);
}

// The same addresses, so many elements and blocks later.
template <int S = 0, class Count> LB_FN void move_states(Block& b, Count elements, Count blocks) {
    if constexpr (S < RULE_STATES) {
        b.state[S] = b.template state_at<S>() + elements;
        if constexpr (coded<S>()) b.scale[S] += blocks;
        move_states<S + 1>(b, elements, blocks);
    }
}
template <class Count> LB_FN Block moved(Block b, Count elements, Count blocks) {
    b.p += elements;
    b.g += elements;
#if REMAINDER
    b.remainder += elements;
#endif
    move_states(b, elements, blocks);
    return b;
}

template <int S = 0> LB_FN void point_to_states(const Parameter& q, Block& b) {
    if constexpr (S < RULE_STATES) {
        b.state[S] = q.state[S];
        if constexpr (coded<S>()) b.scale[S] = q.scales[S];
        point_to_states<S + 1>(q, b);
    }
}
LB_FN Block block_at(const Parameter& q, const Position& at) {
    Block b;
    b.p = (PARAM*)q.p;
    b.g = (const GRAD*)q.g;
#if REMAINDER
    b.remainder = q.remainder;
#endif
    point_to_states(q, b);
    b.at = at;
    return moved(b, at.start, at.block);
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

// Goes with a group of threads from block to block, GROUPS further in each turn, and keeps in registers what it knows
// of the parameter that it is at: a turn at a parameter whose blocks are all full costs few instructions.
struct Walk {
    const Parameter* parameters;
    int64_t count, blocks;  // of all parameters
    int64_t number;         // of the group's block in turn 0
    const Scalars* scalars;
    int64_t i = -1;          // the parameter
    int begin = 0, end = 0;  // the turns at it
    bool whole = false;      // every block of it is full, and every access to it aligned
    bool active = false;     // there is a parameter
    Block first;             // that of turn `begin`, of a whole parameter; the thread's first element
    Scalars kept;

    // Of the parameter. Beside the values of three states there is no room in registers.
    LB_METHOD Scalars c() const { return RULE_STATES > 2 ? scalars[i] : kept; }
    // Before each turn. Whether the group comes to a parameter.
    LB_METHOD bool go(int turn) {
        if (turn < end) return false;
        begin = turn;
        end = 0x7fffffff;
        whole = false;
        const int64_t block = number + (int64_t)turn * GROUPS;
        active = block < blocks;
        if (!active) return true;
        if (i < 0) i = find_parameter(parameters, count, block);
        while (block >= parameters[i + 1].first_block) ++i;
        const Parameter& q = parameters[i];
        const int64_t turns = (parameters[i + 1].first_block - block + GROUPS - 1) / GROUPS;
        if (turns < end - turn) end = turn + (int)turns;
        const int64_t mine = block - q.first_block;
        first = block_at(q, {mine * BLOCK, mine, BLOCK});
        whole = q.row_length % BLOCK == 0 && aligned(first);
        first = moved(first, Mine::index(0), 0);
        kept = scalars[i];
        return true;
    }
    // Of a whole parameter.
    LB_METHOD Block whole_block(int turn) const {
        const uint32_t by = (uint32_t)(turn - begin) * GROUPS;
        Block b = moved(first, by * BLOCK, by);
        if (STOCHASTIC) b.at.start += by * BLOCK;
        return b;
    }
    LB_METHOD Block block(int turn) const {
        const Parameter& q = parameters[i];
        const int64_t mine = number + (int64_t)turn * GROUPS - q.first_block;
        Block b = block_at(q, position_of(mine, q.blocks_per_row, q.row_length));
        b.packets = b.at.n == BLOCK && aligned(b);
        return b.packets ? moved(b, Mine::index(0), 0) : b;
    }
};

template <bool PACKETS, int S = 0> LB_FN void load_states(const Block& b, Elements& e, uint32_t place) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) {
            int32_t code[PER_THREAD];
            assume_global(b.scale[S]);
            e.scale[S] = *b.scale[S];
            Mine::load<PACKETS>((const uint8_t*)b.state[S], b.at.n, code);
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) e.s[S][i] = decode<Map<S>, V, I>(code[i], place);
        } else {
            e.scale[S] = 1.0f;
            Mine::load<PACKETS>((const float*)b.state[S], b.at.n, e.s[S]);
        }
        load_states<PACKETS, S + 1>(b, e, place);
    }
}
template <bool PACKETS> LB_FN void load(const Block& b, Elements& e, uint32_t place) {
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
    load_states<PACKETS>(b, e, place);
}

enum Part { DIRECTION, FINISH };
template <Part PART, class Roots> LB_FN void apply(const Scalars& c, Elements& e, int i, Roots& roots) {
    float s[STATES], t[TEMPORARIES];
#pragma unroll
    for (int k = 0; k < RULE_STATES; ++k) s[k] = e.s[k][i];
    if (PART == FINISH)
#pragma unroll
        for (int k = 0; k < RULE_TEMPORARIES; ++k) t[k] = e.t[k][i];
    if (PART == DIRECTION) rule_direction(c, e.p[i], e.g[i], s, e.scale, t, roots);
    else rule_finish(c, e.p[i], e.g[i], s, t, roots);
#pragma unroll
    for (int k = 0; k < RULE_STATES; ++k) e.s[k][i] = s[k];
#pragma unroll
    for (int k = 0; k < RULE_TEMPORARIES; ++k) e.t[k][i] = t[k];
}
