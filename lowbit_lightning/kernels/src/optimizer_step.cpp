// The fused optimizer step on the CPU: decode, update, re-encode and write in one pass over memory, all parameters of
// a group in one call.
//
// The text is specialised by macros: PARAM and GRAD (float, Half, BFloat16), BLOCK (elements), CODED (bit s: state s
// is 8-bit codes), STOCHASTIC and REMAINDER (0 or 1); and by the rule's generated text.
#include "vec.h"
#include "parallel.h"
#include "blocks.h"
#include "random_words.h"
#include "rule_scalars.h"
#include "rule.h"  // generated from rules.py
#include <algorithm>
#include <vector>

constexpr int64_t CHUNK = 32768 / BLOCK;  // blocks that a thread takes at a time
constexpr int STATES = RULE_STATES ? RULE_STATES : 1;
constexpr int TEMPORARIES = RULE_TEMPORARIES ? RULE_TEMPORARIES : 1;
constexpr bool coded(int s) { return CODED >> s & 1; }

// One parameter; the layout is that of the rows of int64 that cpu.py builds.
struct Parameter {
    PARAM* p;
    const GRAD* g;
    float* step;
    void* state[3];
    float* scales[3];
    int8_t* remainder;
    int64_t rows, row_length, ordinal, offset;

    int64_t blocks_per_row() const { return (row_length + BLOCK - 1) / BLOCK; }
    int64_t blocks() const { return rows * blocks_per_row(); }
};

// What the whole call shares; the layout is that of cpu.py's ctypes structure.
struct Call {
    const Parameter* parameters;
    int64_t count;
    const double* hyper;
    const float *lr, *unscale, *clip, *skip;
    const double* square_sums;  // [count][RULE_NORMS], or null
    uint64_t seed;
    int32_t maximize, threads;
};

// One block of one parameter.
struct Block {
    Parameter q;
    int64_t start;   // its first element in the parameter
    int64_t number;  // in the parameter
    int n;           // its length
};

// The gradients' factor: unscale * clip, negated to maximize.
static float factor_of(const Call& call) {
    float factor = 1.0f;
    if (call.unscale) factor *= *call.unscale;
    if (call.clip) factor *= *call.clip;
    return call.maximize ? -factor : factor;
}

static Scalars scalars_of(const Call& call, int64_t i, double step, const double* square_sums) {
    double hyper[RULE_HYPER];
    std::copy(call.hyper, call.hyper + RULE_HYPER, hyper);
    if (call.lr) hyper[0] = *call.lr;
    return rule_scalars(hyper, step, square_sums ? square_sums + i * RULE_NORMS : nullptr);
}

// Calls body(parameter index, block) for every block of every parameter, shared among threads.
template <class F> static void for_blocks(const Call& call, const F& body) {
    std::vector<int64_t> first(call.count + 1, 0);
    for (int64_t i = 0; i < call.count; ++i) first[i + 1] = first[i] + call.parameters[i].blocks();
    const int64_t total = first[call.count];
    parallel_for((total + CHUNK - 1) / CHUNK, call.threads, [&](int64_t chunk) {
        const int64_t begin = chunk * CHUNK, end = std::min(total, begin + CHUNK);
        int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t b = begin; b < end; ++b) {
            while (b >= first[i + 1]) ++i;
            const Parameter& q = call.parameters[i];
            const int64_t number = b - first[i], per_row = q.blocks_per_row(), column = number % per_row * BLOCK;
            const int64_t start = number / per_row * q.row_length + column;
            body(i, Block{q, start, number, (int)std::min<int64_t>(BLOCK, q.row_length - column)});
        }
    });
}

template <int S> LB_FN V load_state(const Block& at, int i, int count) {
    if constexpr (coded(S)) {
        typedef typename MapOf<RULE_NON_NEGATIVE[S]>::Constants C;
        const I counted = load_counted((const uint8_t*)at.q.state[S] + at.start + i, count);
        return decode<C, V, I>(counted) * at.q.scales[S][at.number];
    } else {
        return load((const float*)at.q.state[S] + at.start + i, count);
    }
}
template <int S = 0> LB_FN void load_states(const Block& at, int i, int count, V* s) {
    if constexpr (S < RULE_STATES) {
        s[S] = load_state<S>(at, i, count);
        load_states<S + 1>(at, i, count, s);
    }
}

// The new values of a block's coded states, until their scales are known.
struct Pending { alignas(64) float values[STATES][BLOCK]; };

template <int S = 0>
LB_FN void keep_states(const Block& at, int i, int count, const V* s, Pending& pending, Extremes* seen) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded(S)) {
            const V kept = first_lanes(s[S], count);
            store(pending.values[S] + i, kept, W);
            seen[S].see<RULE_NON_NEGATIVE[S]>(kept);
        } else {
            store((float*)at.q.state[S] + at.start + i, s[S], count);
        }
        keep_states<S + 1>(at, i, count, s, pending, seen);
    }
}

// An element any of whose coded states is not finite has them all set to zero.
static __attribute__((noinline)) void drop_non_finite(int n, Pending& pending) {
    for (int i = 0; i < n; i += W) {
        I finite = splat<I>(-1);
        for (int s = 0; s < RULE_STATES; ++s)
            if (coded(s)) finite &= (I)(to_bits(absolute(load(pending.values[s] + i, W))) < (int32_t)INFINITE);
        for (int s = 0; s < RULE_STATES; ++s) {
            if (!coded(s)) continue;
            store(pending.values[s] + i, from_bits(to_bits(load(pending.values[s] + i, W)) & finite), W);
        }
    }
}

template <int S = 0> LB_FN void see_again(int n, const Pending& pending, Extremes* seen) {
    if constexpr (S < RULE_STATES) {
        seen[S] = Extremes();
        for (int i = 0; i < n && coded(S); i += W) seen[S].see<RULE_NON_NEGATIVE[S]>(load(pending.values[S] + i, W));
        see_again<S + 1>(n, pending, seen);
    }
}

// Encoding touches no memory but what the block has brought into the cache: meanwhile fetch what the block after the
// next one will read at i. The first state fetches the parameter, the last the gradient, each its own codes.
template <int S> LB_FN void fetch_next(const Block& at, int i) {
    const int64_t next = at.start + 2 * BLOCK + i;
    __builtin_prefetch((const uint8_t*)at.q.state[S] + next);
    if (S == 0) __builtin_prefetch(at.q.p + next, 1);
    if (S == RULE_STATES - 1) __builtin_prefetch(at.q.g + next);
}

template <int S = 0> LB_FN void encode_states(const Block& at, const Pending& pending, const Extremes* seen) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded(S)) {
            typedef typename MapOf<RULE_NON_NEGATIVE[S]>::Constants C;
            const float scale = seen[S].scale<RULE_NON_NEGATIVE[S]>();
            at.q.scales[S][at.number] = scale;
            encode_block<C>(pending.values[S], at.n, scale, (uint8_t*)at.q.state[S] + at.start, [&](int i) {
                fetch_next<S>(at, i);
            });
        }
        encode_states<S + 1>(at, pending, seen);
    }
}

LB_FN V load_parameter(const Block& at, int i, int count) {
    const PARAM* from = at.q.p + at.start + i;
#if REMAINDER
    const I upper = widen(load_raw<Halves>(from, count));
    const I lower = widen_signed(load_raw<Bytes>(at.q.remainder + at.start + i, count));
    return from_bits((upper << 16) + (lower << 8));
#else
    return load(from, count);
#endif
}

// `words`: the random words of the block's elements, where they are asked for.
LB_FN void store_parameter(const Block& at, int i, int count, V p, const uint16_t* words) {
    PARAM* to = at.q.p + at.start + i;
#if REMAINDER
    const I bits = to_bits(p);
    const I finite = (I)((bits & 0x7fffffff) < (int32_t)INFINITE);
    const I master = logical_shift(bits + 0x7f + ((bits >> 8) & 1), 8), upper = logical_shift(master + 0x80, 8);
    const Halves nearest = narrow_to_halves(upper & 0xffff), special = narrow_bfloat16(p);
    const Halves kept = narrow_to_halves(finite & 0xffff);
    store_raw(to, (Halves)((nearest & kept) | (special & ~kept)), count);
    store_raw(at.q.remainder + at.start + i, narrow_to_bytes((master - (upper << 8)) & finite & 0xff), count);
#elif STOCHASTIC
    const I bits = to_bits(p);
    const Halves rounded = upper_halves(bits + widen(load_raw<Halves>(words + i, count))), nearest = narrow_bfloat16(p);
    const Halves finite = narrow_to_halves((I)((bits & 0x7fffffff) < (int32_t)INFINITE) & 0xffff);
    store_raw(to, (Halves)((rounded & finite) | (nearest & ~finite)), count);
#else
    store(to, p, count);
#endif
}

// What all blocks of a parameter share: its scalars, and the factor of the gradients.
struct Shared {
    const Call& call;
    Scalars c;
    float factor;
};

LB_FN void update_vector(
    const Shared& shared, const Block& at, int i, int count, const uint16_t* words, Pending& pending, Extremes* seen) {
    V s[STATES], t[TEMPORARIES];
    V p = load_parameter(at, i, count), g = load(at.q.g + at.start + i, count) * shared.factor;
    load_states(at, i, count, s);
    rule_direction(shared.c, p, g, s, t);
    rule_finish(shared.c, p, g, s, t);
    keep_states(at, i, count, s, pending, seen);
    store_parameter(at, i, count, p, words);
}

static void update_block(const Shared& of_all, const Block& of_call) {
    const Shared shared = of_all;  // copies that stay in registers: no store can change them
    const Block at = of_call;
    Pending pending;
    Extremes seen[STATES];
    const uint16_t* words = nullptr;
#if STOCHASTIC
    RandomWords<1, BLOCK> random;
    const RandomKey key{shared.call.seed, (uint32_t)at.q.ordinal, (uint32_t)(int64_t)*at.q.step};
    random.fill(0, key, (uint64_t)(at.q.offset + at.start), at.n);
    words = random.row[0];
#endif
    int i = 0;
    for (; i + W <= at.n; i += W) update_vector(shared, at, i, W, words, pending, seen);
    if (i < at.n) update_vector(shared, at, i, at.n - i, words, pending, seen);
    bool finite = true;
    for (int s = 0; s < RULE_STATES; ++s) finite = finite && seen[s].finite();
    if (!finite) {
        drop_non_finite(at.n, pending);
        see_again(at.n, pending, seen);
    }
    encode_states(at, pending, seen);
}

extern "C" void optimizer_step(const Call* call) {
    if (call->skip && *call->skip != 0.0f) return;
    std::vector<Scalars> scalars(call->count);
    for (int64_t i = 0; i < call->count; ++i) {
        float& step = *call->parameters[i].step;
        step += 1.0f;
        scalars[i] = scalars_of(*call, i, step, call->square_sums);
    }
    const float factor = factor_of(*call);
    for_blocks(*call, [&](int64_t i, const Block& at) { update_block(Shared{*call, scalars[i], factor}, at); });
}

#if RULE_NORMS
template <class T> static T fold_halves(T* x, int n) {
    for (int half = n / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) x[j] += x[j + half];
    return x[0];
}

// Folds the sums of a parameter's blocks in groups of 256 until one is left.
static double fold_blocks(std::vector<double>& sums) {
    while (sums.size() > 1) {
        sums.resize((sums.size() + 255) / 256 * 256, 0.0);
        for (size_t group = 0; group < sums.size() / 256; ++group) sums[group] = fold_halves(&sums[group * 256], 256);
        sums.resize(sums.size() / 256);
    }
    return sums.empty() ? 0.0 : sums[0];
}

// out: [count][RULE_NORMS]
extern "C" void optimizer_norms(const Call* call, double* out) {
    std::vector<Scalars> scalars(call->count);
    std::vector<std::vector<double>> sums(call->count * RULE_NORMS);
    for (int64_t i = 0; i < call->count; ++i) {
        scalars[i] = scalars_of(*call, i, *call->parameters[i].step + 1.0, nullptr);
        for (int k = 0; k < RULE_NORMS; ++k) sums[i * RULE_NORMS + k].resize(call->parameters[i].blocks());
    }
    const float factor = factor_of(*call);
    for_blocks(*call, [&](int64_t index, const Block& at) {
        alignas(64) float squares[RULE_NORMS][BLOCK] = {};
        for (int i = 0; i < at.n; i += W) {
            const int count = std::min(W, at.n - i);
            V s[STATES], t[TEMPORARIES], n[RULE_NORMS];
            V p = load_parameter(at, i, count), g = load(at.q.g + at.start + i, count) * factor;
            load_states(at, i, count, s);
            rule_direction(scalars[index], p, g, s, t);
            rule_norm_values(p, t, n);
            for (int k = 0; k < RULE_NORMS; ++k) store(squares[k] + i, n[k] * n[k], count);
        }
        for (int k = 0; k < RULE_NORMS; ++k) sums[index * RULE_NORMS + k][at.number] = fold_halves(squares[k], BLOCK);
    });
    for (size_t k = 0; k < sums.size(); ++k) out[k] = fold_blocks(sums[k]);
}
#endif
