// The CPU backend's vector shim: one float vector V as wide as the processor, its int32 twin I, and what
// dynamic_map.h and the rules need of them. GCC's and Clang's vector types give + - * / and comparisons; the rest
// differs by instruction set and stands here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LB_FN static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

template <class M, class T> LB_FN T where(M mask, T a, T b) { return mask ? a : b; }
LB_FN V to_float(I x) { return __builtin_convertvector(x, V); }
LB_FN I to_int(V x) { return __builtin_convertvector(x, I); }
LB_FN I to_bits(V x) { return (I)x; }
LB_FN V from_bits(I x) { return (V)x; }
LB_FN V absolute(V x) { return from_bits(to_bits(x) & 0x7fffffff); }
template <class T, class S> LB_FN T splat(S x) { return x - T{}; }
// -1, 0, 1; NaN stays NaN, as in torch.sign
LB_FN V sign(V x) {
    const V one = from_bits((to_bits(x) & (int32_t)0x80000000) | 0x3f800000);
    return where(x != 0.0f, where(x == x, one, x), V{});
}

LB_FN V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
LB_FN V as_vector(V x) { return x; }
LB_FN V as_vector(float x) { return splat<V>(x); }
// a * b + c with one rounding, of vectors and floats
template <class A, class B, class C> LB_FN V fused(A a, B b, C c) {
    return multiply_add(as_vector(a), as_vector(b), as_vector(c));
}

// maximum(a, b) is a > b ? a : b
#if defined(__AVX512F__)
LB_FN V maximum(V a, V b) { return _mm512_max_ps(a, b); }
LB_FN V minimum(V a, V b) { return _mm512_min_ps(a, b); }
LB_FN V sqrt(V x) { return _mm512_sqrt_ps(x); }
LB_FN I maximum(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#if defined(__AVX512DQ__)
LB_FN V magnitude_from(V x, float low) { return _mm512_range_ps(x, _mm512_set1_ps(low), 0xb); }
#else
LB_FN V magnitude_from(V x, float low) { return maximum(absolute(x), splat<V>(low)); }
#endif
#else
LB_FN V maximum(V a, V b) { return where(a > b, a, b); }
LB_FN V minimum(V a, V b) { return where(a < b, a, b); }
LB_FN I maximum(I a, I b) { return where(a > b, a, b); }
LB_FN V magnitude_from(V x, float low) { return maximum(absolute(x), splat<V>(low)); }
#if defined(__AVX2__)
LB_FN V sqrt(V x) { return _mm256_sqrt_ps(x); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
LB_FN V sqrt(V x) { return (V)vsqrtq_f32((float32x4_t)x); }
#else
LB_FN V sqrt(V x) {
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
#endif
#endif

// x in the first `count` lanes, zero behind
LB_FN V first_lanes(V x, int count) {
    if (count == W) return x;
    for (int i = count; i < W; ++i) x[i] = 0.0f;
    return x;
}

#if defined(__AVX512F__)
LB_FN I unsigned_maximum(I a, I b) { return (I)_mm512_max_epu32((__m512i)a, (__m512i)b); }
LB_FN float highest(V x) { return _mm512_reduce_max_ps(x); }
LB_FN uint32_t highest_unsigned(I x) { return _mm512_reduce_max_epu32((__m512i)x); }
#else
typedef uint32_t U __attribute__((vector_size(4 * W)));
LB_FN I unsigned_maximum(I a, I b) { return where((U)a > (U)b, a, b); }
LB_FN float highest(V x) {
    float top = x[0];
    for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
    return top;
}
LB_FN uint32_t highest_unsigned(I x) {
    uint32_t top = (uint32_t)x[0];
    for (int i = 1; i < W; ++i) top = (uint32_t)x[i] > top ? (uint32_t)x[i] : top;
    return top;
}
#endif

// ---- look-ups in small tables, and the lines of the dynamic maps

struct alignas(64) Table { float at[16]; };

// table.at[index & 15]
LB_FN V lookup(const Table& table, I index) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table.at));
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.at), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.at + 8), (__m256i)index);
    return _mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    V result;
    for (int i = 0; i < W; ++i) result[i] = table.at[index[i] & 15];
    return result;
#endif
}

template <int N> constexpr Table table_of(const float (&line)[N], float factor = 1.0f) {
    Table table{};
    for (int k = 0; k < N; ++k) table.at[k] = line[k] * factor;
    return table;
}

template <class C> LB_FN void decode_line(V n, V& slope, V& offset) {
    static constexpr Table slopes = table_of(C::decode_slope, 0.25f), offsets = table_of(C::decode_offset);
    const I field = to_bits(n) >> 23;
    slope = lookup(slopes, field);
    offset = lookup(offsets, field);
}

#if defined(__AVX512F__)
// The lines by binade, for the exponent fields from 96 to 127, by their low five bits. A binade holds one threshold at
// most: `shift` moves what is not above it into the binade below.
struct alignas(64) Binades { int32_t shift[32]; float slope[32], offset[32], limit[32]; };

template <class C> constexpr Binades binades() {
    Binades result{};
    float low = 1.0f;
    for (int field = 127; field >= 96; --field, low /= 2) {
        const int k = field & 31;
        int line = 0;
        for (; line < C::lines - 1 && C::thresholds[line] < 2 * low; ++line)
            if (C::thresholds[line] >= low) result.shift[k] = (int32_t)((C::thresholds[line] / low - 1) * 0x1p23f) + 1;
        result.slope[k] = C::encode_slope[line];
        result.offset[k] = C::encode_offset[line];
        result.limit[k] = C::encode_limit[line];
    }
    return result;
}

LB_FN V lookup(const float (&table)[32], I index) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
}
LB_FN I lookup(const int32_t (&table)[32], I index) {
    return (I)_mm512_permutex2var_epi32(_mm512_load_si512(table), (__m512i)index, _mm512_load_si512(table + 16));
}

template <class C> LB_FN void encode_line(V magnitude, V& slope, V& offset, V& limit) {
    static constexpr Binades lines = binades<C>();
    const I bits = to_bits(magnitude), binade = (bits - lookup(lines.shift, bits >> 23)) >> 23;
    slope = lookup(lines.slope, binade);
    offset = lookup(lines.offset, binade);
    limit = lookup(lines.limit, binade);
}
#else
template <class C> LB_FN void encode_line(V magnitude, V& slope, V& offset, V& limit) {
    static constexpr Table slopes = table_of(C::encode_slope), offsets = table_of(C::encode_offset);
    static constexpr Table limits = table_of(C::encode_limit);
    I line{};
    for (int k = 0; k < C::lines - 1; ++k) line -= (I)(magnitude > C::thresholds[k]);
    slope = lookup(slopes, line);
    offset = lookup(offsets, line);
    limit = lookup(limits, line);
}
#endif

// ---- loads and stores of W elements, or of the first `count`

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class T> LB_FN T load_raw(const void* from, int count) {
    T x{};
    if (count == W) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, sizeof x / W * count);
    return x;
}
template <class T> LB_FN void store_raw(void* to, const T& x, int count) {
    if (count == W) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, sizeof x / W * count);
}

// Widening and narrowing by one instruction each: GCC before 13 takes __builtin_convertvector apart, lane by lane.
LB_FN I widen(Bytes x) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)x));
#else
    return __builtin_convertvector(x, I);
#endif
}
LB_FN I widen_signed(Bytes x) { return (widen(x) ^ 0x80) - 0x80; }
LB_FN I logical_shift(I x, int by) { return (x >> by) & (int32_t)(0xffffffffu >> by); }
LB_FN I widen(Halves x) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, I);
#endif
}
LB_FN Halves narrow_to_halves(I x) {  // of values from 0 to 65535
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
    return __builtin_convertvector(x, Halves);
#endif
}
LB_FN Bytes narrow_to_bytes(I x) {  // of values from 0 to 255
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
    const __m128i halves = (__m128i)narrow_to_halves(x);
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

// The bytes of four vectors of numbers of 16 bits, each plus `bias`, saturated: below 0 is 0, above 255 is 255.
typedef uint8_t ManyBytes __attribute__((vector_size(4 * W)));
LB_FN ManyBytes pack(const I* x, int bias) {
#if defined(__AVX512BW__)
    const __m512i by = _mm512_set1_epi16((short)bias);
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]), by);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]), by);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (ManyBytes)_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i by = _mm256_set1_epi16((short)bias);
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]), by);
    const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]), by);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (ManyBytes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#else
    Bytes parts[4];
    for (int j = 0; j < 4; ++j) {
        const I high = maximum(x[j] + bias, I{});
        parts[j] = narrow_to_bytes(where(high < 255, high, splat<I>(255)));
    }
    ManyBytes all;
    memcpy(&all, parts, sizeof all);
    return all;
#endif
}

LB_FN V widen_half_by_bits(Halves x) {
    const I bits = widen(x), magnitude = bits & 0x7fff, quiet = where(magnitude > 0x7c00, splat<I>(0x400000), I{});
    const V finite = from_bits(magnitude << 13) * 0x1p112f;  // subnormals too
    const I special = (magnitude << 13) | 0x7f800000 | quiet;
    return from_bits(where(magnitude < 0x7c00, to_bits(finite), special) | (bits & 0x8000) << 16);
}
// to nearest, ties to even; above the range infinity
LB_FN Halves narrow_half_by_bits(V x) {
    const I sign = logical_shift(to_bits(x), 16) & 0x8000, bits = to_bits(absolute(x));
    const I normal = (bits + 0xfff + ((bits >> 13) & 1) - (112 << 23)) >> 13;
    const I subnormal = to_bits(from_bits(bits) + 0.5f) - 0x3f000000;  // the sum rounds to multiples of 2^-24
    const I nan = 0x7e00 | ((bits >> 13) & 0x3ff);
    I half = where(bits < 0x38800000, subnormal, normal);
    half = where(bits < 0x477ff000, half, where(bits > 0x7f800000, nan, splat<I>(0x7c00)));
    return narrow_to_halves(half | sign);
}
LB_FN V widen_half(Halves x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)x);
#else
    return widen_half_by_bits(x);
#endif
}
LB_FN Halves narrow_half(V x) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
    return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return narrow_half_by_bits(x);
#endif
}
LB_FN Halves upper_halves(I bits) { return narrow_to_halves((bits >> 16) & 0xffff); }
// to nearest, ties to even; a NaN keeps its upper bits and stays one
LB_FN Halves narrow_bfloat16_by_bits(V x) {
    const I bits = to_bits(x);
    const I rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return upper_halves(where(x == x, rounded, bits | 0x400000));
}
LB_FN Halves narrow_bfloat16(V x) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    constexpr int SUBNORMAL = 0x20;  // the instruction takes them for zeros
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, SUBNORMAL) == 0, 1)) {
        const auto narrow = _mm512_cvtneps_pbh(x);
        Halves result;
        memcpy(&result, &narrow, sizeof result);
        return result;
    }
#endif
    return narrow_bfloat16_by_bits(x);
}

LB_FN V load(const float* p, int count) { return load_raw<V>(p, count); }
LB_FN V load(const Half* p, int count) { return widen_half(load_raw<Halves>(p, count)); }
LB_FN V load(const BFloat16* p, int count) {
    return from_bits(widen(load_raw<Halves>(p, count)) << 16);
}
LB_FN void store(float* p, V x, int count) { store_raw(p, x, count); }
LB_FN void store(Half* p, V x, int count) { store_raw(p, narrow_half(x), count); }
LB_FN void store(BFloat16* p, V x, int count) { store_raw(p, narrow_bfloat16(x), count); }
// Codes as dynamic_map.h decodes them.
LB_FN I load_counted(const uint8_t* p, int count) { return widen(load_raw<Bytes>(p, count)) | 0x4c000000; }
LB_FN void store_codes(uint8_t* p, I x, int count) { store_raw(p, narrow_to_bytes(x), count); }
