// The CPU backend's vector shim: one float vector V as wide as the processor, its int32 twin I, and what
// dynamic_map.h and the rules need of them. GCC's and Clang's vector types give + - * / and comparisons; the rest
// differs by instruction set and stands here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include "instruction_sets.h"

#define LB_FN static inline __attribute__((always_inline))
#define LB_METHOD inline __attribute__((always_inline))
#define LB_LAMBDA __attribute__((always_inline))

constexpr int W = LB_VECTOR_BITS / 32;

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

template <class M, class T> LB_FN T where(M mask, T a, T b) { return mask ? a : b; }
LB_FN V to_float(I x) { return __builtin_convertvector(x, V); }
LB_FN I to_int(V x) { return __builtin_convertvector(x, I); }
LB_FN I to_bits(V x) { return (I)x; }
LB_FN V from_bits(I x) { return (V)x; }
LB_FN V absolute(V x) { return from_bits(to_bits(x) & 0x7fffffff); }
template <class T, class S> LB_FN T splat(S x) { return x - T{}; }
// -1, 0, 1; 0 of a NaN, as torch.sign
LB_FN V sign(V x) {
    const V one = from_bits((to_bits(x) & (int32_t)0x80000000) | 0x3f800000);
    return where(absolute(x) > 0.0f, one, V{});
}

LB_FN V multiply_add(V a, V b, V c) {
#if LB_AVX512
    return _mm512_fmadd_ps(a, b, c);
#elif LB_AVX2_FMA
    return _mm256_fmadd_ps(a, b, c);
#elif LB_NEON
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

// maximum(a, b) is a > b ? a : b: of a NaN and a number b
#if LB_AVX512
LB_FN V maximum(V a, V b) { return _mm512_max_ps(a, b); }
LB_FN V minimum(V a, V b) { return _mm512_min_ps(a, b); }
LB_FN V sqrt(V x) { return _mm512_sqrt_ps(x); }
LB_FN I maximum(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#if LB_AVX512_DQ
LB_FN V magnitude_from(V x, float low) { return _mm512_range_ps(x, _mm512_set1_ps(low), 0xb); }
#else
LB_FN V magnitude_from(V x, float low) { return maximum(absolute(x), splat<V>(low)); }
#endif
#else
LB_FN V maximum(V a, V b) { return where(a > b, a, b); }
LB_FN V minimum(V a, V b) { return where(a < b, a, b); }
LB_FN I maximum(I a, I b) { return where(a > b, a, b); }
LB_FN V magnitude_from(V x, float low) { return maximum(absolute(x), splat<V>(low)); }
#if LB_AVX2
LB_FN V sqrt(V x) { return _mm256_sqrt_ps(x); }
#elif LB_NEON
LB_FN V sqrt(V x) { return (V)vsqrtq_f32((float32x4_t)x); }
#else
LB_FN V sqrt(V x) {
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
#endif
#endif

// the rules' maximum: NaN if either is, as torch.maximum
LB_FN V maximum_or_nan(V a, V b) { return where(a == a, maximum(a, b), a); }

// x in the first `count` lanes, zero in the others
LB_FN V first_lanes(V x, int count) {
    if (count == W) return x;
    for (int i = count; i < W; ++i) x[i] = 0.0f;
    return x;
}

LB_FN void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the L2 cache; any address will do
LB_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LB_FN float sum_of(V x) {
#if LB_AVX512
    return _mm512_reduce_add_ps(x);
#else
    for (int half = W / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) x[l] += x[l + half];
    return x[0];
#endif
}

#if LB_AVX512
LB_FN I unsigned_maximum(I a, I b) { return (I)_mm512_max_epu32((__m512i)a, (__m512i)b); }
LB_FN uint32_t highest_unsigned(I x) { return _mm512_reduce_max_epu32((__m512i)x); }
#else
LB_FN I unsigned_maximum(I a, I b) { return where((U)a > (U)b, a, b); }
LB_FN uint32_t highest_unsigned(I x) {
    uint32_t top = (uint32_t)x[0];
    for (int i = 1; i < W; ++i) top = (uint32_t)x[i] > top ? (uint32_t)x[i] : top;
    return top;
}
#endif

// ---- look-ups in small tables, and the lines of the dynamic maps

template <class T, int N> struct alignas(64) Table { T at[N]; };

// table.at[index % 16]
template <class T> LB_FN I look_up_bits(const Table<T, 16>& table, I index) {
#if LB_AVX512
    return (I)_mm512_permutexvar_epi32((__m512i)index, _mm512_load_si512(table.at));
#elif LB_AVX2
    const __m256i low = _mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)table.at), (__m256i)index);
    const __m256i high = _mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)table.at + 1), (__m256i)index);
    return (I)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(index << 28));
#else
    I result;
    for (int i = 0; i < W; ++i) memcpy((int32_t*)&result + i, table.at + (index[i] & 15), 4);
    return result;
#endif
}
#if LB_AVX512
// table.at[index % 32]
template <class T> LB_FN I look_up_bits(const Table<T, 32>& table, I index) {
    const __m512i low = _mm512_load_si512(table.at), high = _mm512_load_si512(table.at + 16);
    return (I)_mm512_permutex2var_epi32(low, (__m512i)index, high);
}
#endif
template <int N> LB_FN V lookup(const Table<float, N>& table, I index) { return from_bits(look_up_bits(table, index)); }
template <int N> LB_FN I lookup(const Table<int32_t, N>& table, I index) { return look_up_bits(table, index); }

template <class T, int N> constexpr Table<T, 16> table_of(const T (&values)[N], T factor = 1) {
    Table<T, 16> table{};
    for (int k = 0; k < N; ++k) table.at[k] = values[k] * factor;
    return table;
}

template <class C> LB_FN void decode_line(V n, V& slope, V& offset) {
    static constexpr auto slopes = table_of(C::decode_slope, 0.25f), offsets = table_of(C::decode_offset);
    const I field = to_bits(n) >> 23;
    slope = lookup(slopes, field);
    offset = lookup(offsets, field);
}

#if LB_AVX512
// The lines by binade, for the exponent fields from 96 to 127, by their low five bits. A binade holds one threshold at
// most: `lower` moves what is not above it into the binade below.
struct Binades {
    Table<int32_t, 32> lower, shift;
    Table<float, 32> slope;
};

template <class C> constexpr Binades binades() {
    Binades result{};
    float low = 1.0f;
    for (int field = 127; field >= 96; --field, low /= 2) {
        const int k = field & 31;
        int line = 0;
        for (; line < C::lines - 1 && C::thresholds[line] < 2 * low; ++line)
            if (C::thresholds[line] >= low)
                result.lower.at[k] = (int32_t)((C::thresholds[line] / low - 1) * 0x1p23f) + 1;
        result.slope.at[k] = C::encode_slope[line];
        result.shift.at[k] = C::encode_shift[line];
    }
    return result;
}

template <class C> LB_FN void encode_line(V magnitude, V& slope, I& shift) {
    static constexpr Binades lines = binades<C>();
    const I bits = to_bits(magnitude), binade = (bits - lookup(lines.lower, bits >> 23)) >> 23;
    slope = lookup(lines.slope, binade);
    shift = lookup(lines.shift, binade);
}
#else
template <class C> LB_FN void encode_line(V magnitude, V& slope, I& shift) {
    static constexpr auto slopes = table_of(C::encode_slope);
    static constexpr auto shifts = table_of(C::encode_shift);
    I line{};
    for (int k = 0; k < C::lines - 1; ++k) line -= (I)(magnitude > C::thresholds[k]);
    slope = lookup(slopes, line);
    shift = lookup(shifts, line);
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
#if LB_AVX512
    return (I)_mm512_cvtepu8_epi32((__m128i)x);
#elif LB_AVX2
    return (I)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)x));
#else
    return __builtin_convertvector(x, I);
#endif
}
LB_FN I widen_signed(Bytes x) {
#if LB_AVX512
    return (I)_mm512_cvtepi8_epi32((__m128i)x);
#elif LB_AVX2
    return (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x));
#else
    return (widen(x) ^ 0x80) - 0x80;
#endif
}
LB_FN I logical_shift(I x, int by) { return (x >> by) & (int32_t)(0xffffffffu >> by); }
LB_FN I widen(Halves x) {
#if LB_AVX512
    return (I)_mm512_cvtepu16_epi32((__m256i)x);
#elif LB_AVX2
    return (I)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, I);
#endif
}
LB_FN Halves narrow_to_halves(I x) {  // of values from 0 to 65535
#if LB_AVX512
    return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif LB_AVX2
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
    return __builtin_convertvector(x, Halves);
#endif
}
LB_FN Bytes narrow_to_bytes(I x) {  // of values from 0 to 255
#if LB_AVX512
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif LB_AVX2
    const __m128i halves = (__m128i)narrow_to_halves(x);
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

// ---- 4 W bytes at once

typedef uint8_t ManyBytes __attribute__((vector_size(4 * W)));

// The low bytes of four vectors.
LB_FN ManyBytes low_bytes(const I* x) {
#if LB_AVX512_VBMI
    alignas(64) static constexpr uint8_t EVERY_FOURTH[64] = {
        0,  4,  8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72,  76,  80,
        84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
    const __m512i order = _mm512_load_si512(EVERY_FOURTH);
    const __m512i low = _mm512_permutex2var_epi8((__m512i)x[0], order, (__m512i)x[1]);
    const __m512i high = _mm512_permutex2var_epi8((__m512i)x[2], order, (__m512i)x[3]);
    return (ManyBytes)_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
#elif LB_AVX512_BW
    const __m512i low = _mm512_packus_epi32((__m512i)(x[0] & 255), (__m512i)(x[1] & 255));
    const __m512i high = _mm512_packus_epi32((__m512i)(x[2] & 255), (__m512i)(x[3] & 255));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (ManyBytes)_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
#elif LB_AVX2
    const __m256i low = _mm256_packus_epi32((__m256i)(x[0] & 255), (__m256i)(x[1] & 255));
    const __m256i high = _mm256_packus_epi32((__m256i)(x[2] & 255), (__m256i)(x[3] & 255));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (ManyBytes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#else
    Bytes parts[4];
    for (int j = 0; j < 4; ++j) parts[j] = narrow_to_bytes(x[j] & 255);
    ManyBytes all;
    memcpy(&all, parts, sizeof all);
    return all;
#endif
}

#if LB_AVX512_BW
// A bit for each of four vectors' elements that is below zero, or above.
template <class T> LB_FN __mmask64 mask_of_four(const T& each) {
    return _mm512_kunpackd(_mm512_kunpackw(each(3), each(2)), _mm512_kunpackw(each(1), each(0)));
}
LB_FN __mmask64 below_zero(const V* x) {
    return mask_of_four([&](int j) { return _mm512_cmplt_epi32_mask((__m512i)x[j], _mm512_setzero_si512()); });
}
LB_FN __mmask64 above_zero(const V* x) {
    return mask_of_four([&](int j) { return _mm512_cmpgt_epi32_mask((__m512i)x[j], _mm512_setzero_si512()); });
}
#endif

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
#if LB_AVX512
    return _mm512_cvtph_ps((__m256i)x);
#elif LB_AVX2_F16C
    return _mm256_cvtph_ps((__m128i)x);
#else
    return widen_half_by_bits(x);
#endif
}
LB_FN Halves narrow_half(V x) {
#if LB_AVX512
    return (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LB_AVX2_F16C
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
#if LB_AVX512_BF16
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
LB_FN V widen_bfloat16(Halves x) {
#if LB_AVX512_BW
    alignas(64) static constexpr uint16_t TWICE[32] = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                                       8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    const __m512i order = _mm512_load_si512(TWICE);
    return (V)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi256_si512((__m256i)x));
#else
    return from_bits(widen(x) << 16);
#endif
}
LB_FN V load(const BFloat16* p, int count) { return widen_bfloat16(load_raw<Halves>(p, count)); }
LB_FN void store(float* p, V x, int count) { store_raw(p, x, count); }
LB_FN void store(Half* p, V x, int count) { store_raw(p, narrow_half(x), count); }
LB_FN void store(BFloat16* p, V x, int count) { store_raw(p, narrow_bfloat16(x), count); }
// Codes as dynamic_map.h decodes them.
LB_FN I load_counted(const uint8_t* p, int count) { return widen(load_raw<Bytes>(p, count)) | 0x4c000000; }
LB_FN void store_codes(uint8_t* p, I x, int count) { store_raw(p, narrow_to_bytes(x), count); }
