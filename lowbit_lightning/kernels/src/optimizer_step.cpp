// The fused optimizer step on the CPU: decode, update, re-encode and write in one pass over memory, all parameters of
// a group in one call.
//
// The text is specialised by macros: PARAM and GRAD (float, Half, BFloat16), BLOCK (elements), CODED (bit s: state s
// is 8-bit codes), STOCHASTIC and REMAINDER (0 or 1); and by the rule's generated text.
#include "vec.h"
#include "parallel.h"
#include "blocks.h"
#include "fold.h"
#include "over_root.h"
#include "master.h"
#include "random_words.h"
#include "rule_scalars.h"
#include "rule.h"  // generated from the rule
#include "parameter.h"
#include "step_settings.h"
#include <algorithm>
#include <vector>

constexpr int RUN_BLOCKS = BLOCK < 512 ? 512 / BLOCK : 1;  // that are updated, then encoded: none waits for its scales
constexpr int TEMPORARIES = RULE_TEMPORARIES ? RULE_TEMPORARIES : 1;
constexpr bool coded(int s) { return CODED >> s & 1; }

// What the whole call shares; cpu/step.py fills it.
struct Call : StepSettings {
    const Parameter* parameters;  // and one more, which ends them
    int64_t count;
    const double* hyper;
    const double* square_sums;  // [count][RULE_NORMS], or null
    const int64_t* taps;        // [count], of kernels that are channels_last in memory, or 1; null where all are 1
    int32_t threads;

    int64_t blocks(int64_t i) const { return parameters[i + 1].first_block - parameters[i].first_block; }
    int64_t taps_of(int64_t i) const { return taps ? taps[i] : 1; }
    Scalars scalars(int64_t i, double step) const {
        return scalars_of(*this, hyper, step, square_sums ? square_sums + i * RULE_NORMS : nullptr);
    }
};

// One block of a parameter.
struct Block {
    int64_t start;   // its first element
    int64_t number;
    int n;           // its length
};

// Adjacent blocks of one parameter.
struct Run {
    const Parameter& q;
    int64_t parameter;  // its index
    int count;
    Block block[RUN_BLOCKS];
};

// How many blocks a thread takes at a time: few enough that threads end together, and so many that it pays to begin
// elsewhere in memory.
static int64_t chunk_of(int64_t blocks, int threads) {
    constexpr int64_t LEAST = 32768 / BLOCK, MOST = 524288 / BLOCK;
    return std::min(std::max(blocks / (16 * threads), LEAST), MOST);
}

// Calls body(run) for all blocks of all parameters, shared among threads.
template <class F> static void for_runs(const Call& call, const F& body) {
    const Parameter *const all = call.parameters, *const end_of_all = all + call.count;
    const auto begins_after = [](int64_t block, const Parameter& q) { return block < q.first_block; };
    const int64_t total = end_of_all->first_block;
    const int64_t chunk = chunk_of(total, call.threads);
    parallel_for((total + chunk - 1) / chunk, call.threads, [&](int64_t which) {
        const int64_t end = std::min(total, (which + 1) * chunk);
        int64_t b = which * chunk, i = std::upper_bound(all, end_of_all, b, begins_after) - all - 1;
        while (b < end) {
            while (b >= all[i + 1].first_block) ++i;
            Run run{all[i], i, (int)std::min<int64_t>({RUN_BLOCKS, end - b, all[i + 1].first_block - b}), {}};
            const int64_t per_row = run.q.blocks_per_row;
            for (int k = 0; k < run.count; ++k, ++b) {
                const int64_t number = b - all[i].first_block, column = number % per_row * BLOCK;
                const int64_t start = number / per_row * run.q.row_length + column;
                run.block[k] = {start, number, (int)std::min<int64_t>(BLOCK, run.q.row_length - column)};
            }
            body(run);
        }
    });
}

// The state as rules see it: of codes, what they stand for; their scale stands beside.
template <int S> LB_FN V load_state(const Parameter& q, int64_t at, int count) {
    if constexpr (coded(S)) {
        typedef typename MapOf<RULE_NON_NEGATIVE[S]>::Constants C;
        return decode<C, V, I>(load_counted((const uint8_t*)q.state[S] + at, count));
    } else {
        return load((const float*)q.state[S] + at, count);
    }
}
template <int S = 0> LB_FN void load_states(const Parameter& q, int64_t at, int count, V* s) {
    if constexpr (S < RULE_STATES) {
        s[S] = load_state<S>(q, at, count);
        load_states<S + 1>(q, at, count, s);
    }
}

struct Scales { float of[STATES]; };
LB_FN Scales scales_of(const Parameter& q, const Block& block) {
    Scales scales{};
    for (int s = 0; s < RULE_STATES; ++s) scales.of[s] = coded(s) ? q.scales[s][block.number] : 1.0f;
    return scales;
}

// The new values of a block's coded states, until their scales are known.
struct Pending { alignas(64) float values[STATES][BLOCK]; };

template <int S = 0>
LB_FN void keep_states(
    const Parameter& q, const Block& block, int i, int count, const V* s, Pending& pending, Extremes* seen) {
    if constexpr (S < RULE_STATES) {
        if constexpr (coded(S)) {
            const V kept = first_lanes(s[S], count);
            store(pending.values[S] + i, kept, W);
            seen[S].see<RULE_NON_NEGATIVE[S]>(kept);
        } else {
            store((float*)q.state[S] + block.start + i, s[S], count);
        }
        keep_states<S + 1>(q, block, i, count, s, pending, seen);
    }
}

// An element any of whose coded states is not finite has all its states set to zero, those in 32 bits too. A value
// below zero of a state that has none counts as zero.
static __attribute__((noinline)) void drop_non_finite(Parameter q, Block block, Pending& pending) {
    for (int i = 0; i < block.n; i += W) {
        I finite = splat<I>(-1);
        for (int s = 0; s < RULE_STATES; ++s)
            if (coded(s)) finite &= (I)(to_bits(absolute(load(pending.values[s] + i, W))) < (int32_t)INFINITE);
        for (int s = 0; s < RULE_STATES; ++s) {
            float* at = coded(s) ? pending.values[s] + i : (float*)q.state[s] + block.start + i;
            const int count = coded(s) ? W : std::min(W, block.n - i);
            I bits = to_bits(load(at, count)) & finite;
            if (coded(s) && RULE_NON_NEGATIVE[s]) bits &= ~(bits >> 31);
            store(at, from_bits(bits), count);
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

template <int S = 0> LB_FN bool all_finite(const Extremes* seen) {
    if constexpr (S < RULE_STATES) return seen[S].finite<RULE_NON_NEGATIVE[S]>() && all_finite<S + 1>(seen);
    else return true;
}
template <int S = 0> LB_FN void find_scales(const Extremes* seen, Scales& scales) {
    if constexpr (S < RULE_STATES) {
        scales.of[S] = seen[S].scale<RULE_NON_NEGATIVE[S]>();
        find_scales<S + 1>(seen, scales);
    }
}

template <int S = 0> LB_FN void
encode_states(const Parameter& q, const Run& run, const Pending* pending, const Scales* scales) {
    if constexpr (S < RULE_STATES) {
        typedef typename MapOf<RULE_NON_NEGATIVE[S]>::Constants C;
        for (int k = 0; k < run.count && coded(S); ++k) {
            const Block block = run.block[k];
            q.scales[S][block.number] = scales[k].of[S];
            uint8_t* codes = (uint8_t*)q.state[S] + block.start;
            encode_block<C>(pending[k].values[S], block.n, scales[k].of[S], codes);
        }
        encode_states<S + 1>(q, run, pending, scales);
    }
}

LB_FN V load_parameter(const Parameter& q, int64_t at, int count) {
    const PARAM* from = (const PARAM*)q.p + at;
#if REMAINDER
    const I upper = widen(load_raw<Halves>(from, count));
    const I lower = widen_signed(load_raw<Bytes>(q.remainder + at, count));
    return from_bits((I)join_master((U)upper, (U)lower));
#else
    return load(from, count);
#endif
}

// `words`: the random words of the block's elements, where they are asked for.
LB_FN void store_parameter(const Parameter& q, const Block& block, int i, int count, V p, const uint16_t* words) {
    PARAM* to = (PARAM*)q.p + block.start + i;
#if REMAINDER
    const I bits = to_bits(p);
    const I finite = (I)((bits & 0x7fffffff) < (int32_t)INFINITE);
    const Master<U> master = split_master((U)bits);
    const Halves nearest = narrow_to_halves((I)master.upper), special = narrow_bfloat16(p);
    const Halves kept = narrow_to_halves(finite & 0xffff);
    store_raw(to, (Halves)((nearest & kept) | (special & ~kept)), count);
    store_raw(q.remainder + block.start + i, narrow_to_bytes((I)master.remainder & finite), count);
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
    Scalars c;
    float factor;
    uint64_t seed;
};

// N vectors of a block, step by step side by side, which keeps more of the processor busy; or one of `count` elements.
template <int N>
LB_FN void update_vectors(
    const Shared& shared, const Parameter& q, const Block& block, const Scales& scales, int first, int count,
    const uint16_t* words, Pending& pending, Extremes* seen) {
    V s[N][STATES], t[N][TEMPORARIES], p[N], g[N];
    Exact exact;
    for (int j = 0, i = first; j < N; ++j, i += W) {
        g[j] = load((const GRAD*)q.g + block.start + i, count) * shared.factor;
        load_states(q, block.start + i, count, s[j]);
    }
    for (int j = 0, i = first; j < N; ++j, i += W) {
        p[j] = load_parameter(q, block.start + i, count);
        rule_direction(shared.c, p[j], g[j], s[j], scales.of, t[j], exact);
    }
    for (int j = 0, i = first; j < N; ++j, i += W) {
        rule_finish(shared.c, p[j], g[j], s[j], t[j], exact);
        keep_states(q, block, i, count, s[j], pending, seen);
        store_parameter(q, block, i, count, p[j], words);
    }
}

// Leaves the block's new coded states in `pending`; returns their scales.
LB_FN Scales update_block(const Shared& shared, const Parameter& q, const Block& block, Pending& pending) {
    const Scales old = scales_of(q, block);
    Extremes seen[STATES];
    const uint16_t* words = nullptr;
#if STOCHASTIC
    RandomWords<1, BLOCK> random;
    const RandomKey key{shared.seed, (uint32_t)q.ordinal, step_word(*q.step)};
    random.fill(0, key, (uint64_t)(q.offset + block.start), block.n);
    words = random.row[0];
#endif
    constexpr int N = 2;
    int i = 0;
    for (; i + N * W <= block.n; i += N * W)
        update_vectors<N>(shared, q, block, old, i, W, words, pending, seen);
    for (; i < block.n; i += W)
        update_vectors<1>(shared, q, block, old, i, std::min(W, block.n - i), words, pending, seen);
    if (!all_finite(seen)) {
        drop_non_finite(q, block, pending);
        see_again(block.n, pending, seen);
    }
    Scales scales{};
    find_scales(seen, scales);
    return scales;
}

// Blocks of parameters and gradients [rows][channels][taps] that lie in memory as [rows][taps][channels]. They are
// copied into the order of their states, and parameters back.
struct Gathered {
    alignas(64) PARAM p[BLOCK];
    alignas(64) GRAD g[BLOCK];
};

// Calls body(i, at) for the elements of a block: i within the block, and where it lies in memory.
template <class F> LB_FN void for_places(const Parameter& q, const Block& block, int64_t taps, const F& body) {
    const int64_t column = block.start % q.row_length, row = block.start - column, channels = q.row_length / taps;
    const int64_t first = column / taps, passed = column % taps;
    for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t c = first + (tap < passed), start = c * taps + tap - column, at = row + tap * channels + c;
        for (int64_t k = 0; start + k * taps < block.n; ++k) body(start + k * taps, at + k);
    }
}

// The parameter, with p and g in `near` as far as the block goes.
static Parameter gathered(const Parameter& q, const Block& block, int64_t taps, Gathered& near) {
    const PARAM* p = (const PARAM*)q.p;
    const GRAD* g = (const GRAD*)q.g;
    for_places(q, block, taps, [&](int64_t i, int64_t at) { near.p[i] = p[at], near.g[i] = g[at]; });
    Parameter there = q;
    there.p = near.p - block.start, there.g = near.g - block.start;
    return there;
}

static __attribute__((noinline)) Scales
update_gathered(const Shared& shared, const Parameter& q, const Block& block, int64_t taps, Pending& pending) {
    Gathered near;
    const Scales scales = update_block(shared, gathered(q, block, taps, near), block, pending);
    PARAM* p = (PARAM*)q.p;
    for_places(q, block, taps, [&](int64_t i, int64_t at) { p[at] = near.p[i]; });
    return scales;
}

static void update_run(const Shared& of_all, const Run& run, int64_t taps) {
    const Shared shared = of_all;  // copies that stay in registers: no store can change them
    const Parameter q = run.q;
    Pending pending[RUN_BLOCKS];
    Scales scales[RUN_BLOCKS];
    for (int k = 0; k < run.count; ++k) {
        const Block block = run.block[k];
        scales[k] = taps == 1 ? update_block(shared, q, block, pending[k])
                              : update_gathered(shared, q, block, taps, pending[k]);
    }
    encode_states(q, run, pending, scales);
}

extern "C" void optimizer_step(const Call* call) {
    if (skipped(*call)) return;
    std::vector<Scalars> scalars(call->count);
    for (int64_t i = 0; i < call->count; ++i) {
        float& step = *call->parameters[i].step;
        step += 1.0f;
        scalars[i] = call->scalars(i, step);
    }
    const float factor = factor_of(*call);
    for_runs(*call, [&](const Run& run) {
        update_run({scalars[run.parameter], factor, call->seed}, run, call->taps_of(run.parameter));
    });
}

#if RULE_NORMS
// The sums of a parameter's blocks, until one is left.
static double fold_blocks(std::vector<double>& sums) {
    while (sums.size() > 1) {
        sums.resize((sums.size() + FOLD - 1) / FOLD * FOLD, 0.0);
        for (size_t group = 0; group < sums.size() / FOLD; ++group) {
            fold_halves<FOLD>(&sums[group * FOLD]);
            sums[group] = sums[group * FOLD];
        }
        sums.resize(sums.size() / FOLD);
    }
    return sums.empty() ? 0.0 : sums[0];
}

// out: [count][RULE_NORMS]
extern "C" void optimizer_norms(const Call* call, double* out) {
    std::vector<Scalars> scalars(call->count);
    std::vector<std::vector<double>> sums(call->count * RULE_NORMS);
    for (int64_t i = 0; i < call->count; ++i) {
        scalars[i] = call->scalars(i, *call->parameters[i].step + 1.0);
        for (int k = 0; k < RULE_NORMS; ++k) sums[i * RULE_NORMS + k].resize(call->blocks(i));
    }
    const float factor = factor_of(*call);
    for_runs(*call, [&](const Run& run) {
        const int64_t taps = call->taps_of(run.parameter);
        Gathered near;
        for (int k = 0; k < run.count; ++k) {
            const Block& block = run.block[k];
            const Parameter q = taps == 1 ? run.q : gathered(run.q, block, taps, near);
            const Scales scales = scales_of(q, block);
            alignas(64) float squares[RULE_NORMS][BLOCK] = {};
            for (int i = 0; i < block.n; i += W) {
                const int count = std::min(W, block.n - i);
                const int64_t at = block.start + i;
                V s[STATES], t[TEMPORARIES], n[RULE_NORMS];
                Exact exact;
                V p = load_parameter(q, at, count), g = load((const GRAD*)q.g + at, count) * factor;
                load_states(q, at, count, s);
                rule_direction(scalars[run.parameter], p, g, s, scales.of, t, exact);
                rule_norm_values(p, t, n);
                for (int j = 0; j < RULE_NORMS; ++j) store(squares[j] + i, n[j] * n[j], count);
            }
            for (int j = 0; j < RULE_NORMS; ++j) {
                fold_halves<BLOCK>(squares[j]);
                sums[run.parameter * RULE_NORMS + j][block.number] = squares[j][0];
            }
        }
    });
    for (size_t k = 0; k < sums.size(); ++k) out[k] = fold_blocks(sums[k]);
}
#endif
