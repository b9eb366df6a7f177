// y = x @ weight.T for a few rows of x: the packed weight is read once and decoded in registers.
//
// For each block of a row the products with the table's values are summed, and the sum is multiplied by the block's
// scale; the offsets of affine formats meet sums of x over blocks. Sums are float32.
//
// x is first brought into the order of a chunk's values, as floats, or as pairs of bfloat16 where x is that and the
// processor multiplies pairs (vdpbf16ps): twice the products an instruction. The table is then rounded to bfloat16, in
// a unit in which that changes nf4 by 0.06 % (rms) and every other format not at all.
#pragma once
#include "lowbit.h"
#include "parallel.h"
#include <vector>

// ---- x in the order of chunks

struct Plain {  // floats
    typedef float Element;
    typedef V Vector;
    static constexpr int phases = PHASES;  // vectors of a chunk
    static constexpr int lanes = W;        // elements of a vector
    static constexpr int scales_from = 4;  // so many rows of x, weights are multiplied by their scales
    Values values;
    explicit Plain(const Form& form) : values(form) {}
    static float factor(const Form&) { return 1; }
    LB_METHOD V multiply(const Codes& codes, int p) const { return values.of(codes, p); }
    static LB_METHOD V scaled(V weights, V scale) { return weights * scale; }
    static LB_METHOD V add(V sum, V a, V b) { return multiply_add(a, b, sum); }
};

#if LB_AVX512_BF16 && LB_AVX512_BW
#define LB_PAIRS 1
struct Pairs {  // of bfloat16; a lane of 16 bits holds half as many codes
    typedef uint16_t Element;
    typedef __m512i Vector;
    static constexpr int phases = PHASES / 2;
    static constexpr int lanes = 2 * W;
    static constexpr int scales_from = 1 << 20;  // never
    __m512i table;
    Values values;
    explicit Pairs(const Form& form) : table(_mm512_loadu_si512(form.narrow)), values(form) {}
    static float factor(const Form& form) { return BITS == 8 ? 1 : 1 / form.factor; }
    LB_METHOD __m512i multiply(const Codes& codes, int p) const {
#if BITS == 8
        return (__m512i)_mm512_cvtne2ps_pbh(values.of(codes, 2 * p + 1), values.of(codes, 2 * p));
#elif BITS == 3
        const __m512i low = _mm512_srli_epi16((__m512i)codes.low, shift_of(p));
        const int by = high_shift_of(p) - 2;
        const __m512i bytes = _mm512_cvtepu8_epi16((__m256i)codes.high);
        const __m512i high = by < 0 ? _mm512_slli_epi16(bytes, -by) : _mm512_srli_epi16(bytes, by);
        const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), high, low, 0xca);
        return _mm512_permutexvar_epi16(index, table);
#else
        return _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes.low, shift_of(p)), table);
#endif
    }
    static LB_METHOD __m512i scaled(__m512i weights, V) { return weights; }
    static LB_METHOD V add(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#else
#define LB_PAIRS 0
#endif

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
    struct Slot { V vector; };
    std::vector<Slot> x;      // [row][chunk][phase]; zeros after the end, and in rows that were added
    std::vector<float> sums;  // [row][block], of affine formats
    Prepared(const Form& form, int64_t rows) : rows(rows), chunks(ceil_div(form.length, CHUNK)) {
        x.resize(rows * chunks * E::phases);
        if (form.affine) sums.resize(rows * (form.blocks + PADDING));
    }
    const Vector* of(int64_t m, int64_t c) const { return (const Vector*)&x[(m * chunks + c) * E::phases]; }

    template <class T> void fill(const Form& form, const T* from, int64_t m) {
        typename E::Element* to = (typename E::Element*)&x[m * chunks * E::phases];
        for (int64_t c = 0; c < chunks; ++c) {
            alignas(64) typename E::Element part[CHUNK] = {};
            const int64_t left = least(CHUNK, form.length - c * CHUNK);
            copy(from + c * CHUNK, left, part);
            in_order<E::phases, E::lanes>(part, to + c * CHUNK);
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
static void product(const Form& form, const E& engine, const Spread& spread, const uint8_t* packed, const float* scales,
                    const float* offsets, int64_t stride, const Prepared<E>& x, float* out) {
    constexpr bool SCALED = BITS < 8 && M >= E::scales_from;  // weights are, rather than sums
    V total[R][M] = {};
    const auto step = [&](int64_t c, const Codes(&codes)[R]) __attribute__((always_inline)) {
        V block[R][M] = {}, scale[R];
        V(&sums)[R][M] = BITS == 8 || SCALED ? total : block;  // of 8 bits the row is a block
        if (SCALED)
            for (int r = 0; r < R; ++r) scale[r] = spread.of(scales + r * stride, c);
        const typename E::Vector* from = x.of(0, c);
#pragma GCC unroll 16
        for (int p = 0; p < E::phases; ++p)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                typename E::Vector weights = engine.multiply(codes[r], p);
                if (SCALED) weights = E::scaled(weights, scale[r]);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    sums[r][m] = E::add(sums[r][m], weights, from[m * x.chunks * E::phases + p]);
            }
        if (BITS == 8 || SCALED) return;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const V scale = spread.of(scales + r * stride, c);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) total[r][m] = multiply_add(block[r][m], scale, total[r][m]);
        }
    };
    const int64_t whole = form.length / CHUNK, ahead = R == 1 ? AHEAD : R * form.packed_stride;
    Codes codes[R];
    for (int64_t c = 0; c < whole; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* row = packed + r * form.packed_stride;
            codes[r] = load_codes(form, row, c);
            fetch(row + ahead + c * CHUNK_BYTES);
            if (BITS == 3) fetch(row + ahead + ceil_div(form.length, 4) + c * 2 * W);
        }
        step(c, codes);
    }
    if (whole < x.chunks) {
        for (int r = 0; r < R; ++r) codes[r] = load_last_codes(form, packed + r * form.packed_stride, whole);
        step(whole, codes);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            float y = sum_of(total[r][m]) * E::factor(form);
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
    const Spread spread(form);
    const int64_t stride = form.blocks + PADDING;
    std::vector<float> decoded(2 * R * stride), y(count * M);
    for (int64_t i = 0; i < count; i += R) {
        float* offsets = decoded.data() + R * stride;
        const auto decode = [&](int r) {
            decode_scales(form, scales + (n + i + r) * form.scales_stride, decoded.data() + r * stride,
                          offsets + r * stride);
        };
        const uint8_t* from = packed + (n + i) * form.packed_stride;
        if (i + R <= count) {
            for (int r = 0; r < R; ++r) decode(r);
            product<R, M>(form, engine, spread, from, decoded.data(), offsets, stride, x, &y[i * M]);
            continue;
        }
        for (int r = 0; i + r < count; ++r) {
            decode(r);
            product<1, M>(form, engine, spread, from + r * form.packed_stride, decoded.data() + r * stride,
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

template <class T> struct EngineFor { typedef Plain type; };
#if LB_PAIRS
template <> struct EngineFor<BFloat16> { typedef Pairs type; };
#endif

template <class T>
static void few_rows(const Form& form, const uint8_t* packed, const uint8_t* scales, int64_t N, const T* x,
                     int64_t rows, const float* bias, T* out, int threads) {
    typedef typename EngineFor<T>::type E;
    const auto run = rows == 1   ? few_rows_of<1, 1, E, T>
                     : rows == 2 ? few_rows_of<2, 2, E, T>
                     : rows <= 4 ? few_rows_of<2, 4, E, T>
                                 : few_rows_of<2, 8, E, T>;
    run(form, packed, scales, N, x, rows, bias, out, threads);
}
