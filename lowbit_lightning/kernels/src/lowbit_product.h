// y = x @ weight.T for a few rows of x: the packed weight is read once and decoded in registers.
//
// For each block of a row the products with the table's values are summed, and the sum is multiplied by the block's
// scale; from five rows of x on, the values are multiplied before (FOLDED), which then costs less. The offsets of
// affine formats meet sums of x over blocks. Sums are float32.
//
// x is first brought into the order of a chunk's values, as floats, or as pairs of bfloat16 where x is that and the
// processor multiplies pairs (vdpbf16ps): twice the products an instruction. The table is then rounded to bfloat16, in
// a unit in which that changes nf4 by 0.06 % (rms) and every other format not at all; folded it is the product of value
// and scale that is rounded, as in a weight that is dequantised to bfloat16.
#pragma once
#include "lowbit.h"
#include "parallel.h"
#include <vector>

// ---- engines: how values are decoded, and multiplied with x

template <bool FOLDED> struct Plain {  // floats
    typedef float Element;
    typedef V Vector;
    static constexpr int phases = PHASES;  // vectors of a chunk
    static constexpr int lanes = W;        // elements of a vector
    static constexpr bool folded = FOLDED;
    Values values;
    Spread spread;
    explicit Plain(const Form& form) : values(form), spread(form) {}
    static float factor(const Form&) { return 1; }

    struct Chunk {  // of a row
        const Plain* engine;
        V scale;
        LB_METHOD V of(const Codes& codes, int p) const {
            const V value = engine->values.of(codes, p);
            return FOLDED ? value * scale : value;
        }
    };
    LB_METHOD Chunk chunk(const float* scales, int64_t c) const {
        return {this, FOLDED ? spread.of(scales, c) : V{}};
    }
    static LB_METHOD V add(V sum, V a, V b) { return multiply_add(a, b, sum); }
};

#if LB_AVX512_BF16 && LB_AVX512_BW
#define LB_PAIRS 1
// Pairs of bfloat16; a lane of 16 bits holds half as many codes. The table has room for 32 values: folded it holds
// those of several blocks, each multiplied by its scale, and lanes look into that of their block.
template <bool FOLDED> struct Pairs {
    typedef uint16_t Element;
    typedef __m512i Vector;
    static constexpr int phases = PHASES / 2;
    static constexpr int lanes = 2 * W;
    static constexpr bool folded = FOLDED;
    static constexpr int CODE = BITS < 8 ? BITS : 5;
    static constexpr int tables = 32 >> CODE;  // blocks of a chunk for which there is room
    __m512i table, mask;
    __m512i own;        // where the table of a lane's block begins
    __m512i low, high;  // the blocks of the table's entries, first and second half
    __m512 values16;
    Values values;
    Spread spread;
    explicit Pairs(const Form& form)
        : table(_mm512_loadu_si512(form.narrow)), mask(_mm512_set1_epi16((1 << CODE) - 1)),
          values16(_mm512_loadu_ps(form.values)), values(form), spread(form) {
        alignas(64) uint16_t begins[32];
        alignas(64) int32_t blocks[32];
        for (int l = 0; l < 32; ++l) {
            begins[l] = l * tables / 32 << CODE;
            blocks[l] = (l >> CODE) * spread.fine / tables;
        }
        own = _mm512_load_si512(begins);
        low = _mm512_load_si512(blocks);
        high = _mm512_load_si512(blocks + 16);
    }
    static float factor(const Form& form) { return BITS == 8 || FOLDED ? 1 : 1 / form.factor; }

    struct Chunk {
        const Pairs* engine;
        __m512i table;
        LB_METHOD __m512i of(const Codes& codes, int p) const {
#if BITS == 8
            return (__m512i)_mm512_cvtne2ps_pbh(engine->values.of(codes, 2 * p + 1), engine->values.of(codes, 2 * p));
#else
            __m512i index = _mm512_srli_epi16((__m512i)codes.low, shift_of(p));
#if BITS == 3
            const int by = high_shift_of(p) - 2;
            const __m512i bytes = _mm512_cvtepu8_epi16((__m256i)codes.high);
            const __m512i high = by < 0 ? _mm512_slli_epi16(bytes, -by) : _mm512_srli_epi16(bytes, by);
            index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), high, index, 0xca);
#endif
            // index & mask | own
            if (FOLDED) index = _mm512_ternarylogic_epi32(index, engine->mask, engine->own, 0xea);
            return _mm512_permutexvar_epi16(index, table);
#endif
        }
    };
    LB_METHOD Chunk chunk(const float* scales, int64_t c) const {
        if (!FOLDED) return {this, table};
        const __m512 from = spread.fine ? _mm512_loadu_ps(scales + c * spread.fine)
                                        : _mm512_set1_ps(scales[c >> spread.shift]);
        return {this, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(values16, _mm512_permutexvar_ps(high, from)),
                                                    _mm512_mul_ps(values16, _mm512_permutexvar_ps(low, from)))};
    }
    static LB_METHOD V add(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#else
#define LB_PAIRS 0
#endif

// ---- x in the order of chunks

// A chunk from the natural order into [phase][lane]
template <int phases, int lanes, class Element> LB_FN void in_order(const Element* from, Element* to) {
    if (BITS == 8) {
        memcpy(to, from, CHUNK * sizeof *to);
        return;
    }
    for (int p = 0; p < phases; ++p)
        for (int l = 0; l < lanes; ++l) to[p * lanes + l] = from[l * phases + p];
}

template <class E> struct Prepared {
    typedef typename E::Vector Vector;
    int64_t rows, chunks;
    std::vector<Slot> x;      // [chunk][phase][row]: read in order; zeros after the end, and in rows that were added
    std::vector<float> sums;  // [row][block], of affine formats
    Prepared(const Form& form, int64_t rows) : rows(rows), chunks(ceil_div(form.length, CHUNK)) {
        x.resize(rows * chunks * E::phases);
        if (form.affine) sums.resize(rows * (form.blocks + PADDING));
    }
    const Vector* of(int64_t c) const { return (const Vector*)&x[c * E::phases * rows]; }

    template <class T> void fill(const Form& form, const T* from, int64_t m) {
        for (int64_t c = 0; c < chunks; ++c) {
            alignas(64) typename E::Element part[CHUNK] = {}, ordered[CHUNK];
            const int64_t left = least(CHUNK, form.length - c * CHUNK);
            copy(from + c * CHUNK, left, part);
            in_order<E::phases, E::lanes>(part, ordered);
            for (int p = 0; p < E::phases; ++p)
                memcpy(&x[(c * E::phases + p) * rows + m], ordered + p * E::lanes, sizeof(Slot));
        }
        if (!form.affine) return;
        for (int64_t b = 0; b < form.blocks; ++b) {
            const int64_t first = b * form.block, last = least(form.length, first + form.block);
            V sum{};
            for (int64_t k = first; k < last; k += W) sum = sum + load(from + k, (int)least(W, last - k));
            sums[m * (form.blocks + PADDING) + b] = sum_of(sum);
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

constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are needed, into the L2 cache

// R rows of the weight with M rows of x: out[r * M + m]. scales, offsets: of the R rows, `stride` floats apart.
template <int R, int M, class E>
static void product(const Form& form, const E& engine, const uint8_t* packed, const float* scales,
                    const float* offsets, int64_t stride, const Prepared<E>& x, float* out) {
    constexpr bool BY_BLOCK = BITS < 8 && !E::folded;  // sums are scaled; of 8 bits the row is a block
    V total[R][M] = {};
    const int64_t whole = form.length / CHUNK, ahead = R == 1 ? AHEAD : R * form.packed_stride;
    Codes last[R];  // before the loop: a call in it would drive the sums out of registers
    if (whole < x.chunks)
        for (int r = 0; r < R; ++r) last[r] = load_last_codes(form, packed + r * form.packed_stride, whole);
    for (int64_t c = 0; c < x.chunks; ++c) {
        Codes codes[R];
        typename E::Chunk chunks[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = packed + r * form.packed_stride;
            codes[r] = c < whole ? load_codes(form, row, c) : last[r];
            chunks[r] = engine.chunk(scales + r * stride, c);
            fetch(row + ahead + c * CHUNK_BYTES);
            if (BITS == 3) fetch(row + ahead + ceil_div(form.length, 4) + c * 2 * W);
        }
        V sums[R][M];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[r][m] = BY_BLOCK ? V{} : total[r][m];
        const typename E::Vector* from = x.of(c);
#pragma GCC unroll 16
        for (int p = 0; p < E::phases; ++p) {
            typename E::Vector weights[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weights[r] = chunks[r].of(codes[r], p);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sums[r][m] = E::add(sums[r][m], weights[r], from[p * M + m]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const V scale = BY_BLOCK ? engine.spread.of(scales + r * stride, c) : V{};
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
                total[r][m] = BY_BLOCK ? multiply_add(sums[r][m], scale, total[r][m]) : sums[r][m];
        }
    }
    float added[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) added[r][m] = sum_of(total[r][m]);  // unrolled: all sums stay in registers
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            float y = added[r][m] * E::factor(form);
            if (BITS == 8) y *= scales[r * stride];
            if (form.affine) {
                V shift{};
                for (int64_t b = 0; b < form.blocks; b += W)
                    shift = multiply_add(load(offsets + r * stride + b, W),
                                         load(&x.sums[m * (form.blocks + PADDING) + b], W), shift);
                y += sum_of(shift);
            }
            out[r * M + m] = y;
        }
}

// Rows n to n + count - 1 of the weight, R at a time, with M rows of x
template <int R, int M, class E, class T>
static void task(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t n, int64_t count,
                 const Prepared<E>& x, int64_t rows, const float* bias, T* out, int64_t N) {
    const E engine(form);
    const int64_t stride = form.blocks + PADDING;
    std::vector<float> decoded(2 * R * stride), y(count * M);
    for (int64_t i = 0; i < count; i += R) {
        float* offsets = decoded.data() + R * stride;
        const auto decode = [&](int r) {
            const uint8_t* row = scales + (n + i + r) * form.scales_stride;
            for (int64_t at = 0; at < form.scales_stride; at += 64) fetch(row + R * form.scales_stride + at);
            decode_scales(form, row, decoded.data() + r * stride, offsets + r * stride);
        };
        const uint8_t* from = packed + (n + i) * form.packed_stride;
        if (i + R <= count) {
            for (int r = 0; r < R; ++r) decode(r);
            product<R, M>(form, engine, from, decoded.data(), offsets, stride, x, &y[i * M]);
            continue;
        }
        for (int r = 0; i + r < count; ++r) {
            decode(r);
            product<1, M>(form, engine, from + r * form.packed_stride, decoded.data() + r * stride,
                          offsets + r * stride, stride, x, &y[(i + r) * M]);
        }
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < count; i += W) {
            const int width = (int)least(W, count - i);
            V v{};
            for (int l = 0; l < width; ++l) v[l] = y[(i + l) * M + m];
            if (bias) v = v + load(bias + n + i, width);
            store(out + m * N + n + i, v, width);
        }
}

template <int R, int M, class E, class T>
static void few_rows_of(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x,
                        int64_t rows, const float* bias, T* out, int threads) {
    Prepared<E> prepared(form, M);
    for (int64_t m = 0; m < rows; ++m) prepared.fill(form, x + m * form.length, m);
    const int64_t count = least(256, ceil_div(ceil_div(N, 8 * threads), 32) * 32);  // whole lines of the result
    parallel_for(ceil_div(N, count), threads, [&](int64_t t) {
        task<R, M>(form, packed, scales, t * count, least(count, N - t * count), prepared, rows, bias, out, N);
    });
}

template <class T> struct Engine {
    template <bool FOLDED> using of = Plain<FOLDED>;
    static bool folds(const Form&) { return BITS < 8; }
};
#if LB_PAIRS
template <> struct Engine<BFloat16> {
    template <bool FOLDED> using of = Pairs<FOLDED>;
    static bool folds(const Form& form) { return BITS < 8 && form.block * Pairs<true>::tables >= CHUNK; }
};
#endif

template <class T>
static void few_rows(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x,
                     int64_t rows, const float* bias, T* out, int threads) {
    typedef typename Engine<T>::template of<false> Sums;
    typedef typename Engine<T>::template of<BITS < 8> Folded;
    const bool folds = Engine<T>::folds(form) || BITS == 8;
    const auto run = rows == 1   ? few_rows_of<1, 1, Sums, T>
                     : rows == 2 ? few_rows_of<2, 2, Sums, T>
                     : rows <= 4 ? few_rows_of<2, 4, Sums, T>
                                 : (folds ? few_rows_of<2, 8, Folded, T> : few_rows_of<2, 8, Sums, T>);
    run(form, packed, scales, N, x, rows, bias, out, threads);
}
