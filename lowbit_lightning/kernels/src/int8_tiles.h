// How int8 tiles lie in shared memory, and the product of a warp's part of them: 64 rows by 8 FRAGMENTS columns.
//
// Banks. A row of a stage is four chunks of 16 bytes, and a warp reads chunk c of 8 rows at a time, which must fall
// into different eighths of a 128-byte line. Two rows make a line, so rows that agree in their last bit need chunks in
// different places: chunk c of row r lies at c ^ x, with x = 0, 1, 2, 3 over those rows. Of A they are 8 in succession.
//
// Columns. A lane holds two neighbouring columns of each fragment of 8. Four fragments side by side would give it four
// such pairs, 8 apart; so rows of B are dealt to fragments such that a lane's pairs are neighbours in the result:
//   column 2t + j of fragment f  <->  column 8t + 2f + j of the 32
// and it writes its 8 columns of a row in one access of 16 bytes, or two. Of B the 8 rows read at a time are therefore
// 2f, 2f + 1, 2f + 8, 2f + 9, 2f + 16, ...
#pragma once
#include "tensor_core.h"

constexpr int TILE_K = 64, CHUNK = 16, CHUNKS = TILE_K / CHUNK;

struct OfA { LB_METHOD static int place(int r, int c) { return (r * CHUNKS + (c ^ (r / 2 % 4))) * CHUNK; } };
struct OfB { LB_METHOD static int place(int r, int c) { return (r * CHUNKS + (c ^ (r / 8 % 4))) * CHUNK; } };

// sums[i][j]: rows 16 i of the warp's part, fragment j % 4 of columns 32 (j / 4)
template <int FRAGMENTS>
LB_FN void multiply_stage(const int8_t* a, const int8_t* b, int32_t (&sums)[4][FRAGMENTS][4]) {
    const int lane = threadIdx.x % 32;
    const int row_of_a = lane % 16, row_of_b = lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2;
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
        uint32_t of_a[4][4], of_b[FRAGMENTS][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices(a + OfA::place(row_of_a + 16 * i, k + lane / 16), of_a[i]);
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j += 2) {
            uint32_t pair[4];
            load_matrices(b + OfB::place(row_of_b + j / 4 * 32 + j % 4 * 2, k + lane / 8 % 2), pair);
            of_b[j][0] = pair[0], of_b[j][1] = pair[1], of_b[j + 1][0] = pair[2], of_b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < FRAGMENTS; ++j) multiply_add(sums[i][j], of_a[i], of_b[j]);
    }
}
