// Row-wise and column-wise int8 quantisation and the scaled int8 product: what the ops mean is said in reference.py.
#include "int8_gemm.h"
#include "philox.h"
#include <vector>

// ---- quantisation

constexpr float TINY_ROW = 0x1p-120f, ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr int32_t INFINITY_BITS = 0x7f800000;

struct Scale { float inverse, scale; };

// from the bits of the largest magnitude, which order like the magnitudes themselves, with infinity and NaN on top
static Scale scale_of(int32_t bits) {
    float absmax;
    memcpy(&absmax, &bits, 4);
    if (bits >= INFINITY_BITS) return {0.0f, __builtin_nanf("")};
    if (absmax < TINY_ROW) return {0.0f, 0.0f};
    return {127.0f / absmax, absmax / 127.0f};
}

// The int8 is the low byte. |x * inverse| is below 127.5 by the choice of inverse, so there is nothing to clamp.
LB_FN I rounded(V x, V inverse) { return to_bits(x * inverse + ROUND) & 255; }

// The same at random: `index` is the element's in the matrix, of the first one in x.
LB_FN I rounded_at_random(V x, V inverse, uint64_t seed, uint64_t index, int count) {
    V y = x * inverse;
    I result;
    for (int j = 0; j < count; ++j, ++index) {
        const float u = ((float)random_word(philox(seed, 0, 0, index >> 3), index) + 0.5f) * 0x1p-16f;
        const int32_t magnitude = (int32_t)least((int64_t)(__builtin_fabsf(y[j]) + u), 127);
        result[j] = (y[j] < 0 ? -magnitude : magnitude) & 255;
    }
    for (int j = count; j < W; ++j) result[j] = 0;
    return result;
}

template <class T> static void quantize_row(const T* x, int64_t n, const uint64_t* seed, uint64_t index, int8_t* q,
                                            float* scale) {
    I top{}, top2{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        top = maximum(top, to_bits(absolute(load(x + i, W))));
        top2 = maximum(top2, to_bits(absolute(load(x + i + W, W))));
    }
    for (; i < n; i += W) top = maximum(top, to_bits(absolute(load(x + i, (int)least(W, n - i)))));
    const Scale s = scale_of((int32_t)highest_unsigned(maximum(top, top2)));
    *scale = s.scale;
    if (s.inverse == 0.0f) {
        memset(q, 0, n);
        return;
    }
    const V inverse = splat<V>(s.inverse);
    uint8_t* out = (uint8_t*)q;
    if (seed) {
        for (i = 0; i < n; i += W) {
            const int count = (int)least(W, n - i);
            store_codes(out + i, rounded_at_random(load(x + i, count), inverse, *seed, index + i, count), count);
        }
        return;
    }
    for (i = 0; i + W <= n; i += W) store_codes(out + i, rounded(load(x + i, W), inverse), W);
    if (i < n) store_codes(out + i, rounded(load(x + i, (int)(n - i)), inverse), (int)(n - i));
}

template <class T> static void quantize_rows(const T* x, int64_t rows, int64_t columns, const uint64_t* seed, int8_t* q,
                                             float* scales, int threads) {
    const int64_t step = 1 + (1 << 14) / (columns + 1);
    parallel_for((rows + step - 1) / step, threads, [&](int64_t task) {
        for (int64_t r = task * step; r < least(rows, (task + 1) * step); ++r)
            quantize_row(x + r * columns, columns, seed, r * columns, q + r * columns, scales + r);
    });
}

// Columns: one reading for the largest magnitudes, one that scales, rounds and turns. Both take memory in the order in
// which it lies: a strip of columns that would stay in a cache between the readings lies in pieces a page apart, which
// fall into a few of its sets.
constexpr int64_t TILE = 64;         // rows and columns turned at a time: 64 rows are a cache line of the result
constexpr int64_t STRIP = 2048;      // columns whose largest magnitudes so far stay in the L1 cache
constexpr int64_t STREAM = 4 << 20;  // a result larger than this does not pass through the caches

// tops[c] = largest magnitude in column c of x, as bits
template <class T> static void column_tops(const T* x, int64_t rows, int64_t columns, int32_t* tops) {
    memset(tops, 0, 4 * columns);
    for (int64_t first = 0; first < columns; first += STRIP)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t last = least(columns, first + STRIP);
            for (int64_t c = first; c < last; c += W) {
                const int count = (int)least(W, last - c);
                const I seen = to_bits(absolute(load(x + r * columns + c, count)));
                store_raw(tops + c, maximum(load_raw<I>(tops + c, count), seen), count);
            }
        }
}

// 64 bytes, past the caches where the instruction set and the address allow it
LB_FN void store_line(int8_t* to, const uint32_t* line, bool stream) {
#if defined(__AVX512F__)
    if (stream) return _mm512_stream_si512((__m512i*)to, _mm512_load_si512(line));
#elif defined(__AVX2__)
    if (stream) {
        _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)line));
        return _mm256_stream_si256((__m256i*)to + 1, _mm256_load_si256((const __m256i*)line + 1));
    }
#endif
    memcpy(to, line, 64);
}
LB_FN void finish_stream() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

template <class T> struct Columns {
    const T* x;
    int64_t rows, columns;
    const float* inverses;
    const uint64_t* seed;
    int8_t* q;
    bool stream;

    // The tile at row r, column c: q[column][row] from x[row][column]. WHOLE: all TILE rows and columns exist.
    template <bool WHOLE> void turn(int64_t r, int64_t c) const {
        const int64_t depth = WHOLE ? TILE : least(TILE, rows - r), width = WHOLE ? TILE : least(TILE, columns - c);
        alignas(64) uint32_t words[TILE / 4][TILE], line[TILE / 4];
        for (int64_t j = 0; j < width; j += W) {
            const int count = WHOLE ? W : (int)least(W, width - j);
            const V inverse = load(inverses + c + j, count);
            const I keep = (I)(inverse != 0.0f);  // no byte of a NaN's payload gets through
            for (int64_t i = 0; i < depth; i += 4) {
                I word{};
                for (int64_t k = 0; k < 4; ++k)
                    if (WHOLE || i + k < depth) {
                        const int64_t index = (r + i + k) * columns + c + j;
                        const V values = load(x + index, count);
                        word |= (seed ? rounded_at_random(values, inverse, *seed, index, count)
                                      : rounded(values, inverse)) << (8 * k);
                    }
                word &= keep;
                memcpy(&words[i / 4][j], &word, sizeof word);
            }
        }
        for (int64_t j = 0; j < width; ++j) {
            for (int64_t i = 0; i < TILE / 4; ++i) line[i] = words[i][j];
            int8_t* to = q + (c + j) * rows + r;
            if (WHOLE) store_line(to, line, stream);
            else memcpy(to, line, depth);
        }
    }
    void turn_rows(int64_t r) const {
        for (int64_t c = 0; c < columns; c += TILE) {
            if (r + TILE <= rows && c + TILE <= columns) turn<true>(r, c);
            else turn<false>(r, c);
        }
        finish_stream();
    }
};

template <class T> static void quantize_columns(const T* x, int64_t rows, int64_t columns, const uint64_t* seed,
                                                int8_t* q, float* scales, int threads) {
    const int64_t parts = least(threads, (rows + TILE - 1) / TILE) + (rows == 0), share = (rows + parts - 1) / parts;
    std::vector<int32_t> tops(parts * columns);
    std::vector<float> inverses(columns);
    parallel_for(parts, threads, [&](int64_t p) {
        const int64_t first = least(rows, p * share);
        column_tops(x + first * columns, least(rows, first + share) - first, columns, &tops[p * columns]);
    });
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t p = 1; p < parts; ++p) tops[c] = tops[c] < tops[p * columns + c] ? tops[p * columns + c] : tops[c];
        const Scale s = scale_of(tops[c]);
        scales[c] = s.scale;
        inverses[c] = s.inverse;
    }
    const bool stream = rows * columns > STREAM && rows % 64 == 0 && (uintptr_t)q % 64 == 0;
    const Columns<T> all{x, rows, columns, inverses.data(), seed, q, stream};
    parallel_for((rows + TILE - 1) / TILE, threads, [&](int64_t block) { all.turn_rows(block * TILE); });
}

// ---- the product

template <class T> struct Epilogue {
    const float *a_scales, *b_scales, *bias;  // bias may be null
    T* out;
    int64_t N;
    void operator()(int64_t m, int64_t n, int count, const int32_t* sums) const {
        const V a_scale = splat<V>(a_scales[m]);
        for (int j = 0; j < count; j += W) {
            const int width = (int)least(W, count - j);
            V y = to_float(load_raw<I>(sums + j, W)) * a_scale * load(b_scales + n + j, width);
            if (bias) y = y + load(bias + n + j, width);
            store(out + m * N + n + j, y, width);
        }
    }
};

template <class T>
static void product(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const Epilogue<T>& epilogue,
                    void* memory, int threads) {
    const Workspace w(memory, a, M, N, K);
    prepare(w, a, b, M, N, K, threads);
    multiply(w, M, N, K, threads, epilogue);
}

// ---- what Python calls; dtype: 0 float32, 1 float16, 2 bfloat16

#define LB_BY_DTYPE(dtype, call)                     \
    switch (dtype) {                                 \
    case 0: { typedef float T; call; } break;        \
    case 1: { typedef Half T; call; } break;         \
    default: { typedef BFloat16 T; call; } break;    \
    }

extern "C" {
const char* lb_int8_instructions() { return LB_DOT_NAME; }

void lb_quantize_rowwise(const void* x, int dtype, int64_t rows, int64_t columns, const uint64_t* seed, int8_t* q,
                         float* scales, int threads) {
    LB_BY_DTYPE(dtype, quantize_rows((const T*)x, rows, columns, seed, q, scales, threads))
}
void lb_quantize_colwise(const void* x, int dtype, int64_t rows, int64_t columns, const uint64_t* seed, int8_t* q,
                         float* scales, int threads) {
    LB_BY_DTYPE(dtype, quantize_columns((const T*)x, rows, columns, seed, q, scales, threads))
}
int64_t lb_int8_matmul_workspace(int64_t M, int64_t N, int64_t K) { return Workspace::bytes(M, N, K); }
void lb_int8_matmul(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales,
                    const float* b_scales, const float* bias, void* out, int dtype, void* workspace, int threads) {
    LB_BY_DTYPE(dtype, product(a, b, M, N, K, (Epilogue<T>{a_scales, b_scales, bias, (T*)out, N}), workspace, threads))
}
}
