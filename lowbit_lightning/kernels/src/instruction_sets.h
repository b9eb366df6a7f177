// Which instructions the CPU texts use. This is the only text that asks the compiler what the processor has: the others
// ask for the LB_ macros, which are 0 or 1 and fit together under any flags. Vectors have one width, and an instruction
// set counts only where it works on vectors of that width: AVX-VNNI (256 bits) does not where vectors have 512.
#pragma once

// The 512-bit half of AVX-512 can be switched off by itself (-mno-evex512) in the compilers that define __EVEX512__.
#if defined(__clang__)
#define LB_HALVES_AVX512 (__clang_major__ >= 18 && __clang_major__ <= 20)
#else
#define LB_HALVES_AVX512 (__GNUC__ == 14 || __GNUC__ == 15)
#endif
#if defined(__AVX512F__) && (defined(__EVEX512__) || !LB_HALVES_AVX512)
#define LB_AVX512 1
#else
#define LB_AVX512 0
#endif

#if LB_AVX512
#define LB_VECTOR_BITS 512
#elif defined(__AVX2__)
#define LB_VECTOR_BITS 256
#else
#define LB_VECTOR_BITS 128
#endif

// ---- 512 bits

#if LB_AVX512 && defined(__AVX512BW__)
#define LB_AVX512_BW 1
#else
#define LB_AVX512_BW 0
#endif
#if LB_AVX512 && defined(__AVX512DQ__)
#define LB_AVX512_DQ 1
#else
#define LB_AVX512_DQ 0
#endif
#if LB_AVX512 && defined(__AVX512VBMI__)
#define LB_AVX512_VBMI 1
#else
#define LB_AVX512_VBMI 0
#endif
#if LB_AVX512 && defined(__AVX512VNNI__)
#define LB_AVX512_VNNI 1
#else
#define LB_AVX512_VNNI 0
#endif
#if LB_AVX512_DQ && defined(__AVX512BF16__)
#define LB_AVX512_BF16 1
#else
#define LB_AVX512_BF16 0
#endif

// ---- 256 bits

#if LB_VECTOR_BITS == 256
#define LB_AVX2 1
#else
#define LB_AVX2 0
#endif
#if LB_AVX2 && defined(__FMA__)
#define LB_AVX2_FMA 1
#else
#define LB_AVX2_FMA 0
#endif
#if LB_AVX2 && defined(__F16C__)
#define LB_AVX2_F16C 1
#else
#define LB_AVX2_F16C 0
#endif
#if LB_AVX2 && defined(__AVXVNNI__)
#define LB_AVX2_VNNI 1
#else
#define LB_AVX2_VNNI 0
#endif

// ---- 128 bits

#if LB_VECTOR_BITS == 128 && defined(__SSE2__)
#define LB_SSE2 1
#else
#define LB_SSE2 0
#endif
#if LB_VECTOR_BITS == 128 && defined(__ARM_NEON) && defined(__aarch64__)
#define LB_NEON 1
#else
#define LB_NEON 0
#endif

// ---- tiles, beside vectors of any width

#if defined(LB_AMX_TWIN) || (defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__))
#define LB_AMX 1
#else
#define LB_AMX 0
#endif

#if LB_AVX512 || LB_AVX2
#include <immintrin.h>
#elif LB_SSE2
#include <emmintrin.h>
#elif LB_NEON
#include <arm_neon.h>
#endif
