// Row-wise and column-wise int8 quantisation and the scaled int8 product: what the ops mean is said in reference.py.
#include "int8_gemm.h"

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
LB_FN I rounded(V x, V inverse) { return to_bits(x * inverse + ROUND); }

template <class T> static void quantize_row(const T* x, int64_t n, int8_t* q, float* scale) {
    I top{}, top2{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        top = maximum(top, to_bits(absolute(load(x + i, W))));
        top2 = maximum(top2, to_bits(absolute(load(x + i + W, W))));
    }
    for (; i < n; i += W) top = maximum(top, to_bits(absolute(load(x + i, (int)least(W, n - i)))));
    const Scale s = scale_of(highest(maximum(top, top2)));
    *scale = s.scale;
    if (s.inverse == 0.0f) {
        memset(q, 0, n);
        return;
    }
    const V inverse = splat<V>(s.inverse);
    uint8_t* out = (uint8_t*)q;
    for (i = 0; i + W <= n; i += W) store_codes(out + i, rounded(load(x + i, W), inverse), W);
    if (i < n) store_codes(out + i, rounded(load(x + i, (int)(n - i)), inverse), (int)(n - i));
}

template <class T>
static void quantize_rows(const T* x, int64_t rows, int64_t columns, int8_t* q, float* scales, int threads) {
    const int64_t step = 1 + (1 << 14) / (columns + 1);
    parallel_for((rows + step - 1) / step, threads, [&](int64_t task) {
        for (int64_t r = task * step; r < least(rows, (task + 1) * step); ++r)
            quantize_row(x + r * columns, columns, q + r * columns, scales + r);
    });
}

constexpr int STRIP = 64 / W * W, DEPTH = 64;  // columns of a strip; rows turned at a time: a cache line of the result

// DEPTH rows (fewer: `rows`) of W columns (fewer: `width`) of x, scaled, rounded and turned: q[column * stride + row]
template <class T>
LB_FN void turn(const T* x, int64_t pitch, int rows, int width, V inverse, I keep, int8_t* q, int64_t stride) {
    uint32_t words[DEPTH / 4][W], columns[W][DEPTH / 4];
    for (int r = 0; r < DEPTH; r += 4) {
        I word{};
        for (int i = 0; i < 4 && r + i < rows; ++i)
            word |= (rounded(load(x + (r + i) * pitch, width), inverse) & keep) << (8 * i);
        memcpy(words[r / 4], &word, sizeof word);
    }
    for (int c = 0; c < W; ++c)
        for (int r = 0; r < DEPTH / 4; ++r) columns[c][r] = words[r][c];
    for (int c = 0; c < width; ++c) memcpy(q + c * stride, columns[c], rows);
}

// One strip of `width` columns: the second reading of x comes from the cache
template <class T>
static void quantize_strip(const T* x, int64_t rows, int64_t pitch, int width, int8_t* q, float* scales) {
    I top[STRIP / W]{};
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < width; c += W)
            top[c / W] = maximum(top[c / W], to_bits(absolute(load(x + r * pitch + c, (int)least(W, width - c)))));
    V inverse[STRIP / W];
    I keep[STRIP / W];  // no byte of a NaN's payload gets through
    for (int c = 0; c < width; ++c) {
        const Scale s = scale_of(top[c / W][c % W]);
        scales[c] = s.scale;
        inverse[c / W][c % W] = s.inverse;
        keep[c / W][c % W] = s.inverse == 0.0f ? 0 : 255;
    }
    for (int64_t r = 0; r < rows; r += DEPTH)
        for (int c = 0; c < width; c += W) {
            const int depth = (int)least(DEPTH, rows - r), wide = (int)least(W, width - c);
            turn(x + r * pitch + c, pitch, depth, wide, inverse[c / W], keep[c / W], q + c * rows + r, rows);
        }
}

template <class T>
static void quantize_columns(const T* x, int64_t rows, int64_t columns, int8_t* q, float* scales, int threads) {
    parallel_for((columns + STRIP - 1) / STRIP, threads, [&](int64_t strip) {
        const int64_t c = strip * STRIP;
        quantize_strip(x + c, rows, columns, (int)least(STRIP, columns - c), q + c * rows, scales + c);
    });
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

void lb_quantize_rowwise(const void* x, int dtype, int64_t rows, int64_t columns, int8_t* q, float* scales, int threads) {
    LB_BY_DTYPE(dtype, quantize_rows((const T*)x, rows, columns, q, scales, threads))
}
void lb_quantize_colwise(const void* x, int dtype, int64_t rows, int64_t columns, int8_t* q, float* scales, int threads) {
    LB_BY_DTYPE(dtype, quantize_columns((const T*)x, rows, columns, q, scales, threads))
}
int64_t lb_int8_matmul_workspace(int64_t M, int64_t N, int64_t K) { return Workspace::bytes(M, N, K); }
void lb_int8_matmul(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales,
                    const float* b_scales, const float* bias, void* out, int dtype, void* workspace, int threads) {
    LB_BY_DTYPE(dtype, product(a, b, M, N, K, (Epilogue<T>{a_scales, b_scales, bias, (T*)out, N}), workspace, threads))
}
}
