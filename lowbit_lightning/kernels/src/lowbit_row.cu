// out [N] = x [K] @ weight [N][K]^T (+ bias) for a low-bit weight and one row of 16-bit x: what generating a token of
// one sequence takes. The weight is read once, from global memory into registers, and is the A of tensor cores.
//
// Specialised by macros: ELEMENT (Half, BFloat16), BIAS (float, Half, BFloat16: of the bias), PACKETS (rows of the
// packed weight begin at multiples of 16 bytes, and so do their planes), and those of lowbit_units.h.
//
// Several sums at a time. B has eight columns, and x is one row. So each column gets the part of x that belongs to one
// *piece* of the weight's row (32 elements, which are of one block; 16 of 8 bits), and zeros for other pieces. Then the
// sums of four or eight pieces come out side by side, and a lane gets those of the pieces that it has read itself. It
// multiplies them by their scales and adds them up: nothing is passed between lanes until the end.
//
// Codes of affine formats are moved into the mantissas of powers of two, 4 to 64 where one code is 1. The powers stay
// in the products: another product of the tensor cores finds what they add up to, and the sum of x, which offsets and
// the middle code need. The sums are float32 and the powers at most 14 times a typical value of a code, so four bits
// are lost of 24. What is rounded to ELEMENT is a table's value, in a unit that suits it, and nothing else.
//
// A CUDA block has 32 rows and a part of K; its warps take turns along K. Memory is what such a product waits for, so a
// warp has asked for its next turn when it multiplies, and asks for the one after that as soon as registers are free.
#include "lowbit_pairs.h"
#include "lowbit_parts.h"

constexpr int WARPS = 8, THREADS = 32 * WARPS, TILE_N = 32, ROWS = 4;  // of the weight, of a lane: g + 8h
constexpr int PIECE = BITS == 8 ? 16 : 32, PIECES = BITS < 4 ? 2 : 1;  // in a turn a lane has 16 bytes of a row
constexpr int TURN = 4 * PIECES * PIECE, X_CHUNKS = PIECE / 8;         // of a piece, of 16 bytes
constexpr int GROUP = BITS < 4 ? 16 : 8, PAIRS = GROUP / 2;            // elements that are decoded together
// Columns of a lane, and scales of a row: pieces of one block share a column.
constexpr int COLUMNS = PIECES == 2 && BLOCK && BLOCK < 2 * PIECE ? 2 : 1;

// ---- codes to pairs of ELEMENT

// The bit of a mantissa where the code of a group's pair i ends up, and the value of the power that is in its place.
LB_FN constexpr int place_of(int i) {
    return BITS == 4 ? (is_half(ELEMENT{}) ? 4 : 3)
                     : (is_half(ELEMENT{}) ? 8 : 5) - (BITS == 3) - i % 2 * 2;
}
LB_FN constexpr uint32_t power_of(int i) {  // twice
    return (is_half(ELEMENT{}) ? 25 - place_of(i) << 10 : 134 - place_of(i) << 7) * 65537u;
}

struct Codes {
    uint4 low;
    uint2 high;  // of 3 bits
    LB_METHOD uint32_t word(int n) const { return n == 0 ? low.x : n == 1 ? low.y : n == 2 ? low.z : low.w; }
    // Group n of piece q. A pair is elements i and i + GROUP / 2 if AFFINE, otherwise neighbours.
    LB_METHOD void decode(int q, int n, SharedPlace column, uint32_t (&pair)[PAIRS]) const {
#if AFFINE
        const uint32_t codes = word(2 * q + n);
        const uint32_t above = BITS == 3 ? __byte_perm(q ? high.y : high.x, 0, n ? 0x4342 : 0x4140) : 0;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int to = place_of(i), even = place_of(i & ~1);  // two pairs of 2 bits are moved together
            const int from = BITS == 4 ? i / 2 * 8 + 4 - i % 2 * 4 : i / 4 * 8 + 6 - (i & 2) * 2;
            const uint32_t mask = (BITS == 4 ? 15 : 3) * 65537u;
            pair[i] = insert_bits(moved(codes, from, BITS == 4 ? to : even), mask << to, power_of(i));
            if (BITS == 3) pair[i] = insert_bits(moved(above, 7 - i, to + 2), 65537u << (to + 2), pair[i]);
        }
#elif BITS == 8
        convert_pairs(word(2 * n), word(2 * n + 1), pair);
#else
        look_up_pairs(word(n), column, pair);
#endif
    }
};

// 16 or 8 bytes that are read once.
LB_FN void load_once(const uint8_t* from, uint4* to) {
#ifdef __CUDA_ARCH__
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to->x), "=r"(to->y), "=r"(to->z), "=r"(to->w) : "l"(from));
#else
    *to = *(const uint4*)from;
#endif
}
LB_FN void load_once(const uint8_t* from, uint2* to) {
#ifdef __CUDA_ARCH__
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to->x), "=r"(to->y) : "l"(from));
#else
    *to = *(const uint2*)from;
#endif
}
// Those of which the first `left` exist; the others become zero. Of PACKETS they exist whole or not at all.
template <class Chunk> LB_FN void load_existing(const uint8_t* from, int left, Chunk* to) {
    *to = {};
    if (PACKETS) {
        if (left > 0) load_once(from, to);
        return;
    }
    uint32_t word[sizeof(Chunk) / 4] = {};
#pragma unroll
    for (int i = 0; i < (int)sizeof(Chunk); ++i)
        if (i < left) word[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
    memcpy(to, word, sizeof(Chunk));
}

// ---- the rows of a lane

struct Scales {
    float scale[ROWS][COLUMNS];  // float32
    uint8_t root[ROWS][COLUMNS];  // or codes
    int8_t offset_root[ROWS][COLUMNS];
};

struct Rows {
    const uint8_t *codes, *scales;              // of the first row of the CUDA block
    uint32_t codes_at[ROWS], scales_at[ROWS];  // where the lane's rows begin, in bytes from there
    int low_bytes, high_bytes, blocks;
    LB_METHOD Rows(const Form& form, const uint8_t* packed, const uint8_t* scales_of_all, int64_t first, int64_t count)
        : codes(packed + first * form.packed_stride),
          scales(scales_of_all + first * form.scales_stride),
          low_bytes((int)low_width(form)),
          high_bytes((int)ceil_div(form.length, 8)),
          blocks((int)blocks_of(form)) {
#pragma unroll
        for (int h = 0; h < ROWS; ++h) {  // rows that do not exist are the last one: their sums are not kept
            const uint32_t row = (uint32_t)min((int64_t)(threadIdx.x % 32 / 4 + 8 * h), count - 1 - first);
            codes_at[h] = row * (uint32_t)form.packed_stride;
            scales_at[h] = row * (uint32_t)form.scales_stride;
        }
    }
    // Of turn `turn` along the whole of K.
    LB_METHOD void load(int turn, Codes (&to)[ROWS]) const {
        const int t = threadIdx.x % 4, low = (turn * 4 + t) * 16, high = (turn * 4 + t) * 8;
#pragma unroll
        for (int h = 0; h < ROWS; ++h) {
            load_existing(codes + (codes_at[h] + low), low_bytes - low, &to[h].low);
            if (BITS == 3) load_existing(codes + (codes_at[h] + low_bytes + high), high_bytes - high, &to[h].high);
        }
    }
    LB_METHOD void load(int turn, Scales& to) const {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const uint32_t first = turn * TURN + (threadIdx.x % 4 * PIECES + c) * PIECE;
            const uint32_t b = min(block_of(first), (uint32_t)blocks - 1);
#pragma unroll
            for (int h = 0; h < ROWS; ++h) {
                if (!SQUARE) to.scale[h][c] = *(const float*)(scales + (scales_at[h] + 4 * b));
                else to.root[h][c] = scales[scales_at[h] + (1 + AFFINE + b)];
                if (AFFINE) to.offset_root[h][c] = (int8_t)scales[scales_at[h] + (2 + blocks + b)];
            }
        }
    }
};

struct Sums {
    float total[ROWS], of_offsets[ROWS];  // in the rows' units
    float turn[ROWS / 2][4];              // of two rows, each with two columns
    float of_x[4];  // of x in both columns; of what stands for it because of the powers
    LB_METHOD void add_turn(const Scales& scales) {
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q) {
            constexpr float MIDDLE = ((1 << BITS) - 1) * 0.5f;
            const float beside = AFFINE ? fused(MIDDLE, of_x[q], of_x[2 + q]) : 0.0f;
#pragma unroll
            for (int h = 0; h < ROWS; ++h) {
                const float sum = AFFINE ? turn[h / 2][h % 2 * 2 + q] - beside : turn[h / 2][h % 2 * 2 + q];
                const float scale = SQUARE ? square_scale((float)scales.root[h][q], 1.0f) : scales.scale[h][q];
                total[h] = fused(scale, sum, total[h]);
                if (!AFFINE) continue;
                const float offset = square_offset((float)scales.offset_root[h][q], 1.0f);
                of_offsets[h] = fused(offset, of_x[q], of_offsets[h]);
            }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) turn[0][c] = turn[1][c] = of_x[c] = 0.0f;
    }
    LB_METHOD float of_row(const Form& form, const uint8_t* scales, int h) const {
        if (!BLOCK) return turn[h / 2][h % 2 * 2] * *(const float*)scales * form.unit;
        const float sum = total[h] * (SQUARE ? power(scales[0]) * form.unit : form.unit);
        return AFFINE ? fused(of_offsets[h], power(scales[1]), sum) : sum;
    }
};

// ---- x

// Elements `first` on of x into shared memory, zeros from K on; if AFFINE the halves of a group in turns.
LB_FN void load_x(const ELEMENT* x, int64_t first, int64_t length, int count, uint4* to) {
    for (int n = threadIdx.x; n < count / 8; n += THREADS) {
        const int64_t at = first + (AFFINE ? n * 8 / GROUP * GROUP + n * 8 % GROUP / 2 : n * 8);
        uint32_t half[2][2] = {};  // of eight elements
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t from = at + h * (AFFINE ? PAIRS : 4);
            if (from >= length) continue;
            const uint2 four = *(const uint2*)(x + from);
            half[h][0] = four.x, half[h][1] = four.y;
        }
        const auto both = [&](int i, uint32_t which) LB_LAMBDA { return __byte_perm(half[0][i], half[1][i], which); };
        to[n] = AFFINE ? make_uint4(both(0, 0x5410), both(0, 0x7632), both(1, 0x5410), both(1, 0x7632))
                       : make_uint4(half[0][0], half[0][1], half[1][0], half[1][1]);
    }
}

// ---- the product

// x: zeros from K to x_length, a multiple of 8. Grid: tiles of the weight's rows, parts of K, each of `turns`. work:
// [parts][N], or null where there is one part. Dynamic shared memory: the table, x, NOTHING chunks.
constexpr int NOTHING = 16;
extern "C" __global__ void __launch_bounds__(THREADS, 2) lowbit_row(
    const ELEMENT* x, int64_t x_length, const uint8_t* packed, const uint8_t* scales,
    const __grid_constant__ Form form, int64_t N, int64_t turns, const BIAS* bias, float* work, ELEMENT* out) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t tile_row = (int64_t)blockIdx.x * TILE_N;
    const int first = (int)(blockIdx.y * turns), count = (int)(min(ceil_div(form.length, TURN), first + turns) - first);
    const Rows rows(form, packed, scales, tile_row, N);
    Codes even[ROWS], odd[ROWS];  // of turns of this warp
    if (warp < count) rows.load(first + warp, even);
    if (warp + WARPS < count) rows.load(first + warp + WARPS, odd);

    uint4 *shared_x = (uint4*)(memory + ENTRIES * 128), *nothing = shared_x + turns * (TURN / 8);
    load_x(x, (int64_t)first * TURN, x_length, count * TURN, shared_x);
    for (int i = threadIdx.x; i < NOTHING; i += THREADS) nothing[i] = make_uint4(0, 0, 0, 0);
    fill_table<THREADS>(form, (uint32_t*)memory);
    __syncthreads();

    // Where this lane's x lies for its pieces: column g is that of lane g / 2. Other lanes read zeros, in other banks.
    const uint4* x_at[PIECES];
    int x_step[PIECES];
#pragma unroll
    for (int q = 0; q < PIECES; ++q) {
        const int place = (g / 2 * PIECES + q) * X_CHUNKS;
        const bool mine = g == 2 * t + (COLUMNS == 2 ? q : 0);
        x_at[q] = mine ? shared_x + warp * (TURN / 8) + place : nothing + (place + 4) % 8;
        x_step[q] = mine ? WARPS * (TURN / 8) : 0;
    }
    const uint32_t one = narrow<ELEMENT>(1.0f).bits * 65537, of_x[4] = {one, power_of(0), one, power_of(1)};
    const SharedPlace column(memory + 4 * lane);
    Sums sums = {};
    const auto multiply = [&](int turn, const Codes (&codes)[ROWS]) LB_LAMBDA {
        Scales of_turn;
        if (BLOCK) rows.load(first + turn, of_turn);
#pragma unroll
        for (int q = 0; q < PIECES; ++q) {
#pragma unroll
            for (int n = 0; n < PIECE / GROUP; ++n) {
                uint32_t b[PAIRS];
#pragma unroll
                for (int c = 0; c < GROUP / 8; ++c) {
                    const uint4 eight = x_at[q][n * (GROUP / 8) + c];
                    b[4 * c] = eight.x, b[4 * c + 1] = eight.y, b[4 * c + 2] = eight.z, b[4 * c + 3] = eight.w;
                }
#pragma unroll
                for (int i = 0; i < ROWS / 2; ++i) {
                    uint32_t pair[2][PAIRS];
#pragma unroll
                    for (int h = 0; h < 2; ++h) codes[2 * i + h].decode(q, n, column, pair[h]);
#pragma unroll
                    for (int m = 0; m < PAIRS; m += 2) {
                        const uint32_t a[4] = {pair[0][m], pair[1][m], pair[0][m + 1], pair[1][m + 1]};
                        const uint32_t of_these[2] = {b[m], b[m + 1]};
                        multiply_add(sums.turn[i], a, of_these, ELEMENT());
                        if (AFFINE && i == 0) multiply_add(sums.of_x, of_x, of_these, ELEMENT());
                    }
                }
            }
            x_at[q] += x_step[q];
        }
        if (BLOCK) sums.add_turn(of_turn);  // otherwise the end multiplies by the row's scale
    };
    for (int turn = warp; turn < count; turn += 2 * WARPS) {
        multiply(turn, even);
        if (turn + 2 * WARPS < count) rows.load(first + turn + 2 * WARPS, even);
        if (turn + WARPS >= count) break;
        multiply(turn + WARPS, odd);
        if (turn + 3 * WARPS < count) rows.load(first + turn + 3 * WARPS, odd);
    }
    // Over the four lanes that share rows, then over warps, in a fixed order.
    __shared__ float of_warp[WARPS][TILE_N];
#pragma unroll
    for (int h = 0; h < ROWS; ++h) {
        float sum = sums.of_row(form, rows.scales + rows.scales_at[h], h);
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (t == 0) of_warp[warp][g + 8 * h] = sum;
    }
    __syncthreads();
    const int64_t n = tile_row + threadIdx.x;
    if (threadIdx.x >= TILE_N || n >= N) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += of_warp[w][threadIdx.x];
    if (work) work[blockIdx.y * N + n] = sum;
    else out[n] = narrow<ELEMENT>(bias ? sum + widen(bias[n]) : sum);
}
