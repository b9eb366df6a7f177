// Block-wise quantisation on the CPU: any float type, the dynamic maps by arithmetic, any other codebook by
// comparison.
#include "vec.h"
#include "parallel.h"
#include "blocks.h"
#include <algorithm>

constexpr int MAX_BLOCK = 4096;
constexpr int64_t CHUNK = 64;  // blocks that a thread takes at a time

struct Grid {
    int64_t rows, row_length, block_size;
    int threads;
    int64_t per_row() const { return (row_length + block_size - 1) / block_size; }
    int64_t start(int64_t block) const { return block / per_row() * row_length + block % per_row() * block_size; }
    int length(int64_t block) const {
        return (int)std::min(block_size, row_length - block % per_row() * block_size);
    }
};

struct Codebook {
    float values[256], middles[255];
    int count;
    bool has_negative, carries_sign;
};

template <class F> static void for_blocks(const Grid& grid, const F& body) {
    const int64_t blocks = grid.rows * grid.per_row();
    parallel_for((blocks + CHUNK - 1) / CHUNK, grid.threads, [&](int64_t chunk) {
        for (int64_t b = chunk * CHUNK; b < std::min(blocks, (chunk + 1) * CHUNK); ++b) body(b);
    });
}

// The block's scale; its values as floats in `buffer`, padded with zeros to a multiple of W, non-finite ones replaced
// by zero, and, for a map without negative values, negative ones too.
template <bool NON_NEGATIVE, class T> static float gather(const T* x, int n, float* buffer) {
    Extremes seen;
    for (int i = 0; i < n; i += W) {
        V v = load(x + i, std::min(W, n - i));
        if (NON_NEGATIVE) v = maximum(v, V{});
        store(buffer + i, v, W);
        seen.see<NON_NEGATIVE>(v);
    }
    if (seen.finite<NON_NEGATIVE>()) return seen.scale<NON_NEGATIVE>();
    seen = Extremes();
    for (int i = 0; i < n; i += W) {
        V v = load(buffer + i, W);
        v = where(to_bits(absolute(v)) < (int32_t)INFINITE, v, V{});
        store(buffer + i, v, W);
        seen.see<NON_NEGATIVE>(v);
    }
    return seen.scale<NON_NEGATIVE>();
}

template <class T, class C>
static void quantize_dynamic(const T* x, const Grid& grid, uint8_t* codes, float* scales) {
    for_blocks(grid, [&](int64_t b) {
        alignas(64) float buffer[MAX_BLOCK];
        const int64_t start = grid.start(b);
        const int n = grid.length(b);
        scales[b] = gather<!C::is_signed>(x + start, n, buffer);
        encode_block<C>(buffer, n, scales[b], codes + start);
    });
}

static int nearest(const Codebook& book, float y) {
    return (int)(std::lower_bound(book.middles, book.middles + book.count - 1, y) - book.middles);
}

template <class T>
static void quantize_custom(const T* x, const Grid& grid, const Codebook& book, uint8_t* codes, float* scales) {
    const bool positive_stays = book.values[0] == 0.0f;
    for_blocks(grid, [&](int64_t b) {
        alignas(64) float buffer[MAX_BLOCK];
        const int64_t start = grid.start(b);
        const int n = grid.length(b);
        const auto scale_of = book.has_negative ? gather<false, T> : gather<true, T>;
        const float scale = scale_of(x + start, n, buffer);
        scales[b] = book.carries_sign ? scale : fabsf(scale);
        const float inverse = reciprocal(scales[b]);
        for (int i = 0; i < n; ++i) {
            const int code = nearest(book, buffer[i] * inverse);
            codes[start + i] = (uint8_t)(positive_stays && buffer[i] > 0.0f && code == 0 ? 1 : code);
        }
    });
}

template <class T, class C>
static void dequantize_dynamic(const uint8_t* codes, const float* scales, const Grid& grid, T* out) {
    for_blocks(grid, [&](int64_t b) {
        const int64_t start = grid.start(b);
        const int n = grid.length(b);
        for (int i = 0; i < n; i += W) {
            const int count = std::min(W, n - i);
            store(out + start + i, decode<C, V, I>(load_counted(codes + start + i, count)) * scales[b], count);
        }
    });
}

template <class T>
static void dequantize_custom(
    const uint8_t* codes, const float* scales, const Grid& grid, const Codebook& book, T* out) {
    for_blocks(grid, [&](int64_t b) {
        const int64_t start = grid.start(b);
        const int n = grid.length(b);
        for (int i = 0; i < n; i += W) {
            const int count = std::min(W, n - i);
            V v{};
            for (int j = 0; j < count; ++j) v[j] = book.values[codes[start + i + j]];
            store(out + start + i, v * scales[b], count);
        }
    });
}

static Codebook codebook(const float* values, int count) {
    Codebook book{};
    book.count = count;
    std::copy(values, values + count, book.values);
    for (int i = 0; i + 1 < count; ++i) book.middles[i] = (values[i + 1] + values[i]) * 0.5f;
    book.has_negative = values[0] < 0.0f;
    book.carries_sign = book.has_negative && values[0] > -1.0f;
    return book;
}

// How a call of the library names a codebook. map: 0 dynamic signed, 1 dynamic unsigned, 2 custom, of `count` values.
struct Map {
    int map;
    const float* values;
    int count;
};

template <class T>
static void quantize(const T* x, const Grid& grid, const Map& map, uint8_t* codes, float* scales) {
    if (map.map == 0) quantize_dynamic<T, DynamicSignedConstants>(x, grid, codes, scales);
    else if (map.map == 1) quantize_dynamic<T, DynamicUnsignedConstants>(x, grid, codes, scales);
    else quantize_custom(x, grid, codebook(map.values, map.count), codes, scales);
}
template <class T>
static void dequantize(const uint8_t* codes, const float* scales, const Grid& grid, const Map& map, T* out) {
    if (map.map == 0) dequantize_dynamic<T, DynamicSignedConstants>(codes, scales, grid, out);
    else if (map.map == 1) dequantize_dynamic<T, DynamicUnsignedConstants>(codes, scales, grid, out);
    else dequantize_custom(codes, scales, grid, codebook(map.values, map.count), out);
}

// dtype: of x or out: 0 float32, 1 float16, 2 bfloat16.
extern "C" void quantize_blockwise(
    const void* x, int dtype, uint8_t* codes, float* scales, int64_t rows, int64_t row_length, int64_t block_size,
    int map, const float* values, int count, int threads) {
    const Grid grid{rows, row_length, block_size, threads};
    const Map book{map, values, count};
    if (dtype == 0) quantize((const float*)x, grid, book, codes, scales);
    else if (dtype == 1) quantize((const Half*)x, grid, book, codes, scales);
    else quantize((const BFloat16*)x, grid, book, codes, scales);
}

extern "C" void dequantize_blockwise(
    void* out, int dtype, const uint8_t* codes, const float* scales, int64_t rows, int64_t row_length,
    int64_t block_size, int map, const float* values, int count, int threads) {
    const Grid grid{rows, row_length, block_size, threads};
    const Map book{map, values, count};
    if (dtype == 0) dequantize(codes, scales, grid, book, (float*)out);
    else if (dtype == 1) dequantize(codes, scales, grid, book, (Half*)out);
    else dequantize(codes, scales, grid, book, (BFloat16*)out);
}
