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
#include "lowbit_pairs.h"
#include "lowbit_copies.h"
#include "lowbit_parts.h"

constexpr int TILE_N = 128, TILE_K = 128, SPAN = 32, SPANS = TILE_K / SPAN;
constexpr int J = COLUMNS / 8, FRAGMENTS = J == 1 || !AFFINE ? 2 : 1;  // of x, of the weight: to a warp
constexpr int THREADS = 32 * TILE_N / (16 * FRAGMENTS);
constexpr int LOW_CHUNKS = TILE_K / UNIT * UNIT_BYTES / CHUNK, HIGH_CHUNKS = BITS == 3 ? 1 : 0, X_CHUNKS = TILE_K / 8;
constexpr int STAGE_CHUNKS = TILE_N * (LOW_CHUNKS + HIGH_CHUNKS) + COLUMNS * X_CHUNKS;

// Where chunk c of row r lies. A warp reads 8 rows at a time, of each a span's part; these parts fall into different
// banks. 8 rows further on the order is the same.
LB_FN int low_place(int r, int c) {
    const int turn = LOW_CHUNKS == 8 ? r % 4 * 2 : LOW_CHUNKS == 4 ? r / 2 % 4 : r / 4 % 2;
    return r * LOW_CHUNKS + (c ^ turn);
}
LB_FN int x_place(int r, int c) { return r * X_CHUNKS + (c ^ r % 2 * 4); }

// ---- codes to pairs of ELEMENT

#if AFFINE  // values are codes, less a half of the largest: by arithmetic

// A pair is elements i and i + 4, whose codes are moved 16 bits apart into the mantissas of powers of two: 64, where
// bit 4 stands for 1, or 16, where bit 3 does.
LB_FN void decode_unit(const uint8_t* low, const uint8_t* high, SharedPlace, uint32_t (&pair)[4]) {
    constexpr int ONE = is_half(ELEMENT{}) ? 4 : 3;
    constexpr uint32_t POWER = ONE == 4 ? 0x54005400 : 0x41804180, PLANE = (BITS == 4 ? 15 : 3) * 65537;
    constexpr uint32_t MIDDLE = POWER + ((1u << BITS) - 1) * (65537u << (ONE - 1));
    const uint32_t codes = BITS == 4 ? *(const uint32_t*)low : __byte_perm(*(const uint16_t*)low, 0, 0x4140);
    const uint32_t above = BITS == 3 ? *high * 0x100001u : 0;  // of elements 0 to 3 from bit 7 down, 4 to 7 from bit 23
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int place = BITS == 4 ? i / 2 * 8 + 4 - i % 2 * 4 : 6 - 2 * i;
        uint32_t bits = (moved(codes, place, ONE) & PLANE << ONE) | POWER;
        if (BITS == 3) bits |= moved(above, 7 - i, ONE + 2) & 65537u << (ONE + 2);
        pair[i] = subtract_pairs(bits, MIDDLE, ELEMENT());
    }
}
// The same pairs of x.
LB_FN void pairs_of_x(const uint4& eight, uint32_t (&pair)[4]) {
    pair[0] = __byte_perm(eight.x, eight.z, 0x5410), pair[1] = __byte_perm(eight.x, eight.z, 0x7632);
    pair[2] = __byte_perm(eight.y, eight.w, 0x5410), pair[3] = __byte_perm(eight.y, eight.w, 0x7632);
}

#else

LB_FN void decode_unit(const uint8_t* low, const uint8_t*, SharedPlace column, uint32_t (&pair)[4]) {
#if BITS == 8
    const uint2 words = *(const uint2*)low;
    convert_pairs(words.x, words.y, pair);
#else
    look_up_pairs(*(const uint32_t*)low, column, pair);
#endif
}
LB_FN void pairs_of_x(const uint4& eight, uint32_t (&pair)[4]) {
    pair[0] = eight.x, pair[1] = eight.y, pair[2] = eight.z, pair[3] = eight.w;
}

#endif

// ---- scales

constexpr int FLUSH = BLOCK == 0 ? 0 : (BLOCK < TILE_K ? BLOCK : TILE_K) / SPAN;  // spans that are summed together
constexpr int FLUSHES = BLOCK == 0 ? 1 : SPANS / (FLUSH ? FLUSH : 1);            // of a step; of 8 bits the end has one

// Scales of the rows that a lane has: rows 8h + lane / 4 of each of its fragments, h up to ROWS. What is not there has
// those of the last row or block: it is multiplied by zeros, or not kept. The four lanes that have the same rows load
// a quarter of a step's scales each, and give them to the others.
constexpr int ROWS = 2 * FRAGMENTS, SHARERS = ROWS * FLUSHES >= 4 ? 4 : 1, OWN = ROWS * FLUSHES / SHARERS;

struct RowScales {
    const uint8_t* row[OWN];  // of the scales that this lane decodes
    float unit[ROWS], offset_unit[ROWS];
    int blocks;
    LB_FN int number(int i) { return i * SHARERS + (int)threadIdx.x % SHARERS; }  // of a step: [row][flush]
    LB_METHOD RowScales(const Form& form, const uint8_t* scales, int64_t first, int64_t rows)
        : blocks((int)blocks_of(form)) {
#pragma unroll
        for (int h = 0; h < ROWS; ++h) {
            const uint8_t* from = scales + min(first + 8 * h, rows - 1) * form.scales_stride;
            unit[h] = SQUARE ? power(from[0]) * form.unit : form.unit;
            offset_unit[h] = AFFINE ? power(from[1]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            row[i] = scales + min(first + 8 * (number(i) / FLUSHES), rows - 1) * form.scales_stride + SQUARE + AFFINE;
    }
    // Those of the step whose first block is that, in the rows' units.
    LB_METHOD void load(int block, Scale (&own)[OWN]) const {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int b = min(block + number(i) % FLUSHES, blocks - 1);
            if (!SQUARE) own[i] = {((const float*)row[i])[b], 0.0f};
            else own[i].scale = square_scale((float)row[i][b], 1.0f);
            if (AFFINE) own[i].offset = square_offset((float)(int8_t)row[i][blocks + b], 1.0f);
        }
    }
    LB_METHOD Scale of(const Scale (&own)[OWN], int h, int flush) const {
        const int n = h * FLUSHES + flush;
        if (SHARERS == 1) return own[n];
        const int lane = (threadIdx.x & ~3) | n % SHARERS;
        const float scale = __shfl_sync(ALL_LANES, own[n / SHARERS].scale, lane);
        return {scale, AFFINE ? __shfl_sync(ALL_LANES, own[n / SHARERS].offset, lane) : 0.0f};
    }
};

struct Sums {
    float total[FRAGMENTS][J][4], of_offsets[FRAGMENTS][J][4];  // in the rows' units
    float block[FRAGMENTS][J][4], of_x[J][4];
    LB_METHOD void add_block(const RowScales& rows, const Scale (&own)[OWN], int flush) {
        Scale scale[ROWS];
#pragma unroll
        for (int h = 0; h < ROWS; ++h) scale[h] = rows.of(own, h, flush);
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int i = 0; i < FRAGMENTS; ++i) {
                    const Scale s = scale[2 * i + c / 2];
                    total[i][j][c] = fused(s.scale, block[i][j][c], total[i][j][c]);
                    if (AFFINE) of_offsets[i][j][c] = fused(s.offset, of_x[j][c], of_offsets[i][j][c]);
                    block[i][j][c] = 0.0f;
                }
                of_x[j][c] = 0.0f;
            }
    }
};

// ---- the product

// x [M][x_stride], zeros from K on; x_stride: a multiple of 8. Grid: tiles of the weight's rows, parts of K, each of
// `steps`. work: [parts][M][N], or null where there is one part. Dynamic shared memory: the table, STAGES stages.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lowbit_gemv(
    const ELEMENT* x, int64_t x_stride, const uint8_t* packed, const uint8_t* scales, const __grid_constant__ Form form,
    int64_t M, int64_t N, int64_t steps, const BIAS* bias, float* work, ELEMENT* out) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint4* ring = (uint4*)(memory + ENTRIES * 32 * 4);
    const int64_t tile_row = (int64_t)blockIdx.x * TILE_N, all_steps = ceil_div(form.length, TILE_K);
    const int first_step = (int)(blockIdx.y * steps), count = (int)(min(all_steps, first_step + steps) - first_step);

    const int low_bytes = (int)low_width(form), high_bytes = (int)ceil_div(form.length, 8);
    Copies<THREADS, TILE_N, LOW_CHUNKS> low(packed, form.packed_stride, tile_row, N, low_bytes,
                                   first_step * (LOW_CHUNKS * CHUNK), low_place);
#if BITS == 3
    Copies<THREADS, TILE_N, HIGH_CHUNKS> high(packed + low_bytes, form.packed_stride, tile_row, N, high_bytes,
                                     first_step * CHUNK, [](int r, int) { return r; });
#endif
    Copies<THREADS, COLUMNS, X_CHUNKS> of_x(x, x_stride * 2, 0, M, (int)x_stride * 2, first_step * TILE_K * 2, x_place);
    const auto start_step = [&](int stage) {
        uint4* to = ring + stage * STAGE_CHUNKS;
        low.template start<PACKETS>(to);
#if BITS == 3
        high.template start<PACKETS>(to + TILE_N * LOW_CHUNKS);
#endif
        of_x.template start<true>(to + TILE_N * (LOW_CHUNKS + HIGH_CHUNKS));
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < count) start_step(s);
        close_group();
    }
    fill_table<THREADS>(form, (uint32_t*)memory);
    const int row = warp * 16 * FRAGMENTS + g;
    const RowScales row_scales(form, scales, tile_row + row, N);
    const uint32_t one = narrow<ELEMENT>(1.0f).bits, ones[4] = {one * 65537, one * 65537, one * 65537, one * 65537};
    // Where this lane's parts of each span lie in a stage, in bytes. Up to 8 rows of x, lanes of rows that do not exist
    // read the last one, at no cost: their sums are not kept.
    const int x_row = J == 1 ? min(g, (int)M - 1) : g;
    int low_at[SPANS], x_at[SPANS];
#pragma unroll
    for (int s = 0; s < SPANS; ++s) {
        const int byte = (s * 4 + t) * UNIT_BYTES;
        low_at[s] = low_place(row, byte / CHUNK) * CHUNK + byte % CHUNK;
        x_at[s] = (TILE_N * (LOW_CHUNKS + HIGH_CHUNKS) + x_place(x_row, 4 * s + t)) * CHUNK;
    }
    const int high_at = (TILE_N * LOW_CHUNKS + row) * CHUNK + t;
    const SharedPlace column(memory + 4 * lane);
    Sums sums = {};
    int full = 0, empty = STAGES - 1;  // the stage that is multiplied next, and the one that is filled next
    for (int step = 0; step < count; ++step) {
        Scale own[OWN];
        if (BLOCK) row_scales.load((int)block_of((first_step + step) * TILE_K), own);
        wait_for_all_but<STAGES - 2>();
        __syncthreads();  // everyone's copies into `full` have arrived, and everyone has read `empty`
        if (step + STAGES - 1 < count) start_step(empty);
        close_group();  // with nothing in it at the end, so that the count above stays right
        const uint8_t* stage = (const uint8_t*)(ring + full * STAGE_CHUNKS);
#pragma unroll
        for (int s = 0; s < SPANS; ++s) {
            uint32_t b[J][2][2];
#pragma unroll
            for (int j = 0; j < J; ++j) {
                const uint4 eight = *(const uint4*)(stage + x_at[s] + j * 8 * X_CHUNKS * CHUNK);
                uint32_t pair[4];
                pairs_of_x(eight, pair);
                b[j][0][0] = pair[0], b[j][0][1] = pair[1], b[j][1][0] = pair[2], b[j][1][1] = pair[3];
            }
#pragma unroll
            for (int i = 0; i < FRAGMENTS; ++i) {
                uint32_t pair[2][4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int down = (16 * i + 8 * h) * CHUNK;
                    decode_unit(stage + low_at[s] + down * LOW_CHUNKS, stage + high_at + s * 4 + down,
                                column, pair[h]);
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
            if (FLUSH && (s + 1) % (FLUSH ? FLUSH : 1) == 0) sums.add_block(row_scales, own, s / (FLUSH ? FLUSH : 1));
        }
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
    }
    if (!BLOCK) {
        Scale own[OWN];
        row_scales.load(0, own);
        sums.add_block(row_scales, own, 0);
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int64_t n = tile_row + row + 16 * i + c / 2 * 8, m = 8 * j + 2 * t + c % 2;
                if (n >= N || m >= M) continue;
                const int h = 2 * i + c / 2;
                float sum = sums.total[i][j][c] * row_scales.unit[h];
                if (AFFINE) sum = fused(sums.of_offsets[i][j][c], row_scales.offset_unit[h], sum);
                if (work) work[(blockIdx.y * M + m) * N + n] = sum;
                else out[m * N + n] = narrow<ELEMENT>(bias ? sum + widen(bias[n]) : sum);
            }
}
