// The fused optimizer step on the GPU: decode, update, re-encode and write in one pass over memory, all parameters of a
// group in one launch. What it means is said in the reference. The quantisation blocks of all parameters are numbered
// through and shared out to CUDA blocks.
//
// Specialised by the macros of optimizer_block.h and STOCHASTIC (1: parameters are rounded at random).
#include "optimizer_block.h"
#include "quick_codes.h"
#include "master.h"
#include "philox.h"
#include "step_settings.h"

LB_FN uint32_t random_bits(const Philox& words, int i) {  // by selections: an array in registers has no index
    const uint32_t low = i & 2 ? words.word[1] : words.word[0], high = i & 2 ? words.word[3] : words.word[2];
    return (i & 4 ? high : low) >> (16 * (i & 1)) & 0xffff;
}

template <bool PACKETS>
LB_FN void store_parameter(const Block& b, const float (&v)[PER_THREAD], uint64_t seed, const Parameter& q) {
#if !STOCHASTIC && !REMAINDER
    Mine::store_rounded<PACKETS>(b.p, b.at.n, v);
#else
    PARAM rounded[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) rounded[i] = narrow<PARAM>(v[i]);
#if STOCHASTIC
    static_assert(sizeof(PARAM) == 2, "a thread's eight elements are adjacent");
    const uint64_t first = (uint64_t)(q.offset + b.at.start + Mine::index(0));
    const uint32_t ordinal = (uint32_t)q.ordinal, step = step_word(*q.step);
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
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of any kind

// An element any of whose coded states is not finite has all its states set to zero, those in 32 bits too. A value
// below zero of a state that has none counts as zero. The others decide on the scales.
template <int S = 0> LB_FN bool all_finite(const Elements& e, int i) {
    if constexpr (S < RULE_STATES) {
        const bool rest = all_finite<S + 1>(e, i);
        return coded<S>() ? rest && magnitude_bits(e.s[S][i]) < INFINITE : rest;
    } else {
        return true;
    }
}
template <int S = 0> LB_FN void keep(Elements& e, int i, bool kept) {
    if constexpr (S < RULE_STATES) {
        if (!kept || (coded<S>() && !Map<S>::is_signed && !(e.s[S][i] > 0.0f))) e.s[S][i] = 0.0f;
        keep<S + 1>(e, i, kept);
    }
}

template <int S = 0> LB_FN void raise_keys(const Elements& e, int i, uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) key[S] = unsigned_maximum(key[S], scale_key(e.s[S][i], Map<S>::is_signed));
        raise_keys<S + 1>(e, i, key);
    }
}

template <bool PACKETS>
LB_FN void update(
    const Block& b, const Scalars& c, float factor, uint32_t place, Elements& e, uint32_t (&key)[STATES]) {
    Exact roots;
    load<PACKETS>(b, e, place);
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        e.g[k] *= factor;
        apply<DIRECTION>(c, e, k, roots);
        apply<FINISH>(c, e, k, roots);
        keep(e, k, all_finite(e, k) && Mine::index(k) < b.at.n);
        raise_keys(e, k, key);
    }
}

template <bool PACKETS, int S> LB_FN void store_codes(const Block& b, const Elements& e, float scale, uint32_t place) {
    const float inverse = reciprocal(scale);
    int32_t code[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) code[i] = encode<Map<S>, V, I>(e.s[S][i], inverse, place);
    Mine::store<PACKETS>((uint8_t*)b.state[S], b.at.n, code);
    assume_global(b.scale[S]);
    if (threadIdx.x % GROUP == 0) *b.scale[S] = scale;
}
template <bool PACKETS, int S = 0>
LB_FN void store_states(const Block& b, const Elements& e, const uint32_t (&key)[STATES], uint32_t place) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>()) store_codes<PACKETS, S>(b, e, scale_of(key[S], Map<S>::is_signed), place);
        else Mine::store<PACKETS>((float*)b.state[S], b.at.n, e.s[S]);
        store_states<PACKETS, S + 1>(b, e, key, place);
    }
}

// Every thread takes part, also without a block of its own: group_max needs all of them.
LB_FN void careful_turn(const Walk& walk, int turn, float factor, uint64_t seed, uint32_t place) {
    Block b;
    Elements e;
    uint32_t key[STATES] = {};
    if (walk.active) {
        b = walk.block(turn);
        const Scalars c = walk.c();
        if (b.packets) update<true>(b, c, factor, place, e, key);
        else update<false>(b, c, factor, place, e, key);
        if (b.packets) store_parameter<true>(b, e.p, seed, walk.parameters[walk.i]);
        else store_parameter<false>(b, e.p, seed, walk.parameters[walk.i]);
    }
    if (CODED) group_max<GROUP>(key);
    if (walk.active) {
        if (b.packets) store_states<true>(b, e, key, place);
        else store_states<false>(b, e, key, place);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Full blocks of numbers that are not special, in few instructions: the same results

// What the values of a coded state say, as bits of which the largest decides: of both signs the magnitude, of squares
// their key.
template <int S = 0> LB_FN void raise_quick_keys(const Elements& e, int i, uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded<S>() && Map<S>::is_signed)
            key[S] = (uint32_t)to_bits(raised(from_bits((int32_t)key[S]), e.s[S][i]));
        else if constexpr (coded<S>()) key[S] = unsigned_maximum(key[S], square_key(e.s[S][i]));
        raise_quick_keys<S + 1>(e, i, key);
    }
}
template <int S = 0> LB_FN bool not_special(const uint32_t (&key)[STATES]) {
    if constexpr (S < RULE_STATES)
        return (!coded<S>() || (Map<S>::is_signed ? key[S] < INFINITE : square_in_range(key[S]))) &&
            not_special<S + 1>(key);
    else return true;
}

template <int S> LB_FN void store_signed(const Block& b, const Elements& e, float most, uint32_t place) {
    uint32_t word[PER_THREAD / 4];
    float scale;
    if (!encode_signed<Map<S>>(e.s[S], most, place, word, scale)) {
        uint32_t key[1] = {0};
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) key[0] = unsigned_maximum(key[0], scale_key(e.s[S][i], true));
        group_max<GROUP>(key);
        store_codes<true, S>(b, e, scale_of(key[0], true), place);
        return;
    }
    Mine::store_bytes((uint8_t*)b.state[S], word);
    assume_global(b.scale[S]);
    if (threadIdx.x % GROUP == 0) *b.scale[S] = scale;
}
template <int S> LB_FN void store_squares(const Block& b, const Elements& e, float scale, uint32_t place) {
    const float inverse = quick_reciprocal(scale);
    uint32_t word[PER_THREAD / 4];
#pragma unroll
    for (int i = 0; i < PER_THREAD / 4; ++i)
        word[i] = unsigned_codes(encode_bytes<Map<S>>(e.s[S] + 4 * i, inverse, place));
    Mine::store_bytes((uint8_t*)b.state[S], word);
    assume_global(b.scale[S]);
    if (threadIdx.x % GROUP == 0) *b.scale[S] = scale;
}
template <int S = 0>
LB_FN void store_states_quickly(const Block& b, const Elements& e, const uint32_t (&key)[STATES], uint32_t place) {
    if constexpr (S < RULE_STATES) {
        if constexpr (!coded<S>()) Mine::store<true>((float*)b.state[S], b.at.n, e.s[S]);
        else if constexpr (Map<S>::is_signed) store_signed<S>(b, e, from_bits((int32_t)key[S]), place);
        else store_squares<S>(b, e, from_bits((int32_t)(key[S] + LOWEST_SQUARE)), place);
        store_states_quickly<S + 1>(b, e, key, place);
    }
}

// Registers decide: random words take as many as a state, where there are few.
constexpr bool HURRY = RULE_STATES + (STOCHASTIC && (THREADS > 256 || RULE_STATES > 2)) <= (GROUP <= 32 ? 3 : 2);

// False, and nothing is done, if a group has not such a block.
LB_FN bool quick_turn(const Walk& walk, int turn, float factor, uint64_t seed, uint32_t place) {
    if (!(GROUP == 32 ? walk.whole : holds_for_all(walk.whole))) return false;
    const Block b = walk.whole_block(turn);
    const Scalars c = walk.c();
    Elements e;
    uint32_t key[STATES] = {};
    Quick roots;
    load<true>(b, e, place);
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        e.g[k] *= factor;
        apply<DIRECTION>(c, e, k, roots);
        apply<FINISH>(c, e, k, roots);
        raise_quick_keys(e, k, key);
    }
    if (!holds_for_all(not_special(key) && roots.sure())) return false;
    store_parameter<true>(b, e.p, seed, walk.parameters[walk.i]);
    if (CODED) group_max<GROUP>(key);
    store_states_quickly(b, e, key, place);
    return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 256 || RULE_STATES > 2 ? 1 : 2) step(
    const Parameter* parameters, int64_t count, int64_t blocks, int blocks_per_group, const Scalars* scalars,
    const float* factor, const StepSettings told) {
    if (skipped(told)) return;
    const uint32_t place = prepare_tables(uses_map(true), uses_map(false));
    const int64_t number = (int64_t)blockIdx.x * blocks_per_group * GROUPS + threadIdx.x / GROUP;
    Walk walk{parameters, count, blocks, number, scalars};
    const float f = *factor;
    for (int turn = 0; turn < blocks_per_group; ++turn) {
        if (walk.go(turn)) walk.whole = walk.whole && rule_allows<Quick>(walk.c());
        const int last = (walk.end < blocks_per_group ? walk.end : blocks_per_group) - 1;
        for (;; ++turn) {
            if (!(HURRY && quick_turn(walk, turn, f, told.seed, place)))
                careful_turn(walk, turn, f, told.seed, place);
            if (GROUP != 32 || turn >= last) break;  // a warp that is one group stays here while it is at one parameter
        }
    }
}
