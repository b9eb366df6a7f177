// Row-wise and column-wise int8 quantisation on the CPU: what the ops mean is said in the reference.
//
// Little is computed, so memory decides. A scale is known only after all of its row or column was seen, so x is read
// twice, the second time from a cache where that can be. And a core reads at full speed only while some 50 lines are on
// their way into its L2 cache. The processor sees to that alone where addresses follow each other for pages; elsewhere
// lines are fetched well before they are needed (`fetch`).
//
//   rows      A few rows at a time: looked at, then written from the cache, while the next ones are fetched.
//   columns   A strip of 1 KB at a time: all its rows looked at, then turned from the cache.
//   both      Each thread takes its share of the rows, looks at rows and columns, and writes the rows. Then all turn,
//             last rows first, since those are still in a cache. The next block is fetched while one is written.
#include "int8_vectors.h"
#include "scale.h"
#include "pages.h"
#include "parallel.h"
#include <algorithm>
#include <vector>

// ---- looking: the largest magnitudes

// Of ROWS rows of n elements, in `top`; joined into those of the columns, in `columns`, where COLUMNS.
// ahead: as many rows later, the same elements are fetched; 0: none
template <int ROWS, bool COLUMNS, class T>
LB_FN void look(const T* x, int64_t stride, int64_t n, int64_t ahead, Tops<T> (&top)[ROWS], Top<T>* columns) {
    Tops<T> highest[ROWS] = {};
    const auto step = [&](int64_t c, int count) __attribute__((always_inline)) {
        Tops<T> together{};
        if (ahead && c * sizeof(T) % 64 == 0)
            for (int k = 0; k < ROWS; ++k) fetch(x + (ahead + k) * stride + c);
#pragma GCC unroll 4
        for (int k = 0; k < ROWS; ++k) {
            const Tops<T> seen = magnitudes(x + k * stride + c, count);
            highest[k] = maximum(highest[k], seen);
            together = maximum(together, seen);
        }
        if (!COLUMNS) return;
        together = maximum(magnitudes((const T*)(columns + c), count), together);
        memcpy(columns + c, &together, sizeof(T) * count);
    };
    int64_t c = 0;
    for (; c + MANY<T> <= n; c += MANY<T>) step(c, MANY<T>);
    if (c < n) step(c, (int)(n - c));
    for (int k = 0; k < ROWS; ++k) top[k] = highest[k];
}

template <class T, bool DITHERED> struct Quantiser {
    const T* x;
    int64_t rows, columns;
    uint64_t seed;
    int threads;

    // ---- rows

    struct RowForm { int8_t* q; float* scales; };  // scales: null where it is not wanted

    static constexpr int TOGETHER = 8;  // rows
    static constexpr int64_t ROWS_IN_CACHE = 512 << 10;  // bytes

    // 64 elements; EACH: of as many columns, whose inverses lie as set_scales leaves them; otherwise of one row
    template <bool EACH = false>
    LB_FN void write_line(const T* from, const float* inverses, uint32_t start, uint8_t* line) {
        for (int k = 0; k < 64; k += 4 * W) {
            IntPair values[2];
            for (int i = 0; i < 2; ++i) {
                const int at = k + 2 * W * i;
                Pair by = {splat<V>(*inverses), splat<V>(*inverses)};
                if (EACH) by = {load(inverses + at, W), load(inverses + at + W, W)};
                values[i] = rounded<T, DITHERED>(load_pair(from + at), by, start + at * DITHER_COLUMN);
                if (EACH)
                    for (int h = 0; h < 2; ++h)
                        values[i].at[h] = values[i].at[h] & (I)(by.at[h] != 0.0f);  // no byte of a NaN gets through
            }
            const ManyBytes bytes = bytes_of_row<T>(values);
            memcpy(line + k, &bytes, sizeof bytes);
        }
    }
    // ahead: as many rows later, the same elements are fetched
    void write_row(int64_t r, float inverse, int64_t ahead, int8_t* q, bool stream) const {
        if (inverse == 0.0f) {
            memset(q, 0, columns);
            return;
        }
        const T* from = x + r * columns;
        alignas(64) uint8_t line[64];
        const uint32_t start = dither_start(seed, r, 0);
        int64_t i = 0;
        for (; i + 64 <= columns; i += 64) {
            if (sizeof(T) == 2)  // with wider elements the processor keeps pace alone
                for (int b = 0; b < 64; b += 32) fetch(from + ahead * columns + i + b);
            write_line(from + i, &inverse, start + (uint32_t)i * DITHER_COLUMN, line);
            store_line(q + i, line, stream);
        }
        if (i == columns) return;
        T last[64] = {};
        memcpy(last, from + i, (columns - i) * sizeof(T));
        write_line(last, &inverse, start + (uint32_t)i * DITHER_COLUMN, line);
        memcpy(q + i, line, columns - i);
    }
    template <int N> void take(int64_t r, const RowForm& form, Top<T>* tops, bool stream) const {
        Tops<T> top[N] = {};
        if (tops) look<N, true>(x + r * columns, columns, columns, 0, top, tops);
        else look<N, false>(x + r * columns, columns, columns, 0, top, tops);
        if (!form.scales) return;
        for (int k = 0; k < N; ++k) {
            const RowScale s = row_scale(as_float_bits<T>(highest_of(top[k])));
            form.scales[r + k] = s.scale;
            write_row(r + k, s.inverse, N, form.q + (r + k) * columns, stream);
        }
    }
    // Rows [first, last): their form, and the largest magnitudes of their columns in `tops`, unless null.
    void take_rows(int64_t first, int64_t last, const RowForm& form, Top<T>* tops) const {
        const bool stream = streams(form.q, rows, columns);
        if (tops) memset(tops, 0, sizeof(T) * columns);
        int64_t r = first;
        if (TOGETHER * columns * sizeof(T) <= ROWS_IN_CACHE)
            for (; r + TOGETHER <= last; r += TOGETHER) take<TOGETHER>(r, form, tops, stream);
        for (; r + TOGETHER / 2 <= last; r += TOGETHER / 2) take<TOGETHER / 2>(r, form, tops, stream);
        for (; r < last; ++r) take<1>(r, form, tops, stream);
        finish_stream();
    }
    void rowwise(const RowForm& form) const {
        const int64_t step = TOGETHER * (1 + (1 << 13) / (columns + 1));
        parallel_for((rows + step - 1) / step, threads, [&](int64_t task) {
            take_rows(task * step, std::min(rows, (task + 1) * step), form, nullptr);
        });
    }

    // ---- columns

    struct ColumnForm { int8_t* q; float* scales; };

    static constexpr int64_t TILE = 64;                  // rows: a line of q; columns are turned by as many
    // A block of 32 KB is turned while the next one is fetched.
    static constexpr int64_t HEIGHT = 256 / sizeof(T), WIDTH = 128;
    static constexpr int64_t STRIP = 1024 / sizeof(T);   // columns
    static constexpr int64_t LOOK_AHEAD = 16;            // rows

    struct Place { int64_t row, column; };
    struct Block { int64_t row, column, height, width; };  // at x[row][column]

    // WIDE columns of `height` rows, whole tiles; put(c, r, line) gets column c of the tile at row r. The first value
    // lies at `from` and is x[at.row][at.column]. As much is fetched at `next`, to be turned next: 64 columns with each
    // line that is stored, since reading and writing at once is faster than one after the other.
    template <int64_t WIDE, class F>
    __attribute__((always_inline)) void turn(const T* from, int64_t stride, int64_t height, const T* next,
                                             const float* inverses, Place at, const F& put) const {
        constexpr int PARTS = TILE / 4 / W;
        IntPair words[HEIGHT / 4][WIDE / (2 * W)];  // four rows to a word
        for (int64_t i = 0; i + 4 <= height; i += 4) {
            const uint32_t start = dither_start(seed, at.row + i, at.column);
            for (int64_t j = 0; j < WIDE; j += 2 * W) {
                const Pair inverse = {load(inverses + j, W), load(inverses + j + W, W)};
                IntPair values[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    values[k] = rounded<T, DITHERED>(load_pair(from + (i + k) * stride + j), inverse,
                                                     start + k * DITHER_ROW + (uint32_t)j * DITHER_COLUMN);
                for (int h = 0; h < 2; ++h)
                    words[i / 4][j / (2 * W)].at[h] =
                        words_of(values[0].at[h], values[1].at[h], values[2].at[h], values[3].at[h]);
            }
        }
        for (int64_t j = 0; j < WIDE; j += 2 * W)
            for (int h = 0; h < 2; ++h) {
                const I proper = (I)(load(inverses + j + h * W, W) != 0.0f);  // no byte of a NaN gets through
                for (int64_t r = 0; r + TILE <= height; r += TILE) {
                    I lines[W][PARTS];
                    for (int part = 0; part < PARTS; ++part) {
                        I square[W];
                        for (int i = 0; i < W; ++i)
                            square[i] = words[r / 4 + part * W + i][j / (2 * W)].at[h] & proper;
                        transpose(square);
                        for (int i = 0; i < W; ++i) lines[i][part] = square[i];
                    }
                    for (int l = 0; l < W; ++l) {
                        put(j + place<T>(h, l), r, lines[l]);
                        const T* ahead = next + l / (WIDE / TILE) * stride + l % (WIDE / TILE) * TILE;
                        for (int64_t c = 0; c < TILE; c += 64 / sizeof(T)) fetch(ahead + c);
                    }
                    next += W / (WIDE / TILE) * stride;
                }
            }
    }
    // q[column][row] from x[row][column] for the block at `at`, while the one at `next` is fetched.
    template <int64_t WIDE> void turn_whole(Block at, Block next, const float* inverses, int8_t* q, bool stream) const {
        const int64_t index = at.row * columns + at.column;
        int8_t* to = q + at.column * rows + at.row;
        turn<WIDE>(x + index, columns, at.height, x + next.row * columns + next.column, inverses + at.column,
                   {at.row, at.column}, [&](int64_t c, int64_t r, const I* line) __attribute__((always_inline)) {
                       store_line(to + c * rows + r, line, stream);
                   });
    }
    // The same for a tile of which some rows or columns do not exist.
    void turn_edge(int64_t row, int64_t column, const float* inverses, int8_t* q) const {
        const int64_t depth = std::min(TILE, rows - row), width = std::min(TILE, columns - column);
        const int64_t index = row * columns + column;
        int8_t* to = q + column * rows + row;
        T whole[TILE * TILE] = {};
        for (int64_t i = 0; i < depth; ++i) memcpy(whole + i * TILE, x + index + i * columns, width * sizeof(T));
        turn<TILE>(whole, TILE, TILE, whole, inverses + column, {row, column},
                   [&](int64_t c, int64_t, const I* line) __attribute__((always_inline)) {
                       if (c < width) memcpy(to + c * rows, line, depth);
                   });
    }
    // Turns rows [first, last) of columns [left, right), the last rows first.
    void walk(int64_t first, int64_t last, int64_t left, int64_t right, const float* inverses, int8_t* q) const {
        const bool stream = streams(q, columns, rows);
        const int64_t down = (last - first + HEIGHT - 1) / HEIGHT, across = (right - left + WIDTH - 1) / WIDTH;
        const auto at = [&](int64_t t) {
            t = std::min(t, down * across - 1);
            const int64_t row = first + (down - 1 - t / across) * HEIGHT, column = left + t % across * WIDTH;
            return Block{row, column, std::min(HEIGHT, last - row), std::min(WIDTH, right - column)};
        };
        for (int64_t t = 0; t < down * across; ++t) {
            const Block block = at(t);
            const int64_t height = block.height / TILE * TILE, width = block.width / TILE * TILE;
            if (height && width == WIDTH) turn_whole<WIDTH>(block, at(t + 1), inverses, q, stream);
            else if (height && width) turn_whole<TILE>(block, at(t + 1), inverses, q, stream);
            for (int64_t r = 0; r < block.height; r += TILE)
                for (int64_t c = r < height ? width : 0; c < block.width; c += TILE)
                    turn_edge(block.row + r, block.column + c, inverses, q);
        }
        finish_stream();
    }
    // Of n columns from the largest magnitudes; the inverses lie in the order in which `load_pair` gives the columns,
    // for whole pairs.
    static void set_scales(const Top<T>* tops, int64_t n, float* scales, float* inverses) {
        for (int64_t first = 0; first < n; first += 2 * W)
            for (int h = 0; h < 2; ++h)
                for (int l = 0; l < W; ++l) {
                    const int64_t c = first + place<T>(h, l);
                    const RowScale s = c < n ? row_scale(as_float_bits<T>(tops[c])) : RowScale{0.0f, 0.0f};
                    if (c < n) scales[c] = s.scale;
                    inverses[first + h * W + l] = s.inverse;
                }
    }
    int64_t tiles(int64_t n) const { return (n + TILE - 1) / TILE; }

    void turn_strip(int64_t first, const ColumnForm& form, float* inverses) const {
        const int64_t width = std::min(STRIP, columns - first);
        Top<T> tops[STRIP] = {};
        const T* from = x + first;
        Tops<T> unused[TOGETHER] = {}, also[1] = {};
        int64_t r = 0;
        for (; r + TOGETHER <= rows; r += TOGETHER)
            look<TOGETHER, true>(from + r * columns, columns, width, LOOK_AHEAD, unused, tops);
        for (; r < rows; ++r) look<1, true>(from + r * columns, columns, width, 0, also, tops);
        set_scales(tops, width, form.scales + first, inverses + first);
        walk(0, rows, first, first + width, inverses, form.q);
    }
    // The rows' form, and the scales of the columns
    void look_at_all(const RowForm& row_form, float* scales, float* inverses) const {
        const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, tiles(rows)));
        const int64_t share = (rows + parts - 1) / parts;
        std::vector<Top<T>> tops(parts * columns);
        parallel_for(parts, threads, [&](int64_t p) {
            take_rows(std::min(rows, p * share), std::min(rows, (p + 1) * share), row_form, &tops[p * columns]);
        });
        for (int64_t p = 1; p < parts; ++p)
            for (int64_t c = 0; c < columns; ++c) tops[c] = std::max(tops[c], tops[p * columns + c]);
        set_scales(tops.data(), columns, scales, inverses);
    }
    // The columns' form, by inverses that `look_at_all` has found
    void turn_all(int8_t* q, const float* inverses) const {
        // Narrow matrices: several blocks' heights in one go, while every thread has some.
        const int64_t many = std::min(4096 / (columns + 1), rows / (8 * HEIGHT * threads));
        const int64_t high = HEIGHT * std::max<int64_t>(1, many), down = (rows + high - 1) / high;
        const int64_t across = down < 4 * threads ? (columns + 1023) / 1024 : 1;
        const int64_t width = tiles((columns + across - 1) / across) * TILE;
        parallel_for(down * across, threads, [&](int64_t task) {
            const int64_t row = (down - 1 - task / across) * high, column = task % across * width;
            walk(row, std::min(rows, row + high), column, std::min(columns, column + width), inverses, q);
        });
    }
    // Rows as they lie, each column by its own scale; the last rows first
    void write_channels(int8_t* q, const float* inverses) const {
        const int64_t step = 1 + (1 << 15) / (columns + 1), tasks = (rows + step - 1) / step;
        parallel_for(tasks, threads, [&](int64_t task) {
            const int64_t first = (tasks - 1 - task) * step;
            alignas(64) uint8_t line[64];
            for (int64_t r = first; r < std::min(rows, first + step); ++r)
                for (int64_t c = 0; c < columns; c += 64) {
                    const int64_t count = std::min<int64_t>(64, columns - c), index = r * columns + c;
                    T last[64] = {};
                    if (count < 64) memcpy(last, x + index, count * sizeof(T));
                    write_line<true>(count < 64 ? last : x + index, inverses + c, dither_start(seed, r, c),
                                     line);
                    memcpy(q + index, line, count);
                }
        });
    }
    void columnwise(const ColumnForm& form) const {
        std::vector<float> inverses(tiles(columns) * TILE);
        const int64_t strips = (columns + STRIP - 1) / STRIP;
        if (strips < threads) {
            look_at_all({nullptr, nullptr}, form.scales, inverses.data());
            return turn_all(form.q, inverses.data());
        }
        parallel_for(strips, threads, [&](int64_t s) { turn_strip(s * STRIP, form, inverses.data()); });
    }
};

// ---- what Python calls; dtype: 0 float32, 1 float16, 2 bfloat16; seed: null rounds to nearest

template <class OfRows, class OfColumns>
static void run(const OfRows& of_rows, const OfColumns& of_columns, int8_t* row_q, float* row_scales, int8_t* column_q,
                float* column_scales, bool turned) {
    if (!column_scales) return of_rows.rowwise({row_q, row_scales});
    if (!row_scales && turned) return of_columns.columnwise({column_q, column_scales});
    std::vector<float> inverses(of_columns.tiles(of_columns.columns) * of_columns.TILE);
    of_rows.look_at_all({row_q, row_scales}, column_scales, inverses.data());
    if (turned) of_columns.turn_all(column_q, inverses.data());
    else of_columns.write_channels(column_q, inverses.data());
}

static void ask_for_pages(int8_t* row_q, int8_t* column_q, int64_t elements) {
    if (elements > STREAM)
        for (int8_t* q : {row_q, column_q})
            if (q) ask_for_huge_pages(q, elements);
}

static void quantize(const void* x, int dtype, int64_t rows, int64_t columns, const uint64_t* seed, bool nearest_rows,
                     int8_t* row_q, float* row_scales, int8_t* column_q, float* column_scales, bool turned,
                     int threads) {
    if (rows == 0 || columns == 0) {  // of empty rows and columns
        if (row_scales) std::fill(row_scales, row_scales + rows, 0.0f);
        if (column_scales) std::fill(column_scales, column_scales + columns, 0.0f);
        return;
    }
    const auto by_dtype = [&](auto* from) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        const auto go = [&](const auto& of_rows, const auto& of_columns) {
            run(of_rows, of_columns, row_q, row_scales, column_q, column_scales, turned);
        };
        const Quantiser<T, true> dithers{from, rows, columns, seed ? *seed : 0, threads};
        const Quantiser<T, false> plain{from, rows, columns, 0, threads};
        if (!seed) go(plain, plain);
        else if (nearest_rows) go(plain, dithers);
        else go(dithers, dithers);
    };
    if (dtype == 0) by_dtype((const float*)x);
    else if (dtype == 1) by_dtype((const Half*)x);
    else by_dtype((const BFloat16*)x);
}

// A form without scales is not wanted, or empty. nearest_rows: the seed is for columns alone. turned: their form is
// transposed.
extern "C" void lb_int8_quantize(const void* x, int dtype, int64_t rows, int64_t columns, const uint64_t* seed,
                                 int nearest_rows, int8_t* row_q, float* row_scales, int8_t* column_q,
                                 float* column_scales, int turned, int threads) {
    ask_for_pages(row_q, column_q, rows * columns);
    quantize(x, dtype, rows, columns, seed, nearest_rows, row_q, row_scales, column_q, column_scales, turned, threads);
}

// The same of groups of rows, each by itself, with the seed *seed + its number. `ends`: the row after its last. Its
// rows of column_q are its columns, transposed. many: elements of a group from which several threads pay.
extern "C" void lb_int8_quantize_groups(const void* x, int dtype, const int64_t* ends, int64_t groups, int64_t columns,
                                        const uint64_t* seed, int8_t* row_q, float* row_scales, int8_t* column_q,
                                        float* column_scales, int threads, int64_t many) {
    const int64_t size = dtype == 0 ? 4 : 2;
    if (groups) ask_for_pages(row_q, column_q, ends[groups - 1] * columns);
    for (int64_t e = 0, first = 0; e < groups; first = ends[e++]) {
        const int64_t rows = ends[e] - first, at = first * columns;
        const uint64_t own = seed ? *seed + e : 0;
        quantize((const char*)x + at * size, dtype, rows, columns, seed ? &own : nullptr, false,
                 row_q ? row_q + at : nullptr, row_scales ? row_scales + first : nullptr, column_q + at,
                 column_scales + e * columns, true, rows * columns < many ? 1 : threads);
    }
}
