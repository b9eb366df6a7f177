// out [M][N] = x [M][K] @ weight [N][K]^T (+ bias) for a low-bit weight and a few rows of 16-bit x. The packed weight
// is read once, codes become 16-bit values in registers, and tensor cores multiply them: the weight is their A, 16
// rows of it, and x their B, 8 rows of it, so that one row of x costs what eight do. Memory is what such a product
// waits for.
//
// Specialised by macros: ELEMENT (Half, BFloat16), BIAS (float, Half, BFloat16: of the bias), COLUMNS (8, 16 or 32:
// rows of x that there may be), PACKETS (rows of the packed weight begin at multiples of 16 bytes, and so do their
// planes), STAGES, and those of lowbit_units.h.
//
// A CUDA block has 128 rows of the weight and a part of K, in steps of 128, STAGES of them in a ring in shared
// memory. A part's sums go to `work`, and sum_parts adds them up in their order; where K is not cut they are the
// result.
//
// Scales come last: a block's products are summed by themselves, and that sum is multiplied by the scale. A product
// meets values of the table that are rounded to ELEMENT, in a unit that suits them, and nothing else is rounded.
// Offsets are multiplied by the sum of the block's x, which the tensor cores find as x times ones.
//
// Order. The sum over K has none, so lane t of a group of four takes elements 8t to 8t + 7 of each 32 (a *span*;
// blocks are multiples of it): a unit of the weight, 16 bytes of x, in natural order, two fragments of 16 x 16.
#include "lowbit_units.h"
#include "tensor_core.h"
#include "lowbit_parts.h"

constexpr int TILE_N = 128, TILE_K = 128, SPAN = 32, SPANS = TILE_K / SPAN, CHUNK = 16;
constexpr int J = COLUMNS / 8, FRAGMENTS = J > 1 && !AFFINE ? 2 : 1;  // of x, of the weight: to a warp
constexpr int THREADS = 32 * TILE_N / (16 * FRAGMENTS);
constexpr int LOW_CHUNKS = TILE_K / UNIT * UNIT_BYTES / CHUNK, HIGH_CHUNKS = BITS == 3 ? 1 : 0, X_CHUNKS = TILE_K / 8;
constexpr int STAGE_CHUNKS = TILE_N * (LOW_CHUNKS + HIGH_CHUNKS) + COLUMNS * X_CHUNKS;

// Where chunk c of row r lies. A warp reads 8 rows at a time, of each a span's part; these parts fall into different
// banks.
LB_FN int low_place(int r, int c) {
    const int turn = LOW_CHUNKS == 8 ? r % 4 * 2 : LOW_CHUNKS == 4 ? r / 2 % 4 : r / 4 % 2;
    return r * LOW_CHUNKS + (c ^ turn);
}
LB_FN int x_place(int r, int c) { return r * X_CHUNKS + (c ^ r % 2 * 4); }

// ---- codes to pairs of ELEMENT

// The values of every pair of codes, 32 times, for each lane in a bank of its own.
constexpr int ENTRIES = BITS == 8 ? 0 : BITS == 4 ? 256 : BITS == 3 ? 64 : 16;

LB_FN void fill_table(const Form& form, uint32_t* table) {
    for (int i = threadIdx.x; i < ENTRIES * 8; i += THREADS) {
        const int entry = i / 8;
        int first = BITS == 4 ? entry >> 4 : entry >> 2 & 3, second = BITS == 4 ? entry & 15 : entry & 3;
        if (BITS == 3) first |= entry >> 5 << 2, second |= (entry >> 4 & 1) << 2;
        const uint32_t pair = pair_of(narrow<ELEMENT>(form.values[first]), narrow<ELEMENT>(form.values[second]));
        ((uint4*)table)[i] = make_uint4(pair, pair, pair, pair);
    }
}
LB_FN uint32_t look_up(const uint32_t* table, uint32_t word, int shift, uint32_t mask) {  // table: of this lane
    const uint32_t place = shift >= 5 ? word >> (shift - 5) : word << (5 - shift);  // in words: entries are 32 long
    return table[place & (mask << 5)];
}
LB_FN uint32_t bytes_to_pair(uint32_t word, uint32_t bytes, Half) {  // 1024 + 128 + x, less what is too much
    return subtract_pairs(__byte_perm(word ^ 0x80808080, 0x64646464, bytes), 0x64806480, Half());
}
LB_FN uint32_t bytes_to_pair(uint32_t word, uint32_t bytes, BFloat16) {  // 128 + 7 bits, less 128 or 256
    const uint32_t apart = __byte_perm(word, 0, bytes);
    return subtract_pairs((apart & 0x007f007f) | 0x43004300, (apart & 0x00800080) | 0x43004300, BFloat16());
}
// The four pairs of a unit, from where its bytes lie in shared memory.
LB_FN void decode_unit(const uint8_t* low, const uint8_t* high, const uint32_t* table, uint32_t (&pair)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if BITS == 8
        const uint2 words = *(const uint2*)low;
        pair[i] = bytes_to_pair(i < 2 ? words.x : words.y, i % 2 ? 0x4342 : 0x4140, ELEMENT());
#elif BITS == 4
        pair[i] = look_up(table, *(const uint32_t*)low, 8 * i, 255);
#elif BITS == 3
        const uint32_t codes = *(const uint16_t*)low, nibble = codes >> (4 * (i ^ 1)) & 15;
        pair[i] = look_up(table, nibble | (uint32_t)(*high >> (6 - 2 * i) & 3) << 4, 0, 63);
#else
        pair[i] = look_up(table, *(const uint16_t*)low, 4 * (i ^ 1), 15);
#endif
    }
}

// ---- copies

// 16 bytes of which the first `left` exist; the others become zero.
LB_FN void start_chunk(uint4* to, const uint8_t* from, int64_t left) {
    if (PACKETS) return start_copy(to, from, left > 0);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
        if (i < left) word[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
    *to = make_uint4(word[0], word[1], word[2], word[3]);
}
// Chunks of the weight's rows `first` on: the plane that begins at `plane` and has `width` bytes of a row, from byte
// `column` on.
template <int CHUNKS, class Place>
LB_FN void start_plane(const uint8_t* packed, int64_t stride, int64_t first, int64_t rows, int64_t plane, int64_t width,
                       int64_t column, uint4* to, const Place& place) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE_N * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS;
        const int64_t byte = column + c * CHUNK;
        const int64_t left = first + r < rows ? width - byte : 0;
        start_chunk(to + place(r, c), packed + (first + r) * stride + plane + byte, left);
    }
}

// ---- scales

// Of the rows that a lane has: rows 8h + lane / 4 of each of its fragments.
struct RowScales {
    const uint8_t* row[2 * FRAGMENTS];  // null where there is none
    float unit[2 * FRAGMENTS], offset_unit[2 * FRAGMENTS];
    LB_METHOD RowScales(const Form& form, const uint8_t* scales, int64_t first, int64_t rows) {
#pragma unroll
        for (int h = 0; h < 2 * FRAGMENTS; ++h) {
            const int64_t r = first + 8 * h;
            row[h] = r < rows ? scales + r * form.scales_stride : nullptr;
            unit[h] = r < rows && SQUARE ? power(row[h][0]) * form.unit : form.unit;
            offset_unit[h] = r < rows && AFFINE ? power(row[h][1]) : 0.0f;
        }
    }
    LB_METHOD Scale of(const Form& form, int h, int64_t element) const {
        if (!row[h] || element >= form.length) return {0.0f, 0.0f};
        const int64_t b = block_of(element);
        if (!SQUARE) return {((const float*)row[h])[b] * unit[h], 0.0f};
        const uint8_t* codes = row[h] + (AFFINE ? 2 : 1) + b;
        const float scale = square_scale((float)codes[0], unit[h]);
        if (!AFFINE) return {scale, 0.0f};
        return {scale, square_offset((float)(int8_t)codes[blocks_of(form)], offset_unit[h])};
    }
};
constexpr int FLUSH = BLOCK == 0 ? 0 : (BLOCK < TILE_K ? BLOCK : TILE_K) / SPAN;  // spans that are summed together
constexpr int FLUSHES = BLOCK == 0 ? 1 : SPANS / (FLUSH ? FLUSH : 1);            // of a step; of 8 bits the end has one

struct Sums {
    float total[FRAGMENTS][J][4], block[FRAGMENTS][J][4], of_x[J][4];
    LB_METHOD void add_block(const Scale (&scale)[2 * FRAGMENTS]) {
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int i = 0; i < FRAGMENTS; ++i) {
                    const Scale s = scale[2 * i + c / 2];
                    total[i][j][c] = fused(s.scale, block[i][j][c], total[i][j][c]);
                    if (AFFINE) total[i][j][c] = fused(s.offset, of_x[j][c], total[i][j][c]);
                    block[i][j][c] = 0.0f;
                }
                of_x[j][c] = 0.0f;
            }
    }
};

// ---- the product

// x [M][x_stride], zeros from K on; x_stride: a multiple of 8. Grid: tiles of the weight's rows, parts of K, each of
// `steps`. work: [parts][M][N], or null where there is one part. Dynamic shared memory: the table, STAGES stages.
extern "C" __global__ void __launch_bounds__(THREADS) lowbit_gemv(
    const ELEMENT* x, int64_t x_stride, const uint8_t* packed, const uint8_t* scales, const __grid_constant__ Form form,
    int64_t M, int64_t N, int64_t steps, const BIAS* bias, float* work, ELEMENT* out) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint32_t* table = (uint32_t*)memory;
    uint4* ring = (uint4*)(memory + ENTRIES * 32 * 4);
    const int64_t tile_row = (int64_t)blockIdx.x * TILE_N, all_steps = ceil_div(form.length, TILE_K);
    const int64_t first_step = blockIdx.y * steps, last_step = min(all_steps, first_step + steps);

    const auto start_step = [&](int64_t step, int stage) {
        uint4* to = ring + stage * STAGE_CHUNKS;
        const int64_t low = low_width(form), column = step * (LOW_CHUNKS * CHUNK);
        start_plane<LOW_CHUNKS>(packed, form.packed_stride, tile_row, N, 0, low, column, to, low_place);
        to += TILE_N * LOW_CHUNKS;
        if constexpr (BITS == 3) {
            start_plane<HIGH_CHUNKS>(packed, form.packed_stride, tile_row, N, low, ceil_div(form.length, 8),
                                     step * CHUNK, to, [](int r, int) { return r; });
            to += TILE_N;
        }
#pragma unroll
        for (int i = threadIdx.x; i < COLUMNS * X_CHUNKS; i += THREADS) {
            const int r = i / X_CHUNKS, c = i % X_CHUNKS;
            const int64_t k = step * TILE_K + c * 8;
            start_copy(to + x_place(r, c), x + r * x_stride + k, r < M && k < x_stride);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (first_step + s < last_step) start_step(first_step + s, s);
        close_group();
    }
    fill_table(form, table);
    table += lane;
    const int row = warp * 16 * FRAGMENTS + g;
    const RowScales row_scales(form, scales, tile_row + row, N);
    const uint32_t one = narrow<ELEMENT>(1.0f).bits, ones[4] = {one * 65537, one * 65537, one * 65537, one * 65537};
    Sums sums = {};
    int full = 0, empty = STAGES - 1;  // the stage that is multiplied next, and the one that is filled next
    for (int64_t step = first_step; step < last_step; ++step) {
        Scale scale[FLUSHES][2 * FRAGMENTS];
        if (BLOCK)
#pragma unroll
            for (int f = 0; f < FLUSHES; ++f)
#pragma unroll
                for (int h = 0; h < 2 * FRAGMENTS; ++h)
                    scale[f][h] = row_scales.of(form, h, step * TILE_K + f * FLUSH * SPAN);
        wait_for_all_but<STAGES - 2>();
        __syncthreads();  // everyone's copies into `full` have arrived, and everyone has read `empty`
        if (step + STAGES - 1 < last_step) start_step(step + STAGES - 1, empty);
        close_group();  // with nothing in it at the end, so that the count above stays right
        const uint4* low = ring + full * STAGE_CHUNKS;
        const uint4 *high = low + TILE_N * LOW_CHUNKS, *of_x = high + TILE_N * HIGH_CHUNKS;
#pragma unroll
        for (int s = 0; s < SPANS; ++s) {
            uint32_t b[J][2][2];
#pragma unroll
            for (int j = 0; j < J; ++j) {
                const uint4 eight = of_x[x_place(8 * j + g, 4 * s + t)];
                b[j][0][0] = eight.x, b[j][0][1] = eight.y, b[j][1][0] = eight.z, b[j][1][1] = eight.w;
            }
#pragma unroll
            for (int i = 0; i < FRAGMENTS; ++i) {
                uint32_t pair[2][4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = row + 16 * i + 8 * h, byte = (s * 4 + t) * UNIT_BYTES;
                    const uint8_t* from = (const uint8_t*)(low + low_place(r, byte / CHUNK)) + byte % CHUNK;
                    decode_unit(from, (const uint8_t*)(high + r) + s * 4 + t, table, pair[h]);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t a[4] = {pair[0][2 * half], pair[1][2 * half], pair[0][2 * half + 1],
                                           pair[1][2 * half + 1]};
#pragma unroll
                    for (int j = 0; j < J; ++j) {
                        multiply_add(sums.block[i][j], a, b[j][half], ELEMENT());
                        if (AFFINE && i == 0) multiply_add(sums.of_x[j], ones, b[j][half], ELEMENT());
                    }
                }
            }
            if (FLUSH && (s + 1) % (FLUSH ? FLUSH : 1) == 0) sums.add_block(scale[s / (FLUSH ? FLUSH : 1)]);
        }
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
    }
    if (!BLOCK) {
        Scale scale[2 * FRAGMENTS];
#pragma unroll
        for (int h = 0; h < 2 * FRAGMENTS; ++h) scale[h] = row_scales.of(form, h, 0);
        sums.add_block(scale);
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int64_t n = tile_row + row + 16 * i + c / 2 * 8, m = 8 * j + 2 * t + c % 2;
                if (n >= N || m >= M) continue;
                const float sum = sums.total[i][j][c];
                if (work) work[(blockIdx.y * M + m) * N + n] = sum;
                else out[m * N + n] = narrow<ELEMENT>(bias ? sum + widen(bias[n]) : sum);
            }
}
