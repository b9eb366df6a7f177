// The int8 product by AMX: an engine for int8_gemm.h.
//
// AMX has eight registers of 16 rows of 64 bytes, called tiles. One instruction multiplies 16 rows of A by 16 columns
// of B over 64 neighbours along K, signed by signed, in 16 cycles: 1024 products a cycle, where AVX-512 VNNI has 64.
// A's rows are read as they lie; in B's panel four neighbours along K of one column lie side by side, as for VNNI.
// Tiles 0 to 3 hold the sums of 32 rows and 32 columns, 4 and 5 rows of A, 6 and 7 columns of B: each of these is used
// twice.
//
// LB_AMX_TWIN gives the instructions in plain C++, so that the same loops run without the hardware, for tests; its
// value is what the system answers to the request for the registers.
#pragma once
#include <cstdint>
#include <cstring>
#include "instruction_sets.h"

#if LB_AMX

struct alignas(64) TileShapes {  // as the processor reads them
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "");

#ifdef LB_AMX_TWIN
static thread_local TileShapes tile_shapes;
alignas(64) static thread_local int8_t tiles[8][16][64];

static void save_tile_shapes(TileShapes* to) { *to = tile_shapes; }
static void set_tile_shapes(const TileShapes* from) { tile_shapes = *from; }
template <int T> static void tile_load(const void* from, int64_t stride) {
    for (int i = 0; i < tile_shapes.rows[T]; ++i)
        memcpy(tiles[T][i], (const char*)from + i * stride, tile_shapes.row_bytes[T]);
}
template <int T> static void tile_store(void* to, int64_t stride) {
    for (int i = 0; i < tile_shapes.rows[T]; ++i)
        memcpy((char*)to + i * stride, tiles[T][i], tile_shapes.row_bytes[T]);
}
template <int SUMS, int A, int B> static void tile_multiply_add() {
    for (int i = 0; i < tile_shapes.rows[SUMS]; ++i)
        for (int j = 0; j < tile_shapes.row_bytes[SUMS] / 4; ++j) {
            int32_t sum;
            memcpy(&sum, tiles[SUMS][i] + 4 * j, 4);
            for (int k = 0; k < tile_shapes.row_bytes[A]; ++k) sum += tiles[A][i][k] * tiles[B][k / 4][4 * j + k % 4];
            memcpy(tiles[SUMS][i] + 4 * j, &sum, 4);
        }
}
static bool request_tiles() { return LB_AMX_TWIN; }

#else
#include <sys/syscall.h>
#include <unistd.h>

// Not the compiler's own functions: GCC's do not tell it what memory they read and write.
static inline void save_tile_shapes(TileShapes* to) { asm volatile("sttilecfg %0" : "=m"(*to)); }
static inline void set_tile_shapes(const TileShapes* from) { asm volatile("ldtilecfg %0" ::"m"(*from)); }
template <int T> static inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> static inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int SUMS, int A, int B> static inline void tile_multiply_add() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}
// Linux, from 5.16 on, gives a process the registers on request, for all its threads; a hypervisor or sandbox may not.
static bool request_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

static bool amx_allowed() {
    static const bool allowed = request_tiles();
    return allowed;
}

class Amx {
public:
    typedef int8_t Element;
    static constexpr int64_t group = 4, offset = 0, k_step = 64;
    static constexpr int64_t rows = 32, columns = 32, column_step = 16;
    static constexpr bool in_registers = false;
    static constexpr int64_t k_block = 1024;  // of a panel 32 KiB, in the L1 cache, through which A's rows pass

    // A thread's tiles are its own, but other libraries may rely on the shapes that they have set.
    Amx() { save_tile_shapes(&before); }
    ~Amx() { set_tile_shapes(&before); }
    Amx(const Amx&) = delete;
    Amx& operator=(const Amx&) = delete;

    void add(const int8_t* a, int64_t stride, const int8_t* panel, int64_t k, int64_t height, int64_t width,
             int32_t* sums) {
        shape(height);
        if (height > 16 && width > 16) add_tiles<2, 2>(a, stride, panel, k, sums);
        else if (height > 16) add_tiles<2, 1>(a, stride, panel, k, sums);
        else if (width > 16) add_tiles<1, 2>(a, stride, panel, k, sums);
        else add_tiles<1, 1>(a, stride, panel, k, sums);
    }

private:
    TileShapes before;
    int64_t shaped = 0;

    void shape(int64_t height) {
        if (height == shaped) return;
        TileShapes shapes = {};
        shapes.palette = 1;
        const uint8_t top = height < 16 ? height : 16, bottom = height > 16 ? height - 16 : 16;
        const uint8_t heights[8] = {top, top, bottom, bottom, top, bottom, 16, 16};
        for (int t = 0; t < 8; ++t) shapes.rows[t] = heights[t], shapes.row_bytes[t] = 64;
        set_tile_shapes(&shapes);
        shaped = height;
    }

    template <int DOWN, int ACROSS>
    static void add_tiles(const int8_t* a, int64_t stride, const int8_t* panel, int64_t k, int32_t* sums) {
        constexpr int64_t pitch = columns * sizeof(int32_t), b_pitch = 64 * ACROSS;
        int32_t* below = sums + 16 * columns;
        tile_load<0>(sums, pitch);
        if (ACROSS > 1) tile_load<1>(sums + 16, pitch);
        if (DOWN > 1) tile_load<2>(below, pitch);
        if (DOWN * ACROSS > 2) tile_load<3>(below + 16, pitch);
        for (int64_t i = 0; i < k; i += 64, panel += 16 * b_pitch) {
            tile_load<6>(panel, b_pitch);
            tile_load<4>(a + i, stride);
            tile_multiply_add<0, 4, 6>();
            if (ACROSS > 1) tile_load<7>(panel + 64, b_pitch);
            if (ACROSS > 1) tile_multiply_add<1, 4, 7>();
            if (DOWN > 1) tile_load<5>(a + 16 * stride + i, stride);
            if (DOWN > 1) tile_multiply_add<2, 5, 6>();
            if (DOWN * ACROSS > 2) tile_multiply_add<3, 5, 7>();
        }
        tile_store<0>(sums, pitch);
        if (ACROSS > 1) tile_store<1>(sums + 16, pitch);
        if (DOWN > 1) tile_store<2>(below, pitch);
        if (DOWN * ACROSS > 2) tile_store<3>(below + 16, pitch);
    }
};
#endif
