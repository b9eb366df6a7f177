// y = x @ weight.T for many rows of x, by vectors of 512 bits.
//
// A task is some rows of x with COLUMNS rows of the weight. DEPTH bytes of each of these are decoded at a time, into
// the L2 cache, in an order in which a vector holds 16 neighbours along N. All rows of x of the task are multiplied
// with them, ROWS at a time, whose sums are in registers; the other sums wait in the L2 cache. bfloat16 goes in
// pairs, as in lowbit_product.h; the weight is then rounded as if it were dequantised to bfloat16. Sums are float32.
//
//   panel[step along K][column], a step being one float, or a pair of bfloat16
#pragma once
#include "int8_vectors.h"
#include "lowbit_decode.h"
#include "parallel.h"
#include <vector>

#if LB_AVX512
#define LB_MULTIPLIES_FLOATS 1
#else
#define LB_MULTIPLIES_FLOATS 0
#endif
#if LB_AVX512_BF16 && LB_AVX512_BW && !LB_AMX  // with tiles others are faster
#define LB_MULTIPLIES_PAIRS 1
#else
#define LB_MULTIPLIES_PAIRS 0
#endif

#if LB_MULTIPLIES_FLOATS
constexpr int64_t COLUMNS = 64, ROWS = 6, DEPTH = 1024, MOST_ROWS = 512;
constexpr int WIDTH = COLUMNS / W;  // vectors of a step

template <class T> struct Step;
template <> struct Step<float> {
    static constexpr int elements = 1;
    static LB_METHOD V add(V sum, V a, V b) { return multiply_add(a, b, sum); }
};
#if LB_MULTIPLIES_PAIRS
template <> struct Step<BFloat16> {
    static constexpr int elements = 2;
    static LB_METHOD V add(V sum, V a, V b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

struct Panel {  // of COLUMNS rows of the weight, and what it is decoded with and multiplied to
    std::vector<Slot> steps, totals;
    std::vector<float> scales, offsets;
    std::vector<Slot> rows;  // W rows in the natural order, PITCH bytes apart: not a power of two
    static constexpr int64_t PITCH = DEPTH + 64;
    void prepare(const Form& form, int64_t count) {
        steps.resize(DEPTH / 4 * WIDTH);
        totals.assign(count * WIDTH, Slot{});
        scales.resize(COLUMNS * (form.blocks + PADDING));
        offsets.resize(form.affine ? COLUMNS * (form.blocks + PADDING) : form.blocks + PADDING);
        rows.resize(W * PITCH / sizeof(Slot));
    }
};

// Decodes elements k to k + count - 1 of rows n to n + COLUMNS - 1, of the last row again after the end.
template <class T>
static void decode_panel(const Form& form, const Values& values, const Spread& spread, const uint8_t* packed, int64_t n,
                         int64_t N, int64_t k, int64_t count, Panel& panel) {
    constexpr int64_t lanes = 64 / sizeof(T);
    const int64_t stride = form.blocks + PADDING, vectors = ceil_div(count, lanes);
    const int64_t first = k / CHUNK, last = ceil_div(k + count, CHUNK);
    char* rows = (char*)panel.rows.data();
    for (int64_t j = 0; j < WIDTH; ++j) {
        for (int64_t l = 0; l < W; ++l) {
            const int64_t i = least(j * W + l, N - 1 - n);
            const uint8_t* row = packed + (n + i) * form.packed_stride;
            T* to = (T*)(rows + l * Panel::PITCH);
            if (count % lanes) memset(to + (vectors - 1) * lanes, 0, 64);
            const float* offsets = &panel.offsets[form.affine ? i * stride : 0];
            decode_row<true>(form, values, spread, row, &panel.scales[i * stride], offsets, first, last, to);
            for (int64_t c = last; c < 2 * last - first; ++c) fetch(row + c * CHUNK_BYTES);  // of the next panel
        }
        for (int64_t v = 0; v < vectors; ++v) {
            I square[W];
            for (int64_t l = 0; l < W; ++l) memcpy(&square[l], rows + l * Panel::PITCH + v * 64, 64);
            transpose(square);
            for (int64_t s = 0; s < W; ++s) panel.steps[(v * W + s) * WIDTH + j].vector = from_bits(square[s]);
        }
    }
}

// M rows of x, `stride` steps apart, with `depth` steps of a panel
template <int M, class T>
static void multiply_rows(const Slot* steps, int64_t depth, const float* x, int64_t stride, Slot* totals) {
    V sums[M][WIDTH];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; ++j) sums[m][j] = totals[m * WIDTH + j].vector;
    for (int64_t k = 0; k < depth; ++k, steps += WIDTH) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const V each = _mm512_set1_ps(x[m * stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH; ++j) sums[m][j] = Step<T>::add(sums[m][j], each, steps[j].vector);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; ++j) totals[m * WIDTH + j].vector = sums[m][j];
}

// `rows` rows of x with rows n to n + COLUMNS - 1 of the weight
template <class T>
static void many_rows_task(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t n, int64_t N,
                           const float* x, int64_t stride, int64_t rows, const float* bias, T* out) {
    constexpr int64_t most = DEPTH / sizeof(T);
    thread_local Panel panel;
    panel.prepare(form, rows);
    const Values values(form);
    const Spread spread(form);
    const int64_t columns = least(COLUMNS, N - n), width = form.blocks + PADDING;
    for (int64_t i = 0; i < columns; ++i)
        decode_scales(form, scales + (n + i) * form.scales_stride, &panel.scales[i * width],
                      &panel.offsets[form.affine ? i * width : 0]);
    const int64_t parts = ceil_div(rows, ROWS);
    for (int64_t k = 0; k < form.length; k += most) {
        const int64_t count = least(most, form.length - k), depth = ceil_div(count, Step<T>::elements);
        decode_panel<T>(form, values, spread, packed, n, N, k, count, panel);
        for (int64_t p = 0; p < parts; ++p) {
            const int64_t m = rows * p / parts, height = rows * (p + 1) / parts - m;
            const auto run = height == 6   ? multiply_rows<6, T>
                             : height == 5 ? multiply_rows<5, T>
                             : height == 4 ? multiply_rows<4, T>
                             : height == 3 ? multiply_rows<3, T>
                             : height == 2 ? multiply_rows<2, T>
                                           : multiply_rows<1, T>;
            run(panel.steps.data(), depth, x + m * stride + k / Step<T>::elements, stride, &panel.totals[m * WIDTH]);
        }
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < columns; i += W) {
            const int count = (int)least(W, columns - i);
            V v = panel.totals[m * WIDTH + i / W].vector;
            if (bias) v = v + load(bias + n + i, count);
            store(out + m * N + n + i, v, count);
        }
}

// x: rows `stride` steps apart
template <class T>
static void many_rows(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const float* x,
                      int64_t stride, int64_t M, const float* bias, T* out, int threads) {
    const int64_t blocks = ceil_div(N, COLUMNS), share = ceil_div(M * blocks, 4 * threads);  // several tasks a thread
    const int64_t step = least(MOST_ROWS, ceil_div(share, 8 * ROWS) * 8 * ROWS);
    parallel_for(blocks * ceil_div(M, step), threads, [&](int64_t task) {
        const int64_t m = task / blocks * step, n = task % blocks * COLUMNS;
        many_rows_task(form, packed, scales, n, N, x + m * stride, stride, least(step, M - m), bias, out + m * N);
    });
}
#endif
