// The fused optimizer step on the GPU: decode, update, re-encode and write in one pass over memory, all parameters of a
// group in one launch. What it means is said in the reference. The quantisation blocks of all parameters are numbered
// through and shared out to CUDA blocks.
//
// Specialised by the macros of optimizer_block.h and STOCHASTIC (1: parameters are rounded at random).
#include "optimizer_block.h"
#include "master.h"
#include "philox.h"
#include "step_settings.h"

LB_FN uint32_t random_bits(const Philox& words, int i) {  // by selections: an array in registers has no index
    const uint32_t low = i & 2 ? words.word[1] : words.word[0], high = i & 2 ? words.word[3] : words.word[2];
    return (i & 4 ? high : low) >> (16 * (i & 1)) & 0xffff;
}

template <bool PACKETS> LB_FN void store_parameter(const Block& b, const float (&v)[PER_THREAD], const uint64_t seed,
                                                   uint32_t ordinal, uint32_t step, int64_t offset) {
    PARAM rounded[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) rounded[i] = narrow<PARAM>(v[i]);
#if STOCHASTIC
    static_assert(sizeof(PARAM) == 2, "a thread's eight elements are adjacent");
    const uint64_t first = (uint64_t)(offset + b.at.start + Mine::index(0));
    const int shift = (int)(first & 7);  // eight indices that a shard may cut out of two groups of random words
    const Philox group = philox(seed, ordinal, step, first >> 3);
    const Philox next = shift ? philox(seed, ordinal, step, (first >> 3) + 1) : group;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const uint32_t word = shift + i < 8 ? random_bits(group, shift + i) : random_bits(next, shift + i);
        if (magnitude_bits(v[i]) < INFINITE) rounded[i].bits = (uint16_t)(((uint32_t)to_bits(v[i]) + word) >> 16);
    }
#endif
#if REMAINDER
    int32_t remainder[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const Master<uint32_t> master = split_master((uint32_t)to_bits(v[i]));
        const bool finite = magnitude_bits(v[i]) < INFINITE;
        if (finite) rounded[i].bits = (uint16_t)master.upper;
        remainder[i] = finite ? (int32_t)master.remainder : 0;
    }
    Mine::store<PACKETS>(b.remainder, b.at.n, remainder);
#endif
    Mine::store<PACKETS>(b.p, b.at.n, rounded);
}

// The scale keys of an element. Of a state that is not finite, or below zero where none can be, it is too large.
LB_FN constexpr uint32_t too_large(bool is_signed) { return is_signed ? INFINITE << 1 : INFINITE; }
template <int S = 0> LB_FN void raise_keys(const Elements& e, int i, uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) {
            const uint32_t one = Map<S>::is_signed ? scale_key(e.s[S][i], true) : (uint32_t)to_bits(e.s[S][i]);
            key[S] = key[S] > one ? key[S] : one;
        }
        raise_keys<S + 1>(e, i, key);
    }
}
template <int S = 0> LB_FN bool all_below(const uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        return (!coded<S>() || key[S] < too_large(Map<S>::is_signed)) && all_below<S + 1>(key);
    } else {
        return true;
    }
}

// What that does not hold for, it is done again with more care: an element any of whose coded states is not finite has
// all its states set to zero, those in 32 bits too. The others decide on the scales.
template <int S = 0> LB_FN bool all_finite(const Elements& e, int i) {
    if constexpr (S < RULE_STATES) {
        const bool rest = all_finite<S + 1>(e, i);
        return coded<S>() ? rest && magnitude_bits(e.s[S][i]) < INFINITE : rest;
    } else {
        return true;
    }
}
template <int S = 0> LB_FN void keep(Elements& e, int i, bool kept, uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        if (!kept) e.s[S][i] = 0.0f;
        if constexpr (coded<S>()) {
            const uint32_t one = scale_key(e.s[S][i], Map<S>::is_signed);
            key[S] = key[S] > one ? key[S] : one;
        }
        keep<S + 1>(e, i, kept, key);
    }
}

LB_FN void keep_what_counts(const Block& b, Elements& e, uint32_t (&key)[STATES]) {
    for (int s = 0; s < STATES; ++s) key[s] = 0;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) keep(e, k, all_finite(e, k) && Mine::index(k) < b.at.n, key);
}

template <bool PACKETS, int S = 0> LB_FN void store_states(const Block& b, const Elements& e, uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) {
            const float scale = scale_of(key[S], Map<S>::is_signed), inverse = reciprocal(scale);
            int32_t code[PER_THREAD];
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) code[i] = encode<Map<S>, V, I>(e.s[S][i], inverse);
            Mine::store<PACKETS>((uint8_t*)b.state[S], b.at.n, code);
            assume_global(b.scale[S]);
            if (threadIdx.x % GROUP == 0) *b.scale[S] = scale;
        } else {
            Mine::store<PACKETS>((float*)b.state[S], b.at.n, e.s[S]);
        }
        store_states<PACKETS, S + 1>(b, e, key);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) step(
    const Parameter* parameters, int64_t count, int64_t blocks, int blocks_per_group, const Scalars* scalars,
    const float* factor, const StepSettings told) {
    if (skipped(told)) return;
    prepare_lines(uses_map(true), uses_map(false));
    Walk walk{parameters, count};
    int64_t number = (int64_t)blockIdx.x * blocks_per_group * GROUPS + threadIdx.x / GROUP;
    // Every thread takes every turn, also without a block of its own: group_max needs all of them.
    for (int turn = 0; turn < blocks_per_group; ++turn, number += GROUPS) {
        Elements e;
        Block b;
        uint32_t key[STATES] = {};
        const bool active = number < blocks;
        if (active) {
            b = walk.to(number);
            if (b.packets) load<true>(b, e);
            else load<false>(b, e);
            const Scalars c = scalars[walk.i];
            const float f = *factor;
#pragma unroll
            for (int k = 0; k < PER_THREAD; ++k) {
                e.g[k] *= f;
                apply<DIRECTION>(c, e, k);
                apply<FINISH>(c, e, k);
                raise_keys(e, k, key);
            }
            if (!b.packets || !all_below(key)) keep_what_counts(b, e, key);
            const Parameter& q = parameters[walk.i];
            const uint32_t steps = STOCHASTIC ? step_word(*q.step) : 0;
            if (b.packets) store_parameter<true>(b, e.p, told.seed, (uint32_t)q.ordinal, steps, q.offset);
            else store_parameter<false>(b, e.p, told.seed, (uint32_t)q.ordinal, steps, q.offset);
        }
        if (CODED) group_max<GROUP>(key);
        if (active) {
            if (b.packets) store_states<true>(b, e, key);
            else store_states<false>(b, e, key);
        }
    }
}
