// The Hadamard rotation on the CPU: what it means is said in the reference. Butterflies h = 1, 2, 4, ... in this order,
// in registers; along rows of memory within vectors first, then between them; across rows between vectors alone.
#include "vec.h"
#include "hadamard.h"
#include "parallel.h"
#include <algorithm>
#include <type_traits>

struct Tables {
    alignas(64) float factors[SEGMENT];    // of a whole segment
    alignas(64) int32_t signs[SEGMENT];    // the sign bit, or 0
    alignas(64) int32_t flips[W][W];       // [h]: the sign bit in the lanes that have bit h
    Tables() : factors(), signs(), flips() {
        for (int i = 0; i < SEGMENT; ++i) {
            factors[i] = factor_of(i, SEGMENT);
            signs[i] = is_negative(i) ? INT32_MIN : 0;
        }
        for (int h = 1; h < W; ++h)
            for (int l = 0; l < W; ++l) flips[h][l] = l & h ? INT32_MIN : 0;
    }
};
static const Tables tables;

template <int H> LB_FN V partner(V x) {  // lane l gets lane l ^ H
#if LB_AVX512
    if (H == 1) return (V)_mm512_permute_ps((__m512)x, 0xb1);
    if (H == 2) return (V)_mm512_permute_ps((__m512)x, 0x4e);
    if (H == 4) return (V)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
    return (V)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
#elif LB_AVX2
    if (H == 1) return (V)_mm256_permute_ps((__m256)x, 0xb1);
    if (H == 2) return (V)_mm256_permute_ps((__m256)x, 0x4e);
    return (V)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
#else
    V y;
    for (int l = 0; l < W; ++l) y[l] = x[l ^ H];
    return y;
#endif
}
template <int H, int N> LB_FN void within(V (&v)[N]) {
    if constexpr (H < W) {
        const I flip = load_raw<I>(tables.flips[H], W);
        for (int j = 0; j < N; ++j) v[j] = partner<H>(v[j]) + from_bits(to_bits(v[j]) ^ flip);
        within<2 * H>(v);
    }
}
// Three stages between vectors whose numbers differ by STEP, 2 * STEP, 4 * STEP
template <int STEP> LB_FN void eight(V* v) {
    for (int h = 1; h < 8; h *= 2)
        for (int i = 0; i < 8; ++i)
            if (!(i & h)) {
                const V a = v[i * STEP], b = v[(i + h) * STEP];
                v[i * STEP] = a + b;
                v[(i + h) * STEP] = a - b;
            }
}

template <class T, class Out> struct Rotation {
    const T* x;
    int64_t rows, columns;
    Out* out;

    // ---- along the rows

    static void segment(const T* from, Out* to) {
        constexpr int N = SEGMENT / W;
        V v[N];
        for (int j = 0; j < N; ++j) v[j] = load(from + j * W, W) * load(tables.factors + j * W, W);
        within<1>(v);
        for (int h = 1; h < N; h *= 2)
            for (int j = 0; j < N; ++j)
                if (!(j & h)) {
                    const V a = v[j], b = v[j + h];
                    v[j] = a + b;
                    v[j + h] = a - b;
                }
        for (int j = 0; j < N; ++j)
            store(to + j * W, from_bits(to_bits(v[j]) ^ load_raw<I>(tables.signs + j * W, W)), W);
    }
    // The rest of a row: blocks smaller than a segment
    static void rest(const T* from, int length, Out* to) {
        float v[SEGMENT + W] = {};
        for (int i = 0; i < length; i += W) store(v + i, load(from + i, std::min(W, length - i)), W);
        for (int i = 0; i < length; ++i) v[i] *= factor_of(i, block_of(i, length));
        for (int h = 1; h < SEGMENT; h *= 2)
            for (int i = 0; i < length; ++i)
                if (!(i & h) && h < block_of(i, length)) {
                    const float a = v[i], b = v[i + h];
                    v[i] = a + b;
                    v[i + h] = a - b;
                }
        for (int i = 0; i < length; ++i) v[i] = is_negative(i) ? -v[i] : v[i];
        for (int i = 0; i < length; i += W) store(to + i, load(v + i, W), std::min(W, length - i));
    }
    void along_rows(int threads) const {
        const int64_t step = 1 + (1 << 14) / (columns + 1);
        parallel_for((rows + step - 1) / step, threads, [&](int64_t task) {
            for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
                int64_t c = r * columns;
                const int64_t end = c + columns / SEGMENT * SEGMENT;
                for (; c < end; c += SEGMENT) segment(x + c, out + c);
                if (columns % SEGMENT) rest(x + c, (int)(columns % SEGMENT), out + c);
            }
        });
    }

    // ---- across the rows: W columns of up to a segment of rows

    void strip(int64_t row, int length, int64_t column) const {
        const int count = (int)std::min<int64_t>(W, columns - column);
        const int64_t at = row * columns + column;
        V v[SEGMENT];
        for (int i = 0; i < length; ++i) {
            v[i] = load(x + at + i * columns, count) * factor_of(i, block_of(i, length));
            fetch(x + at + i * columns + 64 / sizeof(T));
        }
        if (length == SEGMENT) {
            for (int i = 0; i < 8; ++i) eight<1>(v + 8 * i);
            for (int i = 0; i < 8; ++i) eight<8>(v + i);
        } else {
            for (int h = 1; h < SEGMENT; h *= 2)
                for (int i = 0; i < length; ++i)
                    if (!(i & h) && h < block_of(i, length)) {
                        const V a = v[i], b = v[i + h];
                        v[i] = a + b;
                        v[i + h] = a - b;
                    }
        }
        for (int i = 0; i < length; ++i)
            store(out + at + i * columns, is_negative(i) ? from_bits(to_bits(v[i]) ^ INT32_MIN) : v[i], count);
    }
    void across_rows(int threads) const {
        constexpr int64_t WIDE = 512;  // columns
        const int64_t across = (columns + WIDE - 1) / WIDE, down = (rows + SEGMENT - 1) / SEGMENT;
        parallel_for(down * across, threads, [&](int64_t task) {
            const int64_t row = task / across * SEGMENT, first = task % across * WIDE;
            const int length = (int)std::min<int64_t>(SEGMENT, rows - row);
            for (int64_t c = first; c < std::min(columns, first + WIDE); c += W) strip(row, length, c);
        });
    }
};

// dtype: of x, 0 float32, 1 float16, 2 bfloat16, of which the last alone is that of `out`; others give float32. dim: 1
// along the rows, 0 across them
extern "C" void lb_hadamard(const void* x, int dtype, int64_t rows, int64_t columns, int dim, void* out, int threads) {
    const auto go = [&](const auto& rotation) { dim ? rotation.along_rows(threads) : rotation.across_rows(threads); };
    if (dtype == 0) go(Rotation<float, float>{(const float*)x, rows, columns, (float*)out});
    else if (dtype == 1) go(Rotation<Half, float>{(const Half*)x, rows, columns, (float*)out});
    else go(Rotation<BFloat16, BFloat16>{(const BFloat16*)x, rows, columns, (BFloat16*)out});
}
