// The look-ups of the dynamic maps on a GPU, in shared memory, and the encoding of packets.
//
// A table of all 256 codes would cost a bank conflict in nearly every access, since 32 threads ask for 32 different
// entries. Of these tables 10, 16 and 9 entries are in use: threads that ask for the same one are served together, and
// different ones lie in different banks (but for magnitudes 2^32 apart).
#pragma once

struct alignas(8) Line { float slope, offset; };
struct alignas(8) Range { float threshold; uint32_t line; };  // the line's place
struct alignas(8) Code { float slope; int32_t shift; };
struct alignas(8) Units { float slope, units; };  // f is u * units, rounded down

// Aligned so that a place in it is an OR of its own place and an offset.
struct alignas(1024) Lines {
    Line decode[16];  // by the number of bits of f; a quarter of its slope, for 4 f
    Code encode[16];  // by line
    Units units[16];  // by line
    alignas(512) Range range[64];  // by the upper seven bits of a magnitude's exponent field: the line that these two
                                   // binades begin with, and the threshold inside them
};

// Where u = 32 / 9, or from 4 to 8, becomes the f that the shift finds (maps.py), but for multiples of 256.
__device__ constexpr Units units_of(const Code& code) {
    const float of_one_f = code.shift == 22 ? 0.3f : code.shift == 29 ? 0.6f : code.shift == 23 ? 36.1f : 0.0f;
    if (code.slope == 0.0f) return {0.0f, of_one_f};
    float units = 0.5f;  // of two f, by a shift of 22
    for (int shift = 22; shift > code.shift; --shift) units *= 2;
    return {code.slope, units};
}

template <class C> __device__ constexpr Lines lines_of() {
    Lines lines{};
    for (int k = 0; k < 10; ++k) lines.decode[k] = {C::decode_slope[k] * 0.25f, C::decode_offset[k]};
    // One line more, below the unsigned map's `low`: there all have its f, which is 2 (in the bits of the offset).
    const int before = C::is_signed ? 0 : 1;
    if (before) lines.encode[0] = {0.0f, 29};
    for (int k = 0; k < C::lines; ++k) lines.encode[before + k] = {C::encode_slope[k], C::encode_shift[k]};
    for (int k = 0; k < 16; ++k) lines.units[k] = units_of(lines.encode[k]);
    float low = 0.5f;
    for (int two = 63; two >= 0; --two, low /= 4) {
        Range& range = lines.range[two];
        range.threshold = 3e38f;  // none
        range.line = sizeof(lines.decode);
        if (before && low < C::low / 2) continue;
        range.line += before * sizeof(Code);
        for (int k = 0; k < C::lines - 1; ++k) {
            if (C::thresholds[k] < low) range.line += sizeof(Code);
            else if (C::thresholds[k] < 4 * low) range.threshold = C::thresholds[k];
        }
    }
    return lines;
}

struct alignas(2048) Tables { Lines of_signed, of_unsigned; };

__device__ const Lines SIGNED_LINES = lines_of<DynamicSignedConstants>();
__device__ const Lines UNSIGNED_LINES = lines_of<DynamicUnsignedConstants>();
__shared__ Tables tables;

// A place in the tables: an address of shared memory in 32 bits, as instructions take it. The emulator's are relative.
#ifdef __CUDA_ARCH__
LB_FN uint32_t tables_place() {
    uint32_t place = (uint32_t)__cvta_generic_to_shared(&tables);
    asm volatile("" : "+r"(place));  // it stays in a register, and is not computed where it is needed
    return place;
}
template <int OFFSET> LB_FN uint2 look_up(uint32_t place) {
    uint2 pair;
    asm("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(pair.x), "=r"(pair.y) : "r"(place), "n"(OFFSET));
    return pair;
}
#else
LB_FN uint32_t tables_place() { return 0; }
template <int OFFSET> LB_FN uint2 look_up(uint32_t place) {
    return *(const uint2*)((const char*)&tables + OFFSET + place);
}
#endif

LB_FN void fill(Lines& lines, const Lines& from, uint32_t place) {
    for (int i = threadIdx.x; i < 16; i += blockDim.x) {
        lines.decode[i] = from.decode[i];
        lines.encode[i] = from.encode[i];
        lines.units[i] = from.units[i];
    }
    for (int i = threadIdx.x; i < 64; i += blockDim.x)
        lines.range[i] = {from.range[i].threshold, from.range[i].line + place};
}
// Fills the shared tables and returns their place; every thread of the CUDA block has to call it, before anything is
// encoded or decoded.
LB_FN uint32_t prepare_tables(bool use_signed, bool use_unsigned) {
    const uint32_t place = tables_place();
    if (use_signed) fill(tables.of_signed, SIGNED_LINES, place);
    if (use_unsigned) fill(tables.of_unsigned, UNSIGNED_LINES, place + sizeof(Lines));
    __syncthreads();
    return place;
}

template <class C> constexpr int OFFSET = C::is_signed ? 0 : sizeof(Lines);

template <class C> LB_FN void decode_line(V n, V& slope, V& offset, uint32_t place) {
    const uint2 line = look_up<OFFSET<C>>(place | ((uint32_t)to_bits(n) >> 20 & 0x78));
    slope = from_bits((int32_t)line.x);
    offset = from_bits((int32_t)line.y);
}

// Where the line of a magnitude lies.
template <class C> LB_FN uint32_t line_place(V magnitude, uint32_t place) {
    const uint2 range = look_up<OFFSET<C> + 512>(place | ((uint32_t)to_bits(magnitude) >> 21 & 0x1f8));
    const bool above = magnitude > from_bits((int32_t)range.x);
    return above ? range.y + sizeof(Code) : range.y;
}
template <class C> LB_FN void encode_line(V magnitude, V& slope, I& shift, uint32_t place) {
    const uint2 line = look_up<0>(line_place<C>(magnitude, place));
    slope = from_bits((int32_t)line.x);
    shift = (int32_t)line.y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes of four values at a time

LB_FN uint32_t packed(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t selector) {
    return __byte_perm(__byte_perm(a, b, selector), __byte_perm(c, d, selector), 0x5410);
}

// 2^23 + a * b, rounded down to a whole number, so that its bits count; not by the ALU, as a shift would be.
LB_FN float counted_product(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("fma.rz.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(0x1p23f));
    return result;
#else
    return 0x1p23f + (float)(int)((double)a * b);
#endif
}
// The low bytes of the f of four values.
template <class C> LB_FN uint32_t encode_bytes(const float* x, float inverse, uint32_t place) {
    uint32_t f[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const float magnitude = fabsf(x[k]) * inverse;
        const uint2 line = look_up<sizeof(Lines::encode)>(line_place<C>(magnitude, place));
        const float u = minimum(fused(magnitude, from_bits((int32_t)line.x), C::encode_offset), C::encode_top);
        f[k] = (uint32_t)to_bits(counted_product(u, from_bits((int32_t)line.y)));
    }
    return packed(f[0], f[1], f[2], f[3], 0x0040);
}
// All bits of a byte where a value is below zero.
LB_FN uint32_t sign_bytes(const float* x) {
    return packed(to_bits(x[0]), to_bits(x[1]), to_bits(x[2]), to_bits(x[3]), 0x00fb);
}
// The codes of the signed map: 127 + f or, where a byte of `below` is set, 127 - f; there f is at most 127.
LB_FN uint32_t signed_codes(uint32_t f, uint32_t below) {
    const uint32_t bits = below & 0x7f7f7f7fu;
    return (f ^ bits) - bits + 0x7f7f7f7fu;  // no byte carries to the next
}
// Those of the other, of positive values: f - 1 in each byte.
LB_FN uint32_t unsigned_codes(uint32_t f) { return ((f | 0x80808080u) - 0x01010101u) ^ (~f & 0x80808080u); }
