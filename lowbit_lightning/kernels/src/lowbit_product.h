// y = x @ weight.T for a few rows of x: the packed weight is read once and decoded in registers.
//
// For each block of a row the products with the table's values are summed, and the sum is multiplied by the block's
// scale; the offsets of affine formats meet sums of x over blocks. From five rows of x on, scales are applied to the
// values (FOLDED in lowbit_engines.h), which then costs less. Sums are float32.
//
// More than eight rows of x are groups of eight. Rows of the weight are then decoded once, into the cache, for all of
// them; 8 bits, which are decoded quickly, for each group.
#pragma once
#include "lowbit_engines.h"
#include "parallel.h"
#include <vector>

// ---- x in the order of chunks

template <class E> struct Prepared {
    typedef typename E::Vector Vector;
    typedef typename E::Element Element;
    int64_t groups, rows, chunks;  // rows: of a group
    std::vector<Slot> x;      // [group][chunk][phase][row]; zeros after the end, and in rows that were added
    std::vector<float> sums;  // [group][row][block], of affine formats

    void prepare(const Form& form, int64_t count, int64_t of_group) {
        groups = ceil_div(count, of_group), rows = of_group, chunks = ceil_div(form.length, CHUNK);
        grow(x, groups * size());
        if (has_sums(form)) grow(sums, groups * rows * (form.blocks + PADDING));
    }
    template <class T> static void grow(std::vector<T>& memory, size_t size) {
        if (memory.size() < size) memory.resize(size);
    }
    static bool has_sums(const Form& form) { return form.affine && !E::has_offsets; }
    int64_t size() const { return rows * chunks * E::phases; }
    const Vector* of(int64_t group, int64_t c) const {
        return (const Vector*)&x[group * size() + c * E::phases * rows];
    }
    const float* sums_of_row(const Form& form, int64_t m) const { return &sums[m * (form.blocks + PADDING)]; }

    // Row m; zeros without `from`.
    template <class T> void fill(const Form& form, const T* from, int64_t m) {
        Slot* to = &x[m / rows * size() + m % rows];
        for (int64_t c = 0; c < chunks; ++c, to += E::phases * rows) {
            alignas(64) Element part[CHUNK], ordered[CHUNK];
            const int64_t count = from ? least(CHUNK, form.length - c * CHUNK) : 0;
            if (count < CHUNK) memset(part, 0, sizeof part);
            if (count) copy(from + c * CHUNK, count, part);
            E::in_order(part, ordered);
            for (int p = 0; p < E::phases; ++p) memcpy(&to[p * rows], ordered + p * E::lanes, sizeof(Slot));
        }
        if (!has_sums(form)) return;
        float* sum_to = &sums[m * (form.blocks + PADDING)];
        memset(sum_to, 0, (form.blocks + PADDING) * sizeof *sum_to);
        for (int64_t b = 0; b < form.blocks && from; ++b) {
            const int64_t first = b * form.block, last = least(form.length, first + form.block);
            V sum{};
            for (int64_t k = first; k < last; k += W) sum = sum + load(from + k, (int)least(W, last - k));
            sum_to[b] = sum_of(sum);
        }
    }
    template <class T> static void copy(const T* from, int64_t count, float* to) {
        int64_t i = 0;
        for (; i + W <= count; i += W) store(to + i, load(from + i, W), W);
        if (i < count) store(to + i, load(from + i, (int)(count - i)), (int)(count - i));
    }
    static void copy(const BFloat16* from, int64_t count, uint16_t* to) { memcpy(to, from, 2 * count); }
};

// ---- the product

#if LB_AVX512
// Lane i: the sum of the lanes of x[i]. Two vectors become one of sums of halves, of quarters and so on.
LB_FN V sums_of_square(const V* x) {
    constexpr int LOW = 0x44, HIGH = 0xee, EVEN = 0x88, ODD = 0xdd;
    V halves[8], quarters[4], pairs[2];
    for (int i = 0; i < 8; ++i)
        halves[i] = _mm512_shuffle_f32x4(x[i], x[i + 8], LOW) + _mm512_shuffle_f32x4(x[i], x[i + 8], HIGH);
    for (int i = 0; i < 4; ++i)
        quarters[i] = _mm512_shuffle_f32x4(halves[i], halves[i + 4], EVEN) +
                      _mm512_shuffle_f32x4(halves[i], halves[i + 4], ODD);
    for (int i = 0; i < 2; ++i)
        pairs[i] = _mm512_shuffle_ps(quarters[i], quarters[i + 2], LOW) +
                   _mm512_shuffle_ps(quarters[i], quarters[i + 2], HIGH);
    const V sums = _mm512_shuffle_ps(pairs[0], pairs[1], EVEN) + _mm512_shuffle_ps(pairs[0], pairs[1], ODD);
    const __m512i place = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(place, sums);
}
#endif
// out[i]: the sum of the lanes of x[i]
template <int N> LB_FN void sums_of(const V* x, float* out) {
    int i = 0;
#if LB_AVX512
    for (; i + W <= N; i += W) store(out + i, sums_of_square(x + i), W);
#endif
    for (; i < N; ++i) out[i] = sum_of(x[i]);
}

constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are needed, into the L2 cache

// R rows of the weight: codes `pitch` bytes apart, scales and offsets `stride` floats apart.
struct Rows {
    const Form& form;
    const uint8_t* packed;
    int64_t pitch;
    const float *scales, *offsets;
    int64_t stride;
};

// Calls body(c, codes, chunks) for every chunk. Codes and tables are prepared a chunk ahead: a table takes many steps
// that wait for each other, and the processor does not look far enough ahead to fill that time with products.
template <int R, class E, class F>
LB_FN void for_chunks(const Rows& rows, const E& engine, int64_t count, const F& body) {
    const Form& form = rows.form;
    const int64_t whole = form.length / CHUNK, ahead = R == 1 ? AHEAD : R * rows.pitch;
    LastCodes last[R];
    if (whole < count)
        for (int r = 0; r < R; ++r) last[r].copy(form, rows.packed + r * rows.pitch);
    Codes codes[R], next_codes[R];
    typename E::Chunk chunks[R], next[R];
    const auto prepare = [&](int64_t c) LB_LAMBDA {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            next_codes[r] = load_codes(form, rows.packed + r * rows.pitch, c, whole, last[r]);
            next[r] = engine.chunk(rows.scales + r * rows.stride, rows.offsets + r * rows.stride, c);
        }
    };
    prepare(0);
    for (int64_t c = 0; c < count; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            codes[r] = next_codes[r];
            chunks[r] = next[r];
            const uint8_t* row = rows.packed + r * rows.pitch;
            fetch(row + ahead + c * CHUNK_BYTES);
            if (BITS == 3) fetch(row + ahead + ceil_div(form.length, 4) + c * 2 * W);
        }
        prepare(c + 1);
        body(c, codes, chunks);
    }
}

// R vectors of the weight with M of x
template <int R, int M, class E>
LB_FN void add_products(V (&sums)[R][M], const typename E::Vector (&weights)[R], const typename E::Vector* x) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][m] = E::add(sums[r][m], weights[r], x[m]);
}

// total -> out[r * M + m], with a group of M rows of x
template <int R, int M, class E>
LB_FN void finish(const Rows& rows, const V (&total)[R][M], const Prepared<E>& x, int64_t group, float* out) {
    const Form& form = rows.form;
    V parts[R * M];  // a copy: what has an address does not stay in registers
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) parts[r * M + m] = total[r][m];
    for (int i = 0; i < R * M && x.has_sums(form); ++i) {
        const float *offsets = rows.offsets + i / M * rows.stride, *sums = x.sums_of_row(form, group * M + i % M);
        for (int64_t b = 0; b < form.blocks; b += W)
            parts[i] = multiply_add(load(offsets + b, W), load(sums + b, W), parts[i]);
    }
    sums_of<R * M>(parts, out);
    for (int i = 0; i < R * M && BITS == 8; ++i) out[i] *= rows.scales[i / M * rows.stride];
}

// R rows of the weight with a group of M rows of x
template <int R, int M, class E>
static void product(const Rows& rows, const E& engine, const Prepared<E>& x, int64_t group, float* out) {
    constexpr bool BY_BLOCK = BITS < 8 && !E::folded;  // sums are scaled; of 8 bits the row is a block
    V total[R][M] = {};
    for_chunks<R>(rows, engine, x.chunks, [&](int64_t c, const Codes (&codes)[R], const auto& chunks) LB_LAMBDA {
        V sums[R][M];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[r][m] = BY_BLOCK ? V{} : total[r][m];
        const typename E::Vector* from = x.of(group, c);
#pragma GCC unroll 16
        for (int p = 0; p < E::phases; ++p) {
            typename E::Vector weights[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weights[r] = chunks[r].of(codes[r], p);
            add_products<R, M, E>(sums, weights, from + p * M);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const V scale = BY_BLOCK ? engine.spread.of(rows.scales + r * rows.stride, c) : V{};
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
                total[r][m] = BY_BLOCK ? multiply_add(sums[r][m], scale, total[r][m]) : sums[r][m];
        }
    });
    finish<R, M, E>(rows, total, x, group, out);
}

// The same for every group of x; the rows are decoded once, into `decoded`: [chunk][phase][r].
template <int R, int M, class E>
static void products(const Rows& rows, const E& engine, const Prepared<E>& x, Slot* decoded, float* out,
                     int64_t pitch) {
    typedef typename E::Vector Vector;
    for_chunks<R>(rows, engine, x.chunks, [&](int64_t c, const Codes (&codes)[R], const auto& chunks) LB_LAMBDA {
        Vector* to = (Vector*)decoded + c * E::phases * R;
#pragma GCC unroll 16
        for (int p = 0; p < E::phases; ++p)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) to[p * R + r] = chunks[r].of(codes[r], p);
    });
    for (int64_t g = 0; g < x.groups; ++g) {
        V total[R][M] = {};
        const Vector *from = x.of(g, 0), *weights_from = (const Vector*)decoded;
        for (int64_t step = 0; step < x.chunks * E::phases; ++step, from += M, weights_from += R) {
            Vector weights[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weights[r] = weights_from[r];
            add_products<R, M, E>(total, weights, from);
        }
        finish<R, M, E>(rows, total, x, g, out + g * pitch);
    }
}

// Rows n to n + count - 1 of the weight, R at a time, with the groups of M rows of x, which may be several
template <int R, int M, bool SEVERAL, class E, class T>
static void task(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t n, int64_t count,
                 const Prepared<E>& x, int64_t rows, const float* bias, T* out, int64_t N) {
    const E engine(form);
    const int64_t stride = form.blocks + PADDING;
    const float unit = E::unit(form);
    const int64_t tall = count + R - 1;
    std::vector<float> decoded(2 * R * stride), y(x.groups * tall * M);  // y: [group][row of the weight][row of x]
    std::vector<Slot> weights(SEVERAL ? x.chunks * E::phases * R : 0);
    for (int64_t i = 0; i < count; i += R) {
        float* offsets = decoded.data() + R * stride;
        const int64_t height = least(R, count - i);
        for (int64_t r = 0; r < height; ++r) {
            const uint8_t* row = scales + (n + i + r) * form.scales_stride;
            for (int64_t at = 0; at < form.scales_stride; at += 64) fetch(row + R * form.scales_stride + at);
            decode_scales(form, row, decoded.data() + r * stride, offsets + r * stride);
            for (int64_t b = 0; b < form.blocks && unit != 1; ++b) decoded[r * stride + b] *= unit;
        }
        const auto multiply = [&](int64_t r, int64_t pitch, int64_t apart) {
            const Rows these{form,    packed + (n + i + r) * form.packed_stride, pitch, decoded.data() + r * stride,
                             offsets + r * stride, apart};
            float* to = &y[(i + r) * M];
            if (SEVERAL) products<R, M>(these, engine, x, weights.data(), to, tall * M);
            else
                for (int64_t g = 0; g < x.groups; ++g) product<R, M>(these, engine, x, g, to + g * tall * M);
        };
        if (height == R) multiply(0, form.packed_stride, stride);
        else
            for (int64_t r = 0; r < height; ++r) multiply(r, 0, 0);  // the same row R times
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < count; i += W) {
            const int width = (int)least(W, count - i);
            V v{};
            for (int l = 0; l < width; ++l) v[l] = y[(m / M * tall + i + l) * M + m % M];
            if (bias) v = v + load(bias + n + i, width);
            store(out + m * N + n + i, v, width);
        }
}

template <int R, int M, bool SEVERAL, class E, class T>
static void few_rows_of(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x,
                        int64_t rows, const float* bias, T* out, int threads) {
    thread_local Prepared<E> memory;
    Prepared<E>& prepared = memory;  // of this thread: others would take their own for the name
    prepared.prepare(form, rows, M);
    parallel_for(prepared.groups * M, rows > M ? threads : 1, [&](int64_t m) {
        prepared.fill(form, m < rows ? x + m * form.length : nullptr, m);
    });
    constexpr int64_t LINE = R == 3 ? 96 : 32;  // whole lines of the result
    const int64_t count = least(128 / LINE * LINE, ceil_div(ceil_div(N, 8 * threads), LINE) * LINE);
    parallel_for(ceil_div(N, count), threads, [&](int64_t t) {
        task<R, M, SEVERAL>(form, packed, scales, t * count, least(count, N - t * count), prepared, rows, bias, out, N);
    });
}

// Rows of the weight that share a load of x, with eight of x: three, if sums, tables and scales stay in registers.
constexpr int TOGETHER = LB_AVX512 && BITS == 8 ? 3 : 2, DECODED_TOGETHER = LB_AVX512 ? 3 : 2;

template <class T> struct Engine {
    template <bool FOLDED> using of = Plain<FOLDED>;
    static constexpr bool FOLDS = true;  // whatever the form
};
#if LB_PAIRS
template <> struct Engine<BFloat16> {
    template <bool FOLDED> using of = Pairs<FOLDED>;
    static constexpr bool FOLDS = BITS == 8;
};
#endif

template <class T>
static void few_rows(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x,
                     int64_t rows, const float* bias, T* out, int threads) {
    typedef typename Engine<T>::template of<false> Sums;
    typedef typename Engine<T>::template of<BITS < 8> Folded;
    const auto some = [&](int64_t first, int64_t count) {
        auto run = few_rows_of<1, 1, false, Sums, T>;
        if (count > 1) run = few_rows_of<2, 2, false, Sums, T>;
        if (count > 2) run = few_rows_of<2, 4, false, Sums, T>;
        if (count > 4) run = few_rows_of<TOGETHER, 8, false, Folded, T>;
        if (count > 8) run = few_rows_of<DECODED_TOGETHER, 8, (BITS < 8), Folded, T>;
        if constexpr (!Engine<T>::FOLDS)
            if (count > 4 && form.block * Folded::tables < CHUNK) run = few_rows_of<TOGETHER, 8, false, Sums, T>;
        run(form, packed, scales, N, x + first * form.length, count, bias, out + first * N, threads);
    };
    const int64_t eights = rows % 8 > 4 ? rows : rows / 8 * 8;
    if (eights) some(0, eights);
    if (eights < rows) some(eights, rows - eights);
}
