// Rows of low-bit weights as floats, in the order in which codes are decoded or in the natural one.
#pragma once
#include "int8_vectors.h"
#include "lowbit.h"
#include "parallel.h"
#include <vector>

// Chunk c of a row in the order [phase][lane].
LB_FN void decode_chunk(const Values& values, const Codes& codes, V scale, bool affine, V offset, V* out) {
#pragma GCC unroll 16
    for (int p = 0; p < PHASES; ++p) {
        out[p] = values.of(codes, p) * scale;
        if (affine) out[p] = out[p] + offset;
    }
}
// The same in the natural order: PHASES * W elements.
LB_FN void to_natural_order(V* v, float* out) {
    if (BITS == 8) {
        memcpy(out, v, CHUNK * sizeof(float));
        return;
    }
    if (PHASES < W) {  // the square is filled up with zeros
        I square[W] = {};
        for (int p = 0; p < PHASES; ++p) square[p] = to_bits(v[p]);
        transpose(square);
        for (int l = 0; l < W; ++l) memcpy(out + l * PHASES, &square[l], PHASES * sizeof(float));
        return;
    }
    for (int t = 0; t < PHASES; t += W) {
        I square[W];
        for (int p = 0; p < W; ++p) square[p] = to_bits(v[(t + p) % PHASES]);
        transpose(square);
        for (int l = 0; l < W; ++l) memcpy(out + l * PHASES + t, &square[l], sizeof(I));
    }
}

// Chunks first_chunk to last_chunk - 1 of a row. NATURAL: elements in order, none after the row's end; otherwise
// [phase][lane], the last chunk whole.
template <bool NATURAL, class T>
static void decode_row(const Form& form, const Values& values, const Spread& spread, const uint8_t* packed,
                       const float* scales, const float* offsets, int64_t first_chunk, int64_t last_chunk, T* out) {
    for (int64_t c = first_chunk; c < last_chunk; ++c, out += CHUNK) {
        const int64_t left = form.length - c * CHUNK;
        const Codes codes = left < CHUNK ? load_last_codes(form, packed, c) : load_codes(form, packed, c);
        V v[PHASES];
        decode_chunk(values, codes, spread.of(scales, c), form.affine, form.affine ? spread.of(offsets, c) : V{}, v);
        if (!NATURAL) {
            for (int p = 0; p < PHASES; ++p) store(out + p * W, v[p], W);
            continue;
        }
        alignas(64) float ordered[CHUNK];
        to_natural_order(v, ordered);
        const int64_t count = least(CHUNK, left);
        int64_t i = 0;
        for (; i + W <= count; i += W) store(out + i, load(ordered + i, W), W);
        if (i < count) store(out + i, load(ordered + i, W), (int)(count - i));
    }
}
