// What scheduler.cpp and checker.cpp share: the state of the machine that runs one launch.
#pragma once
#include "cuda_language.h"

namespace emulator {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr uint32_t SHARED_START = 1024 + 128;  // the address of dynamic shared memory: a multiple of 128, not of more

struct Warp {
    unsigned alive;    // lanes whose kernel has not returned
    unsigned waiting;  // lanes in a collective
    unsigned epoch;    // number of __syncwarp() that all living lanes took part in: what orders memory inside a warp
};

struct Machine {
    const Launch* launch;
    int current = -1;         // thread that runs, or -1 in the scheduler
    unsigned block;           // linear index of the block that runs
    unsigned epoch;           // number of __syncthreads(), and of blocks: what orders memory inside a block
    Warp warps[MAX_THREADS / 32];
    unsigned proxy_fences[MAX_THREADS];  // that each thread has had
    char* shared;             // the library's thread-local segment: the static __shared__ variables
    size_t shared_bytes;
    char* dynamic_shared;
    char *library, *library_end;  // where the library is mapped: program counters, constants
};

extern Machine machine;
const char* stack_of(int thread);

// checker.cpp
void check_access(const void* p, size_t bytes, bool write);
void check_copy_start(void* to, size_t bytes);
void check_product(const void* p, size_t bytes, bool start, Site site);
void check_launch();
void check_block();

// wgmma.cpp
bool is_shared_with_products(unsigned thread, unsigned before);
void wgmma_finish();
void wgmma_block();
void check_sums(const char* p, bool write, size_t pc);

}  // namespace emulator
