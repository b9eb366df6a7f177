// Implicit products of int8 matrices, exact in int32 within a tap: the loops around an engine's tiles.
//
// A convolution multiplies, for each pixel of its result and each tap of its kernel, a row of the image (a pixel, its
// channels side by side) by a row of the weight. Which pixel is the tap's says a table; -1 is none, outside the image:
//   table[pixel of the result][tap]        of one image; all images of a batch have the same
// Patches are never written out. Three products use this:
//   windows    y and dx: for each tap the exact sum over the channels, times the scale of the tap's pixel, is added in
//              float32, tap by tap. By vectors both sums stay in registers: 6 rows by 2 vectors, and rows of A are read
//              where they lie. AMX's tiles hold rows at equal distances, so there a tap's rows are copied together.
//   weights    dw: contracts the pixels. A is the transposed gradient, as it lies; the panel of B is packed from the
//              pixels that the table names, so many at a time that they stay in the L2 cache.
//
// Rows of the result are taken in the order of which taps they have: those of a tile then lack the same ones, which are
// skipped. So the gradient by the input of a strided convolution costs no more than its forward.
#pragma once
#include "int8_dot.h"
#include "int8_gemm.h"
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

struct Taps {
    const int32_t* at;  // [results][taps]
    int64_t results, taps, pixels, images;  // of one image: rows of the result, and of A
};

// A [rows][K] as the engine reads it, room for panels of B, and where the sums of A's rows start: parts of the
// contraction have their own. What is copied is padded with zeros.
template <class Engine> class Operand {
public:
    typedef typename Engine::Element Element;
    Element *a, *panels;
    int32_t* start;  // [part][row]
    int64_t rows, stride;

    Operand(const int8_t* A, int64_t rows, int64_t K, int64_t part, int64_t columns, int threads)
        : rows(rows), stride(up_to_multiple(K, Engine::k_step)) {
        const bool copies = sizeof(Element) > 1 || K % Engine::k_step != 0;
        const int64_t copied = copies ? rows * stride : 0, parts = std::max<int64_t>(1, (K + part - 1) / part);
        memory.reset(new char[64 + (columns * stride + copied) * sizeof(Element) + 4 * rows * parts]);
        panels = (Element*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        a = panels + columns * stride;
        start = (int32_t*)(a + copied);
        if (!copies) a = (Element*)A;
        parallel_for((rows + 63) / 64, threads, [&](int64_t block) {
            for (int64_t m = block * 64; m < least(rows, block * 64 + 64); ++m) {
                if (copies) widen(A + m * K, K, stride, 0, a + m * stride);
                for (int64_t p = 0; p < parts; ++p)
                    start[p * rows + m] = start_of<Engine>(A + m * K + p * part, least(part, K - p * part));
            }
        });
    }
    const Element* row(int64_t m) const { return a + m * stride; }

private:
    std::unique_ptr<char[]> memory;
};

// ---- windows

// Pixels of the result, those that have the same taps side by side
static std::vector<int32_t> order_of(const Taps& table) {
    std::vector<uint64_t> kinds(table.results);
    for (int64_t m = 0; m < table.results; ++m)
        for (int64_t t = 0; t < table.taps; ++t)  // an FNV hash; a collision costs time only
            kinds[m] = (kinds[m] ^ (table.at[m * table.taps + t] < 0)) * 0x100000001b3;
    std::vector<int32_t> order(table.results);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return kinds[i] < kinds[j]; });
    return order;
}

template <class Engine> struct Windows {
    const Operand<Engine>& a;  // sums in one part
    const float* scales;       // of its rows
};

constexpr int64_t TAP_COLUMNS = 2 * W;

// total[rows][TAP_COLUMNS], of up to Engine::rows rows; index[tap][Engine::rows]: rows of A, or -1
template <class Engine>
static void add_taps(Engine& engine, const Windows<Engine>& w, const int32_t* index, int64_t taps, int64_t rows,
                     const typename Engine::Element* panel, int64_t width, float* total) {
    typedef typename Engine::Element Element;
    static thread_local std::vector<Element> copied;
    copied.resize(Engine::rows * w.a.stride);
    alignas(64) int32_t sums[Engine::rows * Engine::columns];
    std::fill(total, total + rows * TAP_COLUMNS, 0.0f);
    for (int64_t t = 0; t < taps; ++t, index += Engine::rows, panel += w.a.stride * width) {
        bool any = false;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t from = index[i] < 0 ? 0 : index[i];
            any |= index[i] >= 0;
            memcpy(&copied[i * w.a.stride], w.a.row(from), w.a.stride * sizeof(Element));
            std::fill(sums + i * Engine::columns, sums + (i + 1) * Engine::columns, w.a.start[from]);
        }
        if (!any) continue;
        engine.add(copied.data(), w.a.stride, panel, w.a.stride, rows, width, sums);
        for (int64_t i = 0; i < rows; ++i) {
            const float scale = index[i] < 0 ? 0.0f : w.scales[index[i]];
            for (int64_t j = 0; j < width; ++j)
                total[i * TAP_COLUMNS + j] += (float)sums[i * Engine::columns + j] * scale;
        }
    }
}

template <int ROWS, int VECTORS>
static void add_taps_in_registers(const Windows<Dots>& w, const int32_t* index, int64_t taps,
                                  const DotElement* panel, float* total) {
    V y[ROWS][VECTORS] = {};
    const int64_t groups = w.a.stride / GROUP;
    for (int64_t t = 0; t < taps; ++t, index += MR, panel += groups * VECTORS * W * GROUP) {
        int32_t none = -1;
        for (int i = 0; i < ROWS; ++i) none &= index[i];
        if (none < 0) continue;
        const DotElement* row[ROWS];
        I s[ROWS][VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const int64_t from = index[i] < 0 ? 0 : index[i];  // whose sum is multiplied by zero
            row[i] = w.a.row(from);
            for (int j = 0; j < VECTORS; ++j) s[i][j] = splat<I>(w.a.start[from]);
        }
        for (int64_t g = 0; g < groups; ++g) {
            I columns[VECTORS];
            for (int j = 0; j < VECTORS; ++j) memcpy(&columns[j], panel + (g * VECTORS + j) * W * GROUP, sizeof(I));
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                int32_t lane;
                memcpy(&lane, row[i] + g * GROUP, 4);
                const I value = splat<I>(lane);
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j) s[i][j] = dot(s[i][j], value, columns[j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const V scale = splat<V>(index[i] < 0 ? 0.0f : w.scales[index[i]]);
            for (int j = 0; j < VECTORS; ++j) y[i][j] = y[i][j] + to_float(s[i][j]) * scale;
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) memcpy(total + i * TAP_COLUMNS + j * W, &y[i][j], sizeof(V));
}
template <int VECTORS>
static void add_taps_in_registers(const Windows<Dots>& w, const int32_t* index, int64_t taps, int64_t rows,
                                  const DotElement* panel, float* total) {
    switch (rows) {
    case 1: return add_taps_in_registers<1, VECTORS>(w, index, taps, panel, total);
    case 2: return add_taps_in_registers<2, VECTORS>(w, index, taps, panel, total);
    case 3: return add_taps_in_registers<3, VECTORS>(w, index, taps, panel, total);
    case 4: return add_taps_in_registers<4, VECTORS>(w, index, taps, panel, total);
    case 5: return add_taps_in_registers<MR < 5 ? MR : 5, VECTORS>(w, index, taps, panel, total);
    default: return add_taps_in_registers<MR, VECTORS>(w, index, taps, panel, total);
    }
}
static void add_taps(Dots&, const Windows<Dots>& w, const int32_t* index, int64_t taps, int64_t rows,
                     const DotElement* panel, int64_t width, float* total) {
    if (width > W) add_taps_in_registers<2>(w, index, taps, rows, panel, total);
    else add_taps_in_registers<1>(w, index, taps, rows, panel, total);
}

constexpr int64_t WINDOW_ROWS = 96;  // of a block: what they read stays in the L2 cache

// finish(row of the result, first column, count, totals) for all rows and columns
template <class Engine, class F>
static void multiply_windows(const Windows<Engine>& w, const typename Engine::Element* panels, const Taps& table,
                             int64_t N, int threads, const F& finish) {
    constexpr int64_t MR_ = Engine::rows;
    static_assert(WINDOW_ROWS % MR_ == 0, "");
    const std::vector<int32_t> order = order_of(table);
    const int64_t taps = table.taps, M = table.results * table.images, strips = (N + TAP_COLUMNS - 1) / TAP_COLUMNS;
    const int64_t blocks = (M + WINDOW_ROWS - 1) / WINDOW_ROWS;
    const int64_t parts = std::min(strips, std::max<int64_t>(1, 8 * threads / blocks));
    const int64_t strips_of_part = (strips + parts - 1) / parts;
    parallel_for(blocks * parts, threads, [&](int64_t task) {
        const int64_t first = task / parts * WINDOW_ROWS, rows = least(WINDOW_ROWS, M - first);
        Engine engine;
        static thread_local std::vector<int32_t> index, to;
        index.assign(WINDOW_ROWS * taps, -1);
        to.resize(WINDOW_ROWS);
        int32_t image = (int32_t)(first / table.results), place = (int32_t)(first % table.results);
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t pixel = order[place], base = image * (int32_t)table.pixels;
            const int32_t* from = table.at + pixel * taps;
            to[i] = image * (int32_t)table.results + pixel;
            int32_t* column = &index[i / MR_ * MR_ * taps + i % MR_];
            for (int64_t t = 0; t < taps; ++t) column[t * MR_] = from[t] + (base & ~(from[t] >> 31));  // -1 stays
            if (++place == table.results) place = 0, ++image;
        }
        const int64_t strip = task % parts * strips_of_part, last = least(strips, strip + strips_of_part);
        for (int64_t n = strip * TAP_COLUMNS; n < least(N, last * TAP_COLUMNS); n += TAP_COLUMNS) {
            const int64_t count = least(TAP_COLUMNS, N - n), width = up_to_multiple(count, Engine::column_step);
            for (int64_t top = 0; top < rows; top += MR_) {
                const int64_t height = least(MR_, rows - top);
                alignas(64) float total[MR_ * TAP_COLUMNS];
                add_taps(engine, w, &index[top * taps], taps, height, panels + n * taps * w.a.stride, width, total);
                for (int64_t i = 0; i < height; ++i) finish(to[top + i], n, count, total + i * TAP_COLUMNS);
            }
        }
    });
}

// ---- weights

// A group of neighbours along the contraction, to one 32-bit lane for each of W columns
template <class Engine> LB_FN I group_of(const int8_t* const* rows, int count) {
    if (sizeof(typename Engine::Element) == 4) return widen_signed(load_raw<Bytes>(rows[0], count));
    if (sizeof(typename Engine::Element) == 2)
        return (widen_signed(load_raw<Bytes>(rows[0], count)) & 0xffff) |
               widen_signed(load_raw<Bytes>(rows[Engine::group / 2], count)) << 16;
    const I low = widen(load_raw<Bytes>(rows[0], count)) | widen(load_raw<Bytes>(rows[Engine::group / 4], count)) << 8;
    const I high = widen(load_raw<Bytes>(rows[Engine::group / 2], count)) |
                   widen(load_raw<Bytes>(rows[Engine::group / 2 + Engine::group / 4], count)) << 8;
    const I four = low | high << 16;
    return Engine::offset ? four ^ (int32_t)0x80808080 : four;
}

// A panel of `length` steps along the contraction and `width` columns; row(k) is where the columns of step k lie, one
// side by side with the next, `count` of them, or null: zeros
template <class Engine, class F>
static void interleave(int64_t length, int64_t count, int64_t width, typename Engine::Element* panel, const F& row) {
    alignas(64) static const int8_t zeros[8 * W] = {};
    for (int64_t k = 0; k < length; k += Engine::group) {
        const int8_t* rows[Engine::group];
        for (int64_t i = 0; i < Engine::group; ++i) {
            const int8_t* at = row(k + i);
            rows[i] = at ? at : zeros;
        }
        for (int64_t n = 0; n < width; n += W) {
            const I lanes = group_of<Engine>(rows, (int)std::max<int64_t>(0, least(W, count - n)));
            memcpy(panel, &lanes, sizeof lanes);
            panel += W * Engine::group;
            for (int64_t i = 0; i < Engine::group; ++i) rows[i] += W;
        }
    }
}

// Channels c to c + count - 1 of tap t, of `length` pixels of the result from `first` on
template <class Engine>
static void pack_pixels(const int8_t* x, int64_t channels, const Taps& table, int64_t t, int64_t first, int64_t length,
                        int64_t c, int64_t count, int64_t width, typename Engine::Element* panel) {
    int64_t image = first / table.results, pixel = first % table.results, left = table.results * table.images - first;
    interleave<Engine>(length, count, width, panel, [&](int64_t) __attribute__((always_inline)) {
        const int32_t from = left-- > 0 ? table.at[pixel * table.taps + t] : -1;
        const int8_t* row = from < 0 ? nullptr : x + (image * table.pixels + from) * channels + c;
        if (++pixel == table.results) pixel = 0, ++image;
        return row;
    });
}

constexpr int64_t PART = 1 << 16;         // pixels: their sum fits an int32, -128 included
constexpr int64_t MOST_ROWS = 384;        // of a task: their sums stay in the L2 cache, beside a panel
constexpr int64_t FEWEST_PIXELS = 1024;   // of a task, which keeps sums of its own

// finish(first row, rows, tap, first column, columns, sums, pitch), once for each part of the pixels, in their order.
// A task is a tap, a panel of channels and a block of rows; where these are few, also a share of the pixels.
template <class Engine, class F>
static void multiply_weights(const Operand<Engine>& a, const int8_t* x, int64_t channels, const Taps& table,
                             int threads, const F& finish) {
    typedef typename Engine::Element Element;
    constexpr int64_t MR_ = Engine::rows, NR = Engine::columns, K_BLOCK = Engine::k_block;
    const int64_t M = a.rows;
    const int64_t panels = (channels + NR - 1) / NR, others = table.taps * panels;
    const int64_t part_of_rows = std::max<int64_t>(64, M * others / (4 * threads));  // of rows for each packed panel
    const int64_t step = up_to_multiple(least(MOST_ROWS, least(M, part_of_rows)), MR_), blocks = (M + step - 1) / step;
    const int64_t tasks = others * blocks;
    for (int64_t part = 0; part < a.stride; part += PART) {
        const int64_t length = least(PART, a.stride - part), wanted = (8 * threads + tasks - 1) / tasks;
        const int64_t shares = tasks < 8 * threads ? least(wanted, 1 + (length - 1) / FEWEST_PIXELS) : 1;
        const int64_t share = up_to_multiple((length + shares - 1) / shares, Engine::k_step);
        std::vector<int32_t> kept(shares > 1 ? tasks * shares * step * NR : 0);
        const auto each = [&](int64_t task, const auto& take) {
            const int64_t t = task / blocks / panels, c = task / blocks % panels * NR, first = task % blocks * step;
            take(t, c, least(NR, channels - c), first, least(step, M - first));
        };
        parallel_for(tasks * shares, threads, [&](int64_t number) {
            each(number / shares, [&](int64_t t, int64_t c, int64_t count, int64_t first, int64_t rows) {
                const int64_t width = up_to_multiple(count, Engine::column_step);
                const int64_t begin = part + number % shares * share, end = least(part + length, begin + share);
                Engine engine;
                static thread_local std::vector<Element> memory;
                static thread_local std::vector<int32_t> own;
                memory.resize(K_BLOCK * NR + 64 / sizeof(Element));
                own.resize(step * NR);
                int32_t* sums = shares > 1 ? &kept[number * step * NR] : own.data();
                Element* panel = (Element*)(((uintptr_t)memory.data() + 63) / 64 * 64);
                if (begin == part)
                    for (int64_t i = 0; i < rows; ++i)
                        std::fill(sums + i * NR, sums + (i + 1) * NR, a.start[part / PART * M + first + i]);
                else std::fill(sums, sums + rows * NR, 0);
                for (int64_t k = begin; k < end; k += K_BLOCK) {
                    const int64_t depth = least(K_BLOCK, end - k);
                    pack_pixels<Engine>(x, channels, table, t, k, depth, c, count, width, panel);
                    for (int64_t top = 0; top < rows; top += MR_)
                        engine.add(a.row(first + top) + k, a.stride, panel, depth, least(MR_, rows - top), width,
                                   sums + top * NR);
                }
                if (shares == 1) finish(first, rows, t, c, count, sums, NR);
            });
        });
        if (shares > 1) parallel_for(tasks, threads, [&](int64_t task) {
            each(task, [&](int64_t t, int64_t c, int64_t count, int64_t first, int64_t rows) {
                uint32_t* sums = (uint32_t*)&kept[task * shares * step * NR];  // they may wrap around on the way
                for (int64_t other = 1; other < shares; ++other)
                    for (int64_t i = 0; i < rows * NR; ++i) sums[i] += sums[other * step * NR + i];
                finish(first, rows, t, c, count, (const int32_t*)sums, NR);
            });
        });
    }
}
