// A @ B^T of int8 matrices, exact in int32: packing, and the loops around an engine's tiles.
//
// An engine (int8_dot.h, int8_amx.h) adds the product of up to `rows` rows of A, over k columns, and a panel of B to a
// tile of sums. A is read as it lies, if its element is an int8 and its rows are multiples of k_step; otherwise from a
// copy. B is repacked into panels of `columns` columns, fewer in the last one (a multiple of column_step), padded with
// zeros:
//   panel[group of neighbours along K][column][neighbour]
// It is read once for every block of rows, and a vector must find its columns side by side. Packing takes 2 to 4 % of
// the time of the product by vectors.
#pragma once
#include "int8_vectors.h"
#include "parallel.h"

LB_FN int64_t up_to_multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// ---- packing

// `count` values as elements, plus `offset`, padded with zeros to `padded`
template <class Element>
static void widen(const int8_t* from, int64_t count, int64_t padded, int offset, Element* to) {
    for (int64_t k = 0; k < count; ++k) to[k] = (Element)(from[k] + offset);
    for (int64_t k = count; k < padded; ++k) to[k] = 0;
}

// `rows` rows of B, `pitch` apart, to one panel of `columns` columns, W groups at a time
template <class Engine>
static void pack_panel(const int8_t* b, int64_t pitch, int64_t rows, int64_t K, int64_t columns,
                       typename Engine::Element* panel) {
    typedef typename Engine::Element Element;
    constexpr int64_t STEP = W * Engine::group;  // W groups
    const int64_t all = up_to_multiple(K, Engine::k_step);
    for (int64_t k = 0; k < all; k += STEP) {
        const int64_t count = k < K ? least(STEP, K - k) : 0, padded = least(STEP, all - k);
        for (int64_t n = 0; n < columns; n += W) {
            I square[W];
            for (int64_t i = 0; i < W; ++i) {
                const int8_t* from = b + (n + i) * pitch + k;
                if (n + i >= rows) square[i] = I{};
                else if (sizeof(Element) == 1 && count == STEP) {
                    square[i] = load_raw<I>(from, W);
                    if (Engine::offset) square[i] = square[i] ^ (int32_t)0x80808080;
                } else {
                    alignas(64) Element row[STEP] = {};
                    widen(from, count, padded, Engine::offset, row);
                    memcpy(&square[i], row, sizeof row);
                }
            }
            transpose(square);
            for (int64_t g = 0; g < padded / Engine::group; ++g)
                memcpy(panel + ((k / Engine::group + g) * columns + n) * Engine::group, &square[g], sizeof(I));
        }
    }
}

// The sum of a row
LB_FN int32_t sum_of_row(const int8_t* row, int64_t count) {
    int64_t k = 0;
    int32_t sum = 0;  // below 2^31 in magnitude for count < 2^24
#if LB_AVX512_VNNI || LB_AVX2_VNNI
    I sums{};
    for (; k + 4 * W <= count; k += 4 * W) sums = dot(sums, load_raw<I>(row + k, W), splat<I>(0x01010101));
    sum = sum_of(sums);
#endif
    for (; k < count; ++k) sum += row[k];
    return sum;
}
// Where the sums of a row of A start, since B is stored plus an offset
template <class Engine> LB_FN int32_t start_of(const int8_t* row, int64_t count) {
    return Engine::offset ? (int32_t)(0u - (uint32_t)Engine::offset * (uint32_t)sum_of_row(row, count)) : 0;
}

// One allocation: the panels of B, and where it is needed a copy of A.
template <class Engine> struct Workspace {
    typedef typename Engine::Element Element;
    Element *panels, *a;
    const int8_t* rows;  // of A, as they were given
    int64_t K, stride;   // of rows, and of a
    static bool copies_a(int64_t K) { return sizeof(Element) > 1 || K % Engine::k_step != 0; }
    static int64_t bytes(int64_t M, int64_t N, int64_t K) {
        const int64_t padded = up_to_multiple(K, Engine::k_step), rows = copies_a(K) ? M : 0;
        return 64 + (up_to_multiple(N, Engine::column_step) + rows) * padded * (int64_t)sizeof(Element);
    }
    Workspace(void* memory, const int8_t* A, int64_t N, int64_t K)
        : rows(A), K(K), stride(up_to_multiple(K, Engine::k_step)) {
        panels = (Element*)(((uintptr_t)memory + 63) / 64 * 64);
        a = copies_a(K) ? panels + up_to_multiple(N, Engine::column_step) * stride : (Element*)A;
    }
};

template <class Engine>
static void prepare(const Workspace<Engine>& w, const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K,
                    int threads) {
    constexpr int64_t NR = Engine::columns;
    const bool copies = Workspace<Engine>::copies_a(K);
    const int64_t panels = (N + NR - 1) / NR, blocks = copies ? (M + 63) / 64 : 0;
    parallel_for(panels + blocks, threads, [&](int64_t task) {
        if (task < panels) {
            const int64_t rows = least(NR, N - task * NR), columns = up_to_multiple(rows, Engine::column_step);
            pack_panel<Engine>(B + task * NR * K, K, rows, K, columns, w.panels + task * NR * w.stride);
            return;
        }
        for (int64_t m = (task - panels) * 64; m < least(M, (task - panels + 1) * 64); ++m)
            widen(A + m * K, K, w.stride, 0, w.a + m * w.stride);
    });
}

// ---- the loops around the tiles

constexpr int64_t TASK_ROWS = 192;  // at most: their part of A stays in the L2 cache

// Rows `first` to first + rows - 1, columns n to n + count - 1, all of them in one panel
template <class Engine, class F>
static void multiply_part(
    const Workspace<Engine>& w, int64_t first, int64_t rows, int64_t n, int64_t count, const F& finish) {
    constexpr int64_t MR = Engine::rows, NR = Engine::columns;
    static_assert(TASK_ROWS % MR == 0, "");
    Engine engine;
    alignas(64) int32_t sums[TASK_ROWS * NR];
    int32_t start[TASK_ROWS];
    for (int64_t i = 0; i < rows; ++i) start[i] = start_of<Engine>(w.rows + (first + i) * w.K, w.K);
    const int64_t width = up_to_multiple(count, Engine::column_step);
    const auto of_columns = finish.of_columns(n, count);
    for (int64_t k = 0; k == 0 || k < w.stride; k += Engine::k_block) {
        const int64_t depth = least(Engine::k_block, w.stride - k);
        const bool last = k + depth == w.stride;
        const typename Engine::Element* panel = w.panels + n * w.stride + k * width;
        for (int64_t top = 0; top < rows; top += MR) {
            const int64_t m = first + top, height = least(MR, rows - top);
            int32_t* tile = sums + top * NR;
            if constexpr (Engine::in_registers)
                if (k == 0 && last && height == MR && width == NR && count == NR) {
                    finish.expect(m, height, n, count);
                    engine.whole(w.a + m * w.stride, w.stride, panel, depth, start + top,
                                 [&](const auto& found) __attribute__((always_inline)) {
                                     finish.whole(m, n, found, of_columns);
                                 });
                    continue;
                }
            if (k == 0)
                for (int64_t i = 0; i < height; ++i)
                    for (int64_t j = 0; j < NR; ++j) tile[i * NR + j] = start[top + i];
            if (last) finish.expect(m, height, n, count);
            engine.add(w.a + m * w.stride + k, w.stride, panel, depth, height, width, tile);
            if (last) finish(m, height, n, count, tile, NR);
        }
    }
}

// finish gets the sums of some rows and columns when they are exact; finish.expect is told of them before that. Tiles
// that take the whole contraction at once go to finish.whole in registers, with what finish.of_columns says of a panel.
template <class Engine, class F>
static void multiply(const Workspace<Engine>& w, int64_t M, int64_t N, int threads, const F& finish) {
    const int64_t panels = (N + Engine::columns - 1) / Engine::columns;
    const int64_t share = up_to_multiple(M * panels / (4 * threads) + 1, Engine::rows);  // several tasks a thread
    const int64_t step = least(TASK_ROWS, share), row_blocks = (M + step - 1) / step;
    parallel_for(row_blocks * panels, threads, [&](int64_t task) {
        const int64_t first = task / panels * step, n = task % panels * Engine::columns;
        multiply_part(w, first, least(step, M - first), n, least(Engine::columns, N - n), finish);
    });
}
