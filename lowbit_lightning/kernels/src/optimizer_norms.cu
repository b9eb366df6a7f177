// Sums of squares for rules with a trust ratio, on the GPU. The order of summation is part of what they mean, as said
// in the reference: a block is folded in halves in float, then the blocks' sums in halves in double, FOLD at a time.
//
// Specialised by the macros of optimizer_block.h.
#include "optimizer_block.h"
#include "fold.h"

// The values of N lanes, each with its like, VALUES of them.
template <int N, int VALUES, class T> LB_FN void fold_lanes(T* v) {
#pragma unroll
    for (int half = N / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < VALUES; ++k) v[k] += __shfl_xor_sync(ALL_LANES, v[k], half);
}

// The sum of the group's values, in its first thread. Element j meets element j + half, half = BLOCK / 2 down to 1.
template <int RUN> LB_FN float fold_group(float (&v)[PER_THREAD]) {
    fold_halves<PER_THREAD, RUN>(v);  // runs: they lie BLOCK / 2 apart
    if constexpr (GROUP > 32) {
        __shared__ float exchange[THREADS * RUN];
        const int mine = threadIdx.x * RUN;
        for (int half = GROUP / 2; half >= 32; half /= 2) {
            __syncthreads();
#pragma unroll
            for (int k = 0; k < RUN; ++k) exchange[mine + k] = v[k];
            __syncthreads();
            if ((int)(threadIdx.x % GROUP) < half)
#pragma unroll
                for (int k = 0; k < RUN; ++k) v[k] += exchange[mine + half * RUN + k];
        }
    }
    fold_lanes<(GROUP < 32 ? GROUP : 32), RUN>(v);
    fold_halves<RUN>(v);
    return v[0];
}

// sums: [RULE_NORMS][blocks]
extern "C" __global__ void __launch_bounds__(THREADS, 1) norm_blocks(
    const Parameter* parameters, int64_t count, int64_t blocks, int blocks_per_group, const Scalars* scalars,
    const float* factor, double* sums) {
    const uint32_t place = prepare_tables(uses_map(true), uses_map(false));
    const int64_t number = (int64_t)blockIdx.x * blocks_per_group * GROUPS + threadIdx.x / GROUP;
    Walk walk{parameters, count, blocks, number, scalars};
    const float f = *factor;
    for (int turn = 0; turn < blocks_per_group; ++turn) {
        float squares[RULE_NORMS][PER_THREAD] = {};
        walk.go(turn);
        if (walk.active) {
            Elements e;
            const Block b = walk.block(turn);
            if (b.packets) load<true>(b, e, place);
            else load<false>(b, e, place);
            const Scalars c = walk.c();
            Exact exact;
#pragma unroll
            for (int k = 0; k < PER_THREAD; ++k) {
                e.g[k] *= f;
                apply<DIRECTION>(c, e, k, exact);
                float t[TEMPORARIES], n[RULE_NORMS];
#pragma unroll
                for (int j = 0; j < RULE_TEMPORARIES; ++j) t[j] = e.t[j][k];
                rule_norm_values(e.p[k], t, n);
#pragma unroll
                for (int j = 0; j < RULE_NORMS; ++j)
                    squares[j][k] = Mine::index(k) < b.at.n ? n[j] * n[j] : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < RULE_NORMS; ++j) {
            const float sum = fold_group<16 / sizeof(PARAM)>(squares[j]);
            if (walk.active && threadIdx.x % GROUP == 0) sums[j * blocks + walk.number + (int64_t)turn * GROUPS] = sum;
        }
    }
}

// One CUDA block per parameter (x) and norm (y), a warp per 256 sums. Both buffers are [RULE_NORMS][blocks] and take
// turns. out: [count][RULE_NORMS].
extern "C" __global__ void __launch_bounds__(256) norm_fold(
    const Parameter* parameters, int64_t blocks, double* sums, double* other, double* out) {
    const int64_t first = parameters[blockIdx.x].first_block;
    int64_t n = parameters[blockIdx.x + 1].first_block - first;
    double *from = sums + blockIdx.y * blocks + first, *to = other + blockIdx.y * blocks + first;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    while (n > 1) {
        const int64_t folds = (n + FOLD - 1) / FOLD;
        for (int64_t fold = warp; fold < folds; fold += 8) {
            double v[FOLD / 32];
#pragma unroll
            for (int k = 0; k < FOLD / 32; ++k) {
                const int64_t index = fold * FOLD + 32 * k + lane;
                v[k] = index < n ? from[index] : 0.0;
            }
            fold_halves<FOLD / 32>(v);
            fold_lanes<32, 1>(v);
            if (lane == 0) to[fold] = v[0];
        }
        __syncthreads();
        double* swap = from;
        from = to;
        to = swap;
        n = folds;
    }
    if (threadIdx.x == 0) out[blockIdx.x * RULE_NORMS + blockIdx.y] = n ? from[0] : 0.0;
}
