// Low-bit weights are made on the GPU; reference/lowbit.py says what each step means. A CUDA block has a row: it fits
// the row's blocks, then encodes their scales where these are kept in 8 bits, then writes codes. The row is read two or
// three times, from the caches but for the first. A quantisation block belongs to a group of threads, 8 neighbouring
// elements each (group.h).
//
// Specialised by macros: ELEMENT (float, Half, BFloat16: of the weight), BITS, BLOCK (elements that share a scale),
// SQUARE (scales become codes of 8 bits) and AFFINE, as lowbit_units.h has them.
#include "gpu.h"
#include "scale.h"
#include "group.h"

LB_FN float to_float(int32_t x) { return (float)x; }
LB_FN int32_t to_nearest(float x) { return __float2int_rn(x); }
LB_FN float first_lanes(float x, int existing) { return existing > 0 ? x : 0.0f; }

#include "lowbit_fit.h"

// The codebook in shared memory: its values lie in banks of their own.
struct Book { float ascending[16], middles[16]; int32_t order[16]; };

LB_FN int32_t rank_of(const Book& book, float y) {  // the nearest value; half-way between two it is the lower one
    int32_t rank = 0;
#pragma unroll
    for (int step = 8; step; step /= 2)
        if (y > book.middles[rank + step - 1]) rank += step;
    return rank;
}

// One result over a group of SIZE threads, in a fixed order; all get it. Every thread of the CUDA block has to call it.
template <int SIZE, class F> LB_FN float over_group(float x, const F& f) {
    constexpr int LANES = SIZE < 32 ? SIZE : 32;
#pragma unroll
    for (int half = LANES / 2; half; half /= 2) x = f(x, __shfl_xor_sync(ALL_LANES, x, half));
    if constexpr (SIZE > 32) {
        __shared__ float of_warp[THREADS / 32];
        const int first = threadIdx.x / SIZE * (SIZE / 32);
        __syncthreads();  // the results of the last call have been read
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
        __syncthreads();
        x = of_warp[first];
        for (int w = first + 1; w < first + SIZE / 32; ++w) x = f(x, of_warp[w]);
    }
    return x;
}

struct Block {  // lowbit_fit.h says what of: this thread's 8 elements
    const Book& book;
    const float (&values)[PER_THREAD];
    int count, existing;  // of the block, of this thread
    template <class F> LB_METHOD void each(const F& f) const {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) f(values[i], existing - i);
    }
    LB_METHOD float nearest(float y) const { return book.ascending[rank_of(book, y)]; }
    LB_METHOD float sum(float x) const {
        return over_group<GROUP>(x, [](float a, float b) { return a + b; });
    }
    LB_METHOD bool settled(bool) const { return false; }  // groups of a warp keep step
};

// This thread's elements of a row from `first` on, zero where they are not finite or do not exist; false if any is not
// finite.
LB_FN bool load_finite(const ELEMENT* row, int64_t first, int64_t length, float (&v)[PER_THREAD]) {
    const ELEMENT* from = row + first;
    const int64_t left = length - first;
    if (left >= PER_THREAD && (uint64_t)from % 16 == 0) load_packet<PER_THREAD>(from, v);
    else
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) v[i] = i < left ? widen(from[i]) : 0.0f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const bool good = magnitude_bits(v[i]) < INFINITE;
        finite = finite && good;
        v[i] = good ? v[i] : 0.0f;
    }
    return finite;
}

// The exponent of a row's n values, and their codes [n]. replace: the values become what their codes stand for.
LB_FN void encode_squares(float* x, int64_t n, float largest, bool replace, uint8_t* exponent_to, uint8_t* codes) {
    float top = 0.0f;
    for (int64_t b = threadIdx.x; b < n; b += THREADS) top = maximum(top, fabsf(x[b]));
    top = over_group<THREADS>(top, [](float a, float b) { return maximum(a, b); });
    const int32_t exponent = exponent_of(top, largest);
    const float unit = power(exponent);
    for (int64_t b = threadIdx.x; b < n; b += THREADS) {
        const float root = root_of(x[b], unit, largest);
        codes[b] = (uint8_t)(int32_t)copysignf(root, x[b]);
        if (replace) x[b] = copysignf(root * root, x[b]) * unit;
    }
    if (threadIdx.x == 0) *exponent_to = (uint8_t)exponent;
    __syncthreads();
}

// Scale and offset of each block into scale [blocks] and offset [blocks]; true if a value of the row is not finite.
LB_FN bool fit_blocks(const Rule& rule, const Book& book, const ELEMENT* row, float* scale, float* offset) {
    bool row_finite = true;
    for (int64_t first = 0; first < rule.blocks; first += GROUPS) {
        const int64_t b = first + threadIdx.x / GROUP;
        const int lane = threadIdx.x % GROUP;
        const int64_t left = rule.length - b * BLOCK;  // not positive where there is no block
        float v[PER_THREAD];
        const bool finite = load_finite(row, b * BLOCK + lane * PER_THREAD, rule.length, v);
        row_finite = row_finite && finite;
        uint32_t top[2] = {0, finite ? 0u : 1u};
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) top[0] = max(top[0], magnitude_bits(v[i]));
        group_max<GROUP>(top);
        const float absmax = from_bits((int32_t)top[0]), inverse = inverse_of(rule, absmax);
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) v[i] = v[i] * inverse;

        const int existing = (int)max((int64_t)0, min((int64_t)PER_THREAD, left - lane * PER_THREAD));
        const Block block{book, v, (int)max((int64_t)1, min((int64_t)BLOCK, left)), existing};
        Line line{1.0f, 0.0f};
        if (AFFINE) {
            float low = from_bits(INFINITE), high = -low;
            block.each([&](float y, int exists) {
                low = exists > 0 ? minimum(low, y) : low;
                high = exists > 0 ? maximum(high, y) : high;
            });
            low = over_group<GROUP>(low, [](float x, float y) { return minimum(x, y); });
            high = over_group<GROUP>(high, [](float x, float y) { return maximum(x, y); });
            line = line_through(rule, low, high);
            if (rule.least_squares) line = fit_affine(rule, block, line);
        } else if (rule.least_squares) {
            line.scale = fit_codebook(rule, block);
        }
        if (lane != 0 || left <= 0) continue;
        const bool bad = !SQUARE && top[1];
        scale[b] = bad ? from_bits(0x7fc00000) : AFFINE || rule.least_squares ? absmax * line.scale : absmax;
        offset[b] = line.offset * absmax;
    }
    return __syncthreads_or(!row_finite);
}

LB_FN void refit_offsets(const Rule& rule, const Book& book, const ELEMENT* row, const float* scale, float* offset) {
    for (int64_t first = 0; first < rule.blocks; first += GROUPS) {
        const int64_t b = first + threadIdx.x / GROUP, left = rule.length - b * BLOCK;
        const int lane = threadIdx.x % GROUP;
        float v[PER_THREAD];
        load_finite(row, b * BLOCK + lane * PER_THREAD, rule.length, v);
        const int existing = (int)max((int64_t)0, min((int64_t)PER_THREAD, left - lane * PER_THREAD));
        const Block block{book, v, (int)max((int64_t)1, min((int64_t)BLOCK, left)), existing};
        const Line line = left > 0 ? Line{scale[b], offset[b]} : Line{1.0f, 0.0f};
        const float best = refit_offset(rule, block, line);
        __syncwarp();  // all of the group have read what one of them overwrites (above a warp the sums have waited)
        if (lane == 0 && left > 0) offset[b] = best;
    }
    __syncthreads();
}

// Bytes of unit u from 8 codes: EACH bits of a code from `shift` on, the first code in the highest bits of its byte.
template <int EACH>
LB_FN void write_codes(const int32_t (&code)[PER_THREAD], int shift, int64_t u, int64_t width, uint8_t* to) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
        word |= (uint32_t)(code[i] >> shift & ((1 << EACH) - 1)) << (i * EACH / 8 * 8 + 8 - EACH - i * EACH % 8);
    to += u * EACH;
    const int64_t left = width - u * EACH;
    if (left >= EACH && (uint64_t)to % EACH == 0) {
        if (EACH == 4) *(uint32_t*)to = word;
        else if (EACH == 2) *(uint16_t*)to = (uint16_t)word;
        else *to = (uint8_t)word;
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (i < left) to[i] = (uint8_t)(word >> (8 * i));
}

LB_FN void write_row(const Rule& rule, const Book& book, const ELEMENT* row, const float* scale, const float* offset,
                     uint8_t* to) {
    for (int64_t u = threadIdx.x; u * PER_THREAD < rule.length; u += THREADS) {
        const int64_t b = u * PER_THREAD / BLOCK;
        const float of_block = scale[b], inverse = inverse_of(rule, of_block);
        float v[PER_THREAD];
        load_finite(row, u * PER_THREAD, rule.length, v);
        int32_t code[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            if (AFFINE) code[i] = (int32_t)levels(rule, v[i], {of_block, offset[b]});
            else code[i] = of_block == of_block ? book.order[rank_of(book, v[i] * inverse)] : 0;
            if (u * PER_THREAD + i >= rule.length) code[i] = 0;
        }
        if (BITS == 4) {
            write_codes<4>(code, 0, u, rule.packed_stride, to);
            continue;
        }
        const int64_t low = (rule.length + 3) / 4;
        write_codes<2>(code, 0, u, low, to);
        if (BITS == 3) write_codes<1>(code, 2, u, rule.packed_stride - low, to + low);
    }
}

// work: two floats for each block of a row, of each row. Grid: a CUDA block takes every gridDim.x-th row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) quantize_weight(
    const ELEMENT* weight, int64_t rows, const __grid_constant__ Rule rule, float* work, uint8_t* packed,
    uint8_t* scales) {
    __shared__ Book book;
    if (threadIdx.x < 16) {
        book.ascending[threadIdx.x] = rule.ascending[threadIdx.x];
        book.middles[threadIdx.x] = rule.middles[threadIdx.x];
        book.order[threadIdx.x] = rule.order[threadIdx.x];
    }
    __syncthreads();
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const ELEMENT* row = weight + r * rule.length;
        float *scale = work + 2 * r * rule.blocks, *offset = scale + rule.blocks;
        uint8_t *kept = scales + r * rule.scales_stride, *to = packed + r * rule.packed_stride;
        const bool bad = fit_blocks(rule, book, row, scale, offset);
        if (SQUARE) {
            const bool replace = AFFINE || rule.least_squares;
            encode_squares(scale, rule.blocks, SCALE_SQUARE, replace, kept, kept + 1 + AFFINE);
        } else {
            for (int64_t b = threadIdx.x; b < rule.blocks; b += THREADS) ((float*)kept)[b] = scale[b];
        }
        if (AFFINE) {
            if (rule.least_squares) refit_offsets(rule, book, row, scale, offset);  // for the scales that are kept
            encode_squares(offset, rule.blocks, OFFSET_SQUARE, true, kept + 1, kept + 2 + rule.blocks);
        }
        write_row(rule, book, row, scale, offset, to);
        if (!SQUARE || !bad) continue;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < rule.scales_stride; i += THREADS)
            kept[i] = i <= AFFINE ? NAN_EXPONENT : 0;
    }
}
