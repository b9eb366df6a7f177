// Copies of a tile of a matrix in steps along its rows, from global into shared memory, in chunks of 16 bytes.
#pragma once
#include "tensor_core.h"

constexpr int CHUNK = 16;

// 16 bytes of which the first `left` exist; the others become zero. The thread waits for them.
LB_FN void copy_chunk(uint4* to, const uint8_t* from, int left) {
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
        if (i < left) word[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
    *to = make_uint4(word[0], word[1], word[2], word[3]);
}

// A thread's chunks of a step: CHUNKS of each of ROWS rows, shared by THREADS threads. It knows from where they are
// copied next, to where in a stage, and how many bytes of the row are left there; a row that does not exist has none.
template <int THREADS, int ROWS, int CHUNKS> struct Copies {
    static constexpr int COUNT = (ROWS * CHUNKS + THREADS - 1) / THREADS;
    const uint8_t* from[COUNT];
    int left[COUNT], place[COUNT];
    // Rows `first` on of a matrix, whose rows are `stride` bytes apart and `width` long, from byte `column` on.
    template <class Place>
    LB_METHOD Copies(const void* matrix, int64_t stride, int64_t first, int64_t rows, int width, int column,
                     const Place& where_to) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int n = threadIdx.x + i * THREADS, r = n / CHUNKS, c = n % CHUNKS;
            const bool exists = n < ROWS * CHUNKS && first + r < rows;
            from[i] = (const uint8_t*)matrix + (exists ? first + r : 0) * stride + column + c * CHUNK;
            left[i] = exists ? width - column - c * CHUNK : 0;
            place[i] = where_to(r, c);
        }
    }
    // WHOLE: chunks begin at multiples of 16 bytes and exist whole or not at all.
    template <bool WHOLE> LB_METHOD void start(uint4* stage) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (ROWS * CHUNKS % THREADS == 0 || threadIdx.x + i * THREADS < ROWS * CHUNKS) {
                if (WHOLE) start_copy(stage + place[i], from[i], left[i] > 0);
                else copy_chunk(stage + place[i], from[i], left[i]);
            }
            from[i] += CHUNKS * CHUNK;
            left[i] -= CHUNKS * CHUNK;
        }
    }
};
