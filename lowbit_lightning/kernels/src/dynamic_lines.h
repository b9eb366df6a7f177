// The look-ups of the dynamic maps on a GPU, in shared memory.
//
// A table of all 256 codes would cost a bank conflict in nearly every access, since 32 threads ask for 32 different
// entries. Of these tables 10, 32 and 9 entries are in use: threads that ask for the same one are served together, and
// different ones lie in different banks (but for binades sixteen apart).
#pragma once

struct alignas(8) Line { float slope, offset; };
struct alignas(8) Binade { float threshold; uint32_t line; };  // the line's place in bytes, as an address has it
struct alignas(8) Code { float slope; int32_t shift; };

struct Lines {
    Line decode[16];     // by the number of bits of f; a quarter of its slope, for 4 f
    Binade binade[32];   // by the exponent field of a magnitude, its low five bits: the line that the binade begins
                         // with, and the threshold inside it
    Code encode[16];     // by line
};

template <class C> __device__ constexpr Lines lines_of() {
    Lines lines{};
    for (int k = 0; k < 10; ++k) lines.decode[k] = {C::decode_slope[k] * 0.25f, C::decode_offset[k]};
    for (int k = 0; k < C::lines; ++k) lines.encode[k] = {C::encode_slope[k], C::encode_shift[k]};
    float low = 1.0f;
    for (int field = 127; field >= 96; --field, low /= 2) {
        Binade& binade = lines.binade[field % 32];
        binade.threshold = 3e38f;  // none
        for (int k = 0; k < C::lines - 1; ++k) {
            if (C::thresholds[k] < low) binade.line += sizeof(Code);
            else if (C::thresholds[k] < 2 * low) binade.threshold = C::thresholds[k];
        }
    }
    return lines;
}

__device__ const Lines SIGNED_LINES = lines_of<DynamicSignedConstants>();
__device__ const Lines UNSIGNED_LINES = lines_of<DynamicUnsignedConstants>();
__shared__ Lines signed_lines, unsigned_lines;

template <class C> LB_FN const Lines& lines() {
    if constexpr (C::is_signed) return signed_lines;
    else return unsigned_lines;
}

// Fills the shared tables; every thread of the CUDA block has to call it, before anything is encoded or decoded.
LB_FN void prepare_lines(bool use_signed, bool use_unsigned) {
    constexpr int WORDS = sizeof(Lines) / 4;
    for (int i = threadIdx.x; i < WORDS; i += blockDim.x) {
        if (use_signed) ((uint32_t*)&signed_lines)[i] = ((const uint32_t*)&SIGNED_LINES)[i];
        if (use_unsigned) ((uint32_t*)&unsigned_lines)[i] = ((const uint32_t*)&UNSIGNED_LINES)[i];
    }
    __syncthreads();
}

template <class C> LB_FN void decode_line(V n, V& slope, V& offset) {
    const Line line = lines<C>().decode[to_bits(n) >> 23 & 15];
    slope = line.slope;
    offset = line.offset;
}

template <class C> LB_FN void encode_line(V magnitude, V& slope, I& shift) {
    const Binade binade = lines<C>().binade[to_bits(magnitude) >> 23 & 31];
    uint32_t at = binade.line;
    if (magnitude > binade.threshold) at += sizeof(Code);
    const Code line = *(const Code*)((const char*)lines<C>().encode + at);
    slope = line.slope;
    shift = line.shift;
}
