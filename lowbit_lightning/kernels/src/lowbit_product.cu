// Products of many rows of 16-bit x with a low-bit weight, on tensor cores:
//     out [M][N] = x [M][K] @ weight [N][K]^T (+ bias), or, TRANSPOSED, out [M][K] = x [M][N] @ weight [N][K].
// The weight is decoded to ELEMENT, exactly as when it is dequantised, on its way into shared memory, a tile for each
// CUDA block; a decoded weight is never in global memory.
//
// Specialised by macros: ELEMENT (Half, BFloat16), BIAS (float, Half, BFloat16: of the bias), TRANSPOSED, TILE_M (64
// or 128 rows of x in a tile), STAGES (of x), and those of lowbit_units.h.
//
// A CUDA block computes TILE_M x 128 of the result, a warp a half by a quarter of that, in steps of 64 along the sum.
// In a step every thread decodes 4 units for the next step, which it loaded the step before, loads 4 more, and
// multiplies. x comes in a ring of STAGES by asynchronous copies. Where there are few tiles, the sum is cut into
// parts (`work`).
//
// Banks. Rows of a tile are 8 or 16 chunks of 16 bytes, and chunk c of row r lies at c ^ (r % 8): those that a warp
// reads or writes together, a chunk of 8 rows or 8 chunks of a row, lie in different banks.
#include "lowbit_units.h"
#include "tensor_core.h"
#include "lowbit_copies.h"
#include "lowbit_parts.h"

constexpr int TILE_O = 128, STEP = 64, THREADS = 256;
constexpr int WARPS_M = 2, WARP_M = TILE_M / WARPS_M, WARP_O = TILE_O / 4;
constexpr int OF_X = WARP_M / 16, OF_W = WARP_O / 8;  // fragments of a warp
constexpr int X_CHUNKS = STEP / 8, STAGE_CHUNKS = TILE_M * X_CHUNKS;
constexpr int W_ROWS = TRANSPOSED ? STEP : TILE_O, W_CHUNKS = (TRANSPOSED ? TILE_O : STEP) / UNIT;
constexpr int PIECES = W_ROWS * W_CHUNKS / THREADS, DECODED_CHUNKS = W_ROWS * W_CHUNKS;

LB_FN int x_place(int r, int c) { return r * X_CHUNKS + (c ^ r % 8); }
LB_FN int w_place(int r, int c) { return r * W_CHUNKS + (c ^ r % 8); }

// ---- the weight

struct Piece { Unit unit; Scale scale; };  // zeros where there is none
struct Weight {
    const uint8_t *packed, *scales;
    uint32_t packed_stride, scales_stride;
    int rows, length;
    bool packets;
    // This thread's pieces of the tile whose first element is in that row and column.
    LB_METHOD void load(const Form& form, int row, int column, Piece (&pieces)[PIECES]) const {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int place = threadIdx.x + p * THREADS;
            const int r = row + place / W_CHUNKS, k = column + place % W_CHUNKS * UNIT;
            pieces[p] = {};
            if (r >= rows || k >= length) continue;
            pieces[p].unit = load_unit(form, packed + (uint64_t)r * packed_stride, k / UNIT, packets);
            pieces[p].scale = load_scale(form, scales + (uint64_t)r * scales_stride, block_of(k));
        }
    }
};
LB_FN void decode(const Values& values, const Piece (&pieces)[PIECES], uint4* to) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int place = threadIdx.x + p * THREADS;
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = decoded(values, pieces[p].unit, 2 * i, pieces[p].scale);
            const float high = decoded(values, pieces[p].unit, 2 * i + 1, pieces[p].scale);
            word[i] = narrow_pair(low, high, ELEMENT());
        }
        to[w_place(place / W_CHUNKS, place % W_CHUNKS)] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// ---- the product

// x: rows `row` on of the stage; w: outputs `column` on of the decoded tile
LB_FN void multiply_stage(const uint4* x, int row, const uint4* w, int column, float (&sums)[OF_X][OF_W][4]) {
    const int lane = threadIdx.x % 32, r = lane % 8, second = lane / 8 % 2, later = lane / 16;
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        uint32_t a[OF_X][4], b[OF_W][2];
#pragma unroll
        for (int i = 0; i < OF_X; ++i)
            load_matrices((const int8_t*)(x + x_place(row + 16 * i + 8 * second + r, 2 * k + later)), a[i]);
#pragma unroll
        for (int j = 0; j < OF_W; j += 2) {
            uint32_t pair[4];
#if TRANSPOSED
            const uint4* from = w + w_place(16 * k + 8 * second + r, column / 8 + j + later);
            load_matrices_transposed((const int8_t*)from, pair);
#else
            const uint4* from = w + w_place(column + 8 * (j + later) + r, 2 * k + second);
            load_matrices((const int8_t*)from, pair);
#endif
            b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < OF_X; ++i)
#pragma unroll
            for (int j = 0; j < OF_W; ++j) multiply_add(sums[i][j], a[i], b[j], ELEMENT());
    }
}

// Grid: tiles of the result, those of the same outputs side by side; parts of the sum, each of `steps`. x
// [M][x_stride], zeros after its columns; x_stride: a multiple of 8. outputs: columns of the result. work:
// [parts][M][outputs], or null where there is one part. Dynamic shared memory: two decoded tiles, STAGES stages.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lowbit_product(
    const ELEMENT* x, int64_t x_stride, const uint8_t* packed, const uint8_t* scales, const __grid_constant__ Form form,
    int64_t M, int64_t rows, int64_t steps, const BIAS* bias, float* work, ELEMENT* out) {
    extern __shared__ __align__(128) uint4 tiles[];
    uint4 *decoded_tiles = tiles, *ring = tiles + 2 * DECODED_CHUNKS;
    const Values values(form);
    const Weight weight{packed, scales, (uint32_t)form.packed_stride, (uint32_t)form.scales_stride, (int)rows,
                        (int)form.length, has_packets(form, packed)};
    const int64_t outputs = TRANSPOSED ? form.length : rows, length = TRANSPOSED ? rows : form.length;
    const uint32_t tiles_m = (uint32_t)ceil_div(M, TILE_M);
    const int64_t tile_m = (int64_t)(blockIdx.x % tiles_m) * TILE_M, tile_o = (int64_t)(blockIdx.x / tiles_m) * TILE_O;
    const int first_step = (int)(blockIdx.y * steps);
    const int last_step = (int)min(ceil_div(length, STEP), first_step + steps);

    const auto load_weight = [&](int step, Piece (&pieces)[PIECES]) {
        weight.load(form, TRANSPOSED ? step * STEP : (int)tile_o, TRANSPOSED ? (int)tile_o : step * STEP, pieces);
    };
    const int x_bytes = (int)x_stride * 2;
    Copies<THREADS, TILE_M, X_CHUNKS> of_x(x, x_bytes, tile_m, M, x_bytes, first_step * STEP * 2, x_place);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (first_step + s < last_step) of_x.template start<true>(ring + s * STAGE_CHUNKS);
        close_group();
    }
    Piece pieces[PIECES];
    load_weight(first_step, pieces);
    decode(values, pieces, decoded_tiles);
    load_weight(first_step + 1, pieces);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % WARPS_M * WARP_M, column = warp / WARPS_M * WARP_O;
    float sums[OF_X][OF_W][4] = {};
    int full = 0, empty = STAGES - 1;  // the stage that is multiplied next, and the one that is filled next
    for (int step = first_step; step < last_step; ++step) {
        const int turn = (step - first_step) % 2;
        wait_for_all_but<STAGES - 2>();
        __syncthreads();  // what this step reads has arrived and was decoded, and everyone has read what it overwrites
        if (step + STAGES - 1 < last_step) of_x.template start<true>(ring + empty * STAGE_CHUNKS);
        close_group();  // with nothing in it at the end, so that the count above stays right
        if (step + 1 < last_step) {
            decode(values, pieces, decoded_tiles + (1 - turn) * DECODED_CHUNKS);
            load_weight(step + 2, pieces);
        }
        multiply_stage(ring + full * STAGE_CHUNKS, row, decoded_tiles + turn * DECODED_CHUNKS, column, sums);
        full = full + 1 == STAGES ? 0 : full + 1;
        empty = empty + 1 == STAGES ? 0 : empty + 1;
    }

    const bool pairs = outputs % 2 == 0 && (uint64_t)out % 4 == 0;
#pragma unroll
    for (int i = 0; i < OF_X; ++i)
#pragma unroll
        for (int j = 0; j < OF_W; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int64_t m = tile_m + row + 16 * i + 8 * h + lane / 4, n = tile_o + column + 8 * j + lane % 4 * 2;
                if (m >= M || n >= outputs) continue;
                float v[2] = {sums[i][j][2 * h], sums[i][j][2 * h + 1]};
                if (work) {
                    float* to = work + (blockIdx.y * M + m) * outputs + n;
                    to[0] = v[0];
                    if (n + 1 < outputs) to[1] = v[1];
                    continue;
                }
                if (bias) {
                    v[0] += widen(bias[n]);
                    if (n + 1 < outputs) v[1] += widen(bias[n + 1]);
                }
                ELEMENT* to = out + m * outputs + n;
                if (pairs) *(uint32_t*)to = narrow_pair(v[0], v[1], ELEMENT());
                else {
                    to[0] = narrow<ELEMENT>(v[0]);
                    if (n + 1 < outputs) to[1] = narrow<ELEMENT>(v[1]);
                }
            }
}
