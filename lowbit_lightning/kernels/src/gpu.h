// The GPU's shim: what dynamic_map.h and the rules need when V is one float of one thread, the 16-bit floats, and loads
// and stores of several elements at once. NVRTC gets no header of CUDA's: what is needed stands here.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no <cstdint>
#pragma nv_diag_suppress 128, 177  // loops that a specialisation leaves empty, scalars that one part of a rule needs
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

#define LB_FN static __device__ __forceinline__
#define LB_METHOD __device__ __forceinline__
#define LB_LAMBDA  // the compiler inlines them

typedef float V;
typedef int32_t I;

constexpr uint32_t ALL_LANES = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// One float at a time

template <class T> LB_FN T where(bool mask, T a, T b) { return mask ? a : b; }
template <class T, class S> LB_FN T splat(S x) { return x; }
LB_FN I to_bits(V x) { return __float_as_int(x); }
LB_FN V from_bits(I x) { return __int_as_float(x); }
LB_FN V absolute(V x) { return fabsf(x); }
LB_FN V fused(V a, V b, V c) { return fmaf(a, b, c); }
LB_FN V maximum(V a, V b) { return a > b ? a : b; }  // of a NaN and a number b
LB_FN V maximum_or_nan(V a, V b) { return a == a ? maximum(a, b) : a; }  // the rules' maximum, as torch.maximum
LB_FN I maximum(I a, I b) { return a > b ? a : b; }
LB_FN V minimum(V a, V b) { return fminf(a, b); }
LB_FN V magnitude_from(V x, float low) { return maximum(fabsf(x), low); }
LB_FN V sign(V x) { return fabsf(x) > 0.0f ? copysignf(1.0f, x) : 0.0f; }  // 0 of a NaN, as torch.sign
LB_FN uint32_t unsigned_maximum(uint32_t a, uint32_t b) { return a > b ? a : b; }
// The larger of `most` and |x|; NaN if either is.
LB_FN float raised(float most, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(most), "f"(fabsf(x)));
    return result;
#else
    const I bits = to_bits(x) & 0x7fffffff;
    return from_bits(to_bits(most) > bits ? to_bits(most) : bits);
#endif
}
LB_FN uint32_t magnitude_bits(float x) { return (uint32_t)to_bits(x) & 0x7fffffffu; }

// The hardware's approximations: 1 / x within 1 ulp, 1 / sqrt(x) within 2^-22.9; a subnormal x or result is zero.
#ifdef __CUDA_ARCH__
LB_FN float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
LB_FN float approximate_inverse_root(float x) {
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#else  // as wrong as they may be, now on one side, now on the other
LB_FN float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
LB_FN float astray(float x, float result) {
    if (!(fabsf(result) >= 0x1p-125f && fabsf(result) < 0x1p126f)) return flushed(result);
    return from_bits(to_bits(result) + (int32_t)((uint32_t)to_bits(x) * 2654435761u >> 16) % 3 - 1);
}
LB_FN float approximate_reciprocal(float x) { return astray(x, 1.0f / flushed(x)); }
LB_FN float approximate_inverse_root(float x) { return astray(x, 1.0f / sqrtf(flushed(x))); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit floats

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

LB_FN float widen(float x) { return x; }
LB_FN float widen(BFloat16 x) { return from_bits((int32_t)((uint32_t)x.bits << 16)); }
LB_FN float widen(Half x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#else
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
#endif
}

template <class T> LB_FN T narrow(float x);  // to nearest, ties to even
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ Half narrow<Half>(float x) {
    Half result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    const _Float16 h = (_Float16)x;
    memcpy(&result, &h, 2);
#endif
    return result;
}
template <> __device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {  // a NaN stays one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    const uint32_t bits = (uint32_t)to_bits(x), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return {(uint16_t)((x == x ? rounded : bits | 0x400000) >> 16)};
#endif
}

// Two 16-bit floats in a word.
template <class T> LB_FN uint32_t pair_of(T low, T high) { return (uint32_t)high.bits << 16 | low.bits; }
LB_FN uint32_t narrow_pair(float low, float high, Half) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return pair_of(narrow<Half>(low), narrow<Half>(high));
#endif
}
LB_FN uint32_t narrow_pair(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return pair_of(narrow<BFloat16>(low), narrow<BFloat16>(high));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// N adjacent elements in one access (two where they are 32 bytes), from and to addresses aligned to its width

template <int BYTES> struct Packet;
template <> struct alignas(4) Packet<4> { uint32_t word[1]; };
template <> struct alignas(8) Packet<8> { uint32_t word[2]; };
template <> struct alignas(16) Packet<16> { uint32_t word[4]; };
template <> struct alignas(16) Packet<32> { uint32_t word[8]; };

LB_FN void copy(const Packet<4>* from, Packet<4>* to) { to->word[0] = from->word[0]; }
LB_FN void copy(const Packet<8>* from, Packet<8>* to) { *(uint2*)to = *(const uint2*)from; }
LB_FN void copy(const Packet<16>* from, Packet<16>* to) { *(uint4*)to = *(const uint4*)from; }
LB_FN void copy(const Packet<32>* from, Packet<32>* to) {
    ((uint4*)to)[0] = ((const uint4*)from)[0];
    ((uint4*)to)[1] = ((const uint4*)from)[1];
}

template <class T, int N> constexpr int ACCESS_WIDTH = N * sizeof(T) < 16 ? N * sizeof(T) : 16;

LB_FN float unpack(const uint32_t* word, int i, float) { return from_bits((int32_t)word[i]); }
LB_FN float unpack(const uint32_t* word, int i, Half) {
    return widen(Half{(uint16_t)(word[i / 2] >> (16 * (i % 2)))});
}
LB_FN float unpack(const uint32_t* word, int i, BFloat16) {
    return widen(BFloat16{(uint16_t)(word[i / 2] >> (16 * (i % 2)))});
}
LB_FN void pack(uint32_t* word, int i, float x) { word[i] = (uint32_t)to_bits(x); }
template <class T> LB_FN void pack(uint32_t* word, int i, T x) {
    word[i / 2] = i % 2 ? word[i / 2] | (uint32_t)x.bits << 16 : x.bits;
}

// What is known of every pointer here, but to the compiler only of a kernel's arguments: accesses are cheaper then.
LB_FN void assume_global(const void* p) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(p));
#endif
}

template <int N, class T> LB_FN void load_packet(const T* from, float* v) {
    Packet<N * sizeof(T)> packet;
    copy((const Packet<N * sizeof(T)>*)from, &packet);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = unpack(packet.word, i, T());
}
template <int N, class T> LB_FN void store_packet(T* to, const T* v) {
    Packet<N * sizeof(T)> packet;
#pragma unroll
    for (int i = 0; i < N; ++i) pack(packet.word, i, v[i]);
    copy(&packet, (Packet<N * sizeof(T)>*)to);
}
// Floats, rounded to T on the way.
template <int N, class T> LB_FN void store_rounded(T* to, const float* v) {
    Packet<N * sizeof(T)> packet;
#pragma unroll
    for (int i = 0; i < N; i += 4 / sizeof(T)) {
        if constexpr (sizeof(T) == 4) pack(packet.word, i, v[i]);
        else packet.word[i / 2] = narrow_pair(v[i], v[i + 1], T());
    }
    copy(&packet, (Packet<N * sizeof(T)>*)to);
}
// Codes come counted, as dynamic_map.h decodes them: each after the upper bytes of 2^25, by one permutation.
constexpr uint32_t COUNTED = 0x4c000000;
template <int N> LB_FN void load_packet(const uint8_t* from, int32_t* v) {
    Packet<N> packet;
    copy((const Packet<N>*)from, &packet);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = (int32_t)__byte_perm(packet.word[i / 4], COUNTED, 0x7540 + i % 4);
}
template <int N> LB_FN void store_packet(uint8_t* to, const int32_t* v) {
    Packet<N> packet;
#pragma unroll
    for (int i = 0; i < N; ++i) packet.word[i / 4] = (i % 4 ? packet.word[i / 4] : 0) | (uint32_t)v[i] << (8 * (i % 4));
    copy(&packet, (Packet<N>*)to);
}
