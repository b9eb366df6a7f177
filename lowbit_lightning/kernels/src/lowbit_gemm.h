// y = x @ weight.T for many rows of x: some rows of the weight are decoded into the L2 cache, and all of x is
// multiplied with them there. Threads take such panels one after the other and wait for nobody.
//
// Both operands lie along K, in the order [chunk][phase][lane] of decoded values, so nothing is transposed: a tile of
// ROWS x COLUMNS sums is kept in vectors, lane by lane along K, that are added up at its end. Elements are floats, or
// bfloat16 where x is that and the processor multiplies pairs of them.
#pragma once
#include "lowbit_decode.h"
#include "lowbit_product.h"

struct Floats {
    typedef float Element;
    typedef V Vector;
    static LB_METHOD V add(V sum, V a, V b) { return multiply_add(a, b, sum); }
    template <class T> static void copy(const T* from, int64_t count, float* to) {
        for_vectors(count, [&](int64_t i, int width) __attribute__((always_inline)) {
            store(to + i, load(from + i, width), width);
        });
    }
};
#if LB_PAIRS
struct Narrow {
    typedef BFloat16 Element;
    typedef __m512i Vector;
    static LB_METHOD V add(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static void copy(const BFloat16* from, int64_t count, BFloat16* to) { memcpy(to, from, 2 * count); }
};
#endif
template <class T> struct DenseFor { typedef Floats type; };
#if LB_PAIRS
template <> struct DenseFor<BFloat16> { typedef Narrow type; };
#endif

#if LB_AVX512 || LB_NEON
constexpr int TILE_ROWS = 5, TILE_COLUMNS = 5;  // of 32 vector registers
#else
constexpr int TILE_ROWS = 3, TILE_COLUMNS = 3;
#endif
constexpr int64_t PANEL_BYTES = 384 << 10, DEPTH_BYTES = 8 << 10;  // a panel; of a row, what a tile takes at a time

typedef V Sums[TILE_ROWS][TILE_COLUMNS];
struct Tile { Sums sums; };

// sums[i][j] += x[i] * w[j], lane by lane, over `depth` elements; rows are `length` elements apart
template <class D>
static void tile(const typename D::Element* x, const typename D::Element* w, int64_t length, int64_t depth,
                 Sums& sums) {
    typedef typename D::Vector Vector;
    constexpr int64_t LANES = sizeof(Vector) / sizeof(typename D::Element);
    V total[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_COLUMNS; ++j) total[i][j] = sums[i][j];
    for (int64_t k = 0; k < depth; k += LANES) {
        Vector columns[TILE_COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < TILE_COLUMNS; ++j) memcpy(&columns[j], w + j * length + k, sizeof(Vector));
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; ++i) {
            Vector row;
            memcpy(&row, x + i * length + k, sizeof(Vector));
#pragma GCC unroll 8
            for (int j = 0; j < TILE_COLUMNS; ++j) total[i][j] = D::add(total[i][j], row, columns[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_COLUMNS; ++j) sums[i][j] = total[i][j];
}

template <class Element> struct Matrix {  // of whole vectors
    struct Slot { V vector; };
    std::vector<Slot> memory;
    int64_t length;
    Matrix(int64_t rows, int64_t length) : memory(rows * length * sizeof(Element) / sizeof(Slot)), length(length) {}
    Element* row(int64_t i) { return (Element*)memory.data() + i * length; }
};

template <class T>
static void many_rows(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x, int64_t M,
                      const float* bias, T* out, int threads) {
    typedef typename DenseFor<T>::type D;
    typedef typename D::Element Element;
    const int64_t chunks = ceil_div(form.length, CHUNK), length = chunks * CHUNK;
    Matrix<Element> ordered(ceil_div(M, TILE_ROWS) * TILE_ROWS, length);
    parallel_for(ceil_div(M, 8), threads, [&](int64_t t) {
        for (int64_t m = t * 8; m < least(M, t * 8 + 8); ++m)
            for (int64_t c = 0; c < chunks; ++c) {
                Element part[CHUNK] = {};
                D::copy(x + m * form.length + c * CHUNK, least(CHUNK, form.length - c * CHUNK), part);
                in_order<PHASES, W>(part, ordered.row(m) + c * CHUNK);
            }
    });
    const int64_t room = PANEL_BYTES / (int64_t)sizeof(Element) / length;
    const int64_t width = TILE_COLUMNS * least(16, room < TILE_COLUMNS ? 1 : room / TILE_COLUMNS);
    parallel_for(ceil_div(N, width), threads, [&](int64_t t) {
        const Values values(form);
        const Spread spread(form);
        const int64_t first = t * width, count = least(width, N - first);
        Matrix<Element> panel(width, length);
        std::vector<float> decoded(2 * (form.blocks + PADDING)), y(M * width);
        float* offsets = decoded.data() + form.blocks + PADDING;
        for (int64_t n = 0; n < count; ++n) {
            decode_scales(form, scales + (first + n) * form.scales_stride, decoded.data(), offsets);
            decode_row<false>(form, values, spread, packed + (first + n) * form.packed_stride, decoded.data(), offsets,
                              0, chunks, panel.row(n));
        }
        constexpr int64_t DEPTH = DEPTH_BYTES / sizeof(Element);
        std::vector<Tile> tiles(ceil_div(M, TILE_ROWS));
        for (int64_t n = 0; n < count; n += TILE_COLUMNS) {
            memset((void*)tiles.data(), 0, tiles.size() * sizeof(Tile));
            for (int64_t k = 0; k < length; k += DEPTH)  // that much of the columns stays close
                for (size_t i = 0; i < tiles.size(); ++i)
                    tile<D>(ordered.row(i * TILE_ROWS) + k, panel.row(n) + k, length, least(DEPTH, length - k),
                            tiles[i].sums);
            for (int64_t m = 0; m < M; ++m)
                for (int j = 0; j < TILE_COLUMNS; ++j)
                    y[m * width + n + j] = sum_of(tiles[m / TILE_ROWS].sums[m % TILE_ROWS][j]);
        }
        for (int64_t m = 0; m < M; ++m)
            for_vectors(count, [&](int64_t n, int lanes) __attribute__((always_inline)) {
                const V sum = load(&y[m * width + n], lanes);
                store(out + m * N + first + n, bias ? sum + load(bias + first + n, lanes) : sum, lanes);
            });
    });
}
