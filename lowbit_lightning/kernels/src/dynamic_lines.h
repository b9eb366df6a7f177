// The look-ups of the dynamic maps on a GPU, in shared memory.
//
// A table of all 256 codes would cost a bank conflict in nearly every access, since 32 threads ask for 32 different
// entries. These tables have 9, 32 and 8 entries: threads that ask for the same one are served together, and different
// ones lie in different banks (of the 32, only neighbours sixteen binades apart share one).
#pragma once

struct alignas(8) Line { float slope, offset; };
struct alignas(8) Binade { float threshold; int32_t decade; };
struct alignas(16) Limited { float slope, offset, limit, unused; };

struct Lines {
    Line decode[9];      // by floor(log2 n) - C::first_exponent
    Binade binade[32];   // by the exponent field of a magnitude, its low five bits: the decade that the binade begins
                         // in, and the threshold inside it
    Limited encode[8];   // by decade
};

template <class C> __device__ constexpr Lines lines_of() {
    Lines lines{};
    for (int e = 0; e < 9; ++e) lines.decode[e] = {C::decode_slope[e], C::decode_offset[e]};
    for (int d = 0; d < 8; ++d) lines.encode[d] = {C::encode_slope[d], C::encode_offset[d], C::encode_limit[d], 0.0f};
    float low = 1.0f;
    for (int field = 127; field >= 96; --field, low /= 2) {
        Binade& binade = lines.binade[field % 32];
        binade.threshold = 3e38f;  // none
        for (int d = 0; d < 7; ++d) {
            if (C::thresholds[d] < low) binade.decade++;
            else if (C::thresholds[d] < 2 * low) binade.threshold = C::thresholds[d];
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
    const Line line = lines<C>().decode[(to_bits(n) >> 23) - 127 - C::first_exponent];
    slope = line.slope;
    offset = line.offset;
}

template <class C> LB_FN void encode_line(V magnitude, V& slope, V& offset, V& limit) {
    const Binade binade = lines<C>().binade[to_bits(magnitude) >> 23 & 31];
    const Limited line = lines<C>().encode[binade.decade + (magnitude > binade.threshold ? 1 : 0)];
    slope = line.slope;
    offset = line.offset;
    limit = line.limit;
}
