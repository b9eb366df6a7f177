// The scaled int8 product; what it means is said in the reference. int8_gemm.h computes the sums, by an engine that is
// chosen here, and hands them over a few rows at a time, to be scaled while they are in the caches.
#include "int8_engine.h"
#include "int8_gemm.h"
#include "pages.h"
#include <algorithm>
#include <type_traits>

// Two vectors, and two without subnormal numbers
struct StoreAny {
    template <class T> __attribute__((always_inline)) void operator()(T* to, V a, V b) const {
        store(to, a, W);
        store(to + W, b, W);
    }
};
struct StoreNormal : StoreAny {
    using StoreAny::operator();
#if LB_AVX512_BF16
    __attribute__((always_inline)) void operator()(BFloat16* to, V a, V b) const {
        const auto both = _mm512_cvtne2ps_pbh(b, a);
        memcpy(to, &both, sizeof both);
    }
#endif
};

// out[m][n] = sum * a_scales[m] * b_scales[n] (+ bias[n]), the smaller scale first: a large one alone could overflow
template <class T> struct Epilogue {
    const float *a_scales, *b_scales, *bias;  // bias may be null
    T* out;
    int64_t N;

    // Fetches the lines that results will be written to: stores that wait for memory would hold the next tile up.
    void expect(int64_t m, int64_t height, int64_t n, int64_t count) const {
        for (int64_t i = m; i < m + height; ++i) {
            const char* to = (const char*)(out + i * N + n);
            for (int64_t byte = 0; byte < count * (int64_t)sizeof(T); byte += 64) __builtin_prefetch(to + byte, 1);
        }
    }
    // The range of the columns' scales; NaN, which nothing is below or above, if one of them is
    struct Range { float lowest, highest; };
    Range of_columns(int64_t n, int64_t count) const {
        Range found = {b_scales[n], b_scales[n]};
        for (int64_t j = n; j < n + count; ++j) {
            if (b_scales[j] != b_scales[j]) return {b_scales[j], b_scales[j]};
            found = {std::min(found.lowest, b_scales[j]), std::max(found.highest, b_scales[j])};
        }
        return found;
    }
    // Of a whole tile. Where all rows' scales are below, or above, all columns', none has to be compared; and where a
    // sum of 1 gives a normal number, so do all others but 0.
    template <int ROWS, int VECTORS>
    __attribute__((always_inline)) void whole(int64_t m, int64_t n, const I (&sums)[ROWS][VECTORS],
                                              Range columns) const {
        bool below = true, above = true, normal = !bias;
        for (int i = 0; i < ROWS; ++i) {
            below &= a_scales[m + i] <= columns.lowest;
            above &= a_scales[m + i] >= columns.highest;
            normal &= a_scales[m + i] * columns.lowest > 1e-37f;
        }
        const auto smaller_first = [](V x, V a, V b) { return x * minimum(a, b) * maximum(b, a); };
        if (!normal) write(m, n, sums, smaller_first, StoreAny());
        else if (below) write(m, n, sums, [](V x, V a, V b) { return x * a * b; }, StoreNormal());
        else if (above) write(m, n, sums, [](V x, V a, V b) { return x * b * a; }, StoreNormal());
        else write(m, n, sums, smaller_first, StoreNormal());
    }
    // Rows m to m + height - 1, columns n to n + count - 1; `pitch` sums lie between rows
    void operator()(int64_t m, int64_t height, int64_t n, int64_t count, const int32_t* sums, int64_t pitch) const {
        int64_t j = 0;
        for (; j + W <= count; j += W) strip(m, height, n + j, W, sums + j, pitch);
        if (j < count) strip(m, height, n + j, (int)(count - j), sums + j, pitch);
    }

private:
    template <int ROWS, int VECTORS, class Scaled, class Store>
    __attribute__((always_inline)) void write(int64_t m, int64_t n, const I (&sums)[ROWS][VECTORS],
                                              const Scaled& scaled, const Store& store_two) const {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j += 2) {
                const V scale = splat<V>(a_scales[m + i]);
                V y[2];
                for (int h = 0; h < 2; ++h) {
                    const int64_t column = n + (j + h) * W;
                    y[h] = scaled(to_float(sums[i][j + h]), scale, load(b_scales + column, W));
                    if (bias) y[h] = y[h] + load(bias + column, W);
                }
                store_two(out + (m + i) * N + n + j * W, y[0], y[1]);
            }
    }
    inline __attribute__((always_inline)) void strip(
        int64_t m, int64_t height, int64_t n, int width, const int32_t* sums, int64_t pitch) const {
        const V b_scale = load(b_scales + n, width), shift = bias ? load(bias + n, width) : V{};
        for (int64_t i = 0; i < height; ++i) {
            const V a_scale = splat<V>(a_scales[m + i]);  // of the two below one is NaN if either scale is
            V y = to_float(load_raw<I>(sums + i * pitch, W)) * minimum(a_scale, b_scale) * maximum(b_scale, a_scale);
            if (bias) y = y + shift;
            store(out + (m + i) * N + n, y, width);
        }
    }
};

template <class Engine, class T>
static void product(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const Epilogue<T>& epilogue,
                    void* memory, int threads) {
    const Workspace<Engine> w(memory, a, N, K);
    prepare(w, a, b, M, N, K, threads);
    multiply(w, M, N, threads, epilogue);
}

// dtype: 0 float32, 1 float16, 2 bfloat16
static void matmul(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales,
                   const float* b_scales, const float* bias, void* out, int dtype, void* workspace, int threads) {
    const auto run = [&](auto* to) {
        const Epilogue<std::remove_pointer_t<decltype(to)>> epilogue{a_scales, b_scales, bias, to, N};
        LB_BY_ENGINE(product<Engine>(a, b, M, N, K, epilogue, workspace, threads))
    };
    if (dtype == 0) run((float*)out);
    else if (dtype == 1) run((Half*)out);
    else run((BFloat16*)out);
}
static int64_t size_of(int dtype) { return dtype == 0 ? 4 : 2; }

extern "C" {
const char* lb_int8_instructions() { return LB_NAME; }
int64_t lb_int8_matmul_workspace(int64_t M, int64_t N, int64_t K) {
    LB_BY_ENGINE(return Workspace<Engine>::bytes(M, N, K))
}

void lb_int8_matmul(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales,
                    const float* b_scales, const float* bias, void* out, int dtype, void* workspace, int threads) {
    ask_for_huge_pages(out, M * N * size_of(dtype));
    matmul(a, b, M, N, K, a_scales, b_scales, bias, out, dtype, workspace, threads);
}

// Products of groups, whose `ends` are given, one after the other.
//   outer == 0: the rows of A and of the result are grouped, and each group has a B [N][K] of its own
//   outer == 1: the sums are: A and B hold each group's columns, [N][its rows] and [K][its rows], and it has a result
//               [N][K] of its own
int64_t lb_int8_grouped_workspace(const int64_t* ends, int64_t groups, int64_t N, int64_t K, int outer) {
    int64_t most = 0;
    for (int64_t e = 0, first = 0; e < groups; first = ends[e++]) {
        const int64_t rows = ends[e] - first;
        const int64_t bytes = outer ? lb_int8_matmul_workspace(N, K, rows) : lb_int8_matmul_workspace(rows, N, K);
        most = bytes > most ? bytes : most;
    }
    return most;
}

// many: products of a group from which several threads pay
void lb_int8_grouped(const int8_t* a, const int8_t* b, const int64_t* ends, int64_t groups, int64_t N, int64_t K,
                     int outer, const float* a_scales, const float* b_scales, const float* bias, void* out, int dtype,
                     void* workspace, int threads, int64_t many) {
    const int64_t size = size_of(dtype);
    if (groups) ask_for_huge_pages(out, (outer ? groups * N * K : ends[groups - 1] * N) * size);
    for (int64_t e = 0, first = 0; e < groups; first = ends[e++]) {
        const int64_t rows = ends[e] - first;
        const int own = rows * N * K < many ? 1 : threads;
        if (outer)
            matmul(a + first * N, b + first * K, N, K, rows, a_scales + e * N, b_scales + e * K, nullptr,
                   (char*)out + e * N * K * size, dtype, workspace, own);
        else
            matmul(a + first * K, b + e * N * K, rows, N, K, a_scales + first, b_scales + e * N,
                   bias ? bias + e * N : nullptr, (char*)out + first * N * size, dtype, workspace, own);
    }
}
}
