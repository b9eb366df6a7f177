// One launch on one processor: a fiber per CUDA thread, block after block. A fiber runs until its thread has to wait
// for others (barrier, warp collective) or returns; then another one runs, chosen by the order the launch asks for.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include <link.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

namespace {

enum Status { READY, AT_COLLECTIVE, AT_BARRIER, FINISHED };

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; the registers lie on the stack
// What swapcontext does, without its system call: 20 ns instead of 300.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(Context* save, Context to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
void switch_context(Context& from, Context& to) { emulator_switch(&from, to); }
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Copy {
    char* to;
    const char* from;
    size_t bytes, zeros;
    unsigned group;
};

struct Fiber {
    Context context;
    char* stack;
    uint3 thread;
    Status status;
    Site site;  // where it waits; the rest describes the collective it waits in
    Collective kind;
    unsigned mask;
    int source_lane;
    uint64_t value, result;
    std::vector<Copy> copies;  // under way
    unsigned groups;           // closed so far
};

Fiber fibers[MAX_THREADS];
Context scheduler_context;
int threads, living;                  // in this block
std::vector<int> ready;               // threads that can run; the first `taken` are gone
size_t taken;
int at_barrier, barrier_result;       // how many threads wait, and what their predicates come to
Barrier barrier_kind;
Site barrier_site;
uint64_t random_state;
void (*kernel_body)(void*);
void* kernel_argument;
bool failed;

enum Order { FORWARD, BACKWARD, RANDOM };
Order order() { return static_cast<Order>(machine.launch->order); }

uint32_t random_word() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 16);
}

[[noreturn]] void back_to_scheduler() {
    const int left = machine.current;
    machine.current = -1;
    switch_context(fibers[left].context, scheduler_context);
    __builtin_unreachable();
}

void resume_as(int next) {
    machine.current = next;
    threadIdx = fibers[next].thread;
}

void wake(int thread) {
    fibers[thread].status = READY;
    ready.push_back(thread);
}

void report_deadlock() {
    int barriers = 0, collectives = 0;
    Site barrier_at{"", 0}, collective_at{"", 0};
    for (int i = 0; i < threads; ++i) {
        if (fibers[i].status == AT_BARRIER) barriers++, barrier_at = fibers[i].site;
        if (fibers[i].status == AT_COLLECTIVE) collectives++, collective_at = fibers[i].site;
    }
    fail("deadlock: %d threads wait in __syncthreads (%s:%d), %d in a warp collective (%s:%d)", barriers,
         barrier_at.file, barrier_at.line, collectives, collective_at.file, collective_at.line);
}

void run_another() {  // leaves the current fiber; returns when it is chosen again
    if (taken == ready.size()) {
        if (living == 0) back_to_scheduler();
        report_deadlock();
    }
    if (order() == RANDOM) std::swap(ready[taken], ready[taken + random_word() % (ready.size() - taken)]);
    int next;
    if (order() == BACKWARD) {
        next = ready.back();
        ready.pop_back();
    } else {
        next = ready[taken++];
    }
    if (taken == ready.size()) ready.clear(), taken = 0;
    if (next == machine.current) return;
    const int left = machine.current;
    resume_as(next);
    switch_context(fibers[left].context, fibers[next].context);
}

// ---------------------------------------------------------------------------------------------------------------------
// Warp collectives

void combine(Collective kind, uint64_t& sum, uint64_t value) {
    const int64_t a = static_cast<int64_t>(sum), b = static_cast<int64_t>(value);
    switch (kind) {
        case REDUCE_ADD: sum = sum + value; break;
        case REDUCE_MIN: sum = static_cast<uint64_t>(b < a ? b : a); break;
        case REDUCE_MAX: sum = static_cast<uint64_t>(b > a ? b : a); break;
        case REDUCE_AND: sum &= value; break;
        case REDUCE_OR: case BALLOT: sum |= value; break;
        case REDUCE_XOR: sum ^= value; break;
        case SHUFFLE: case SYNCWARP: break;
    }
}

int first_lane(unsigned mask) { return __builtin_ctz(mask); }

// Lets the lanes of `mask` go on if all that are still alive have arrived.
void try_release_warp(int index, unsigned mask) {
    Warp& warp = machine.warps[index];
    Fiber* lanes = fibers + 32 * index;
    const unsigned need = mask & warp.alive;
    if (!need || (warp.waiting & need) != need) return;

    const Fiber& first = lanes[first_lane(need)];
    uint64_t sum = 0;
    for (unsigned rest = need; rest; rest &= rest - 1) {
        const int i = first_lane(rest);
        const Fiber& x = lanes[i];
        if (x.mask != mask || x.kind != first.kind)
            fail("lanes of a warp meet in different collectives: %s:%d with mask %08x, %s:%d with mask %08x",
                 first.site.file, first.site.line, first.mask, x.site.file, x.site.line, x.mask);
        const uint64_t value = x.kind == BALLOT ? uint64_t{x.value != 0} << i : x.value;
        if (rest == need) sum = value;
        else combine(x.kind, sum, value);
    }
    for (unsigned rest = need; rest; rest &= rest - 1) {
        Fiber& x = lanes[first_lane(rest)];
        x.result = sum;
        if (x.kind != SHUFFLE) continue;
        if (!((need >> x.source_lane) & 1))
            fail("shuffle at %s:%d reads lane %d, which does not take part (mask %08x)", x.site.file, x.site.line,
                 x.source_lane, mask);
        x.result = lanes[x.source_lane].value;
    }
    warp.waiting &= ~need;
    if (first.kind == SYNCWARP && need == warp.alive) warp.epoch++;  // a shuffle orders no memory
    for (unsigned rest = need; rest; rest &= rest - 1) {
        const int i = 32 * index + first_lane(rest);
        if (i == machine.current && order() == FORWARD) fibers[i].status = READY;  // it just goes on
        else wake(i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

void try_release_block() {
    if (at_barrier == 0 || at_barrier < living) return;
    at_barrier = 0;
    machine.epoch++;
    for (int i = 0; i < threads; ++i) {
        if (fibers[i].status != AT_BARRIER) continue;
        fibers[i].result = static_cast<uint64_t>(barrier_result);
        wake(i);
    }
}

void thread_main() {
    kernel_body(kernel_argument);
    wgmma_finish();

    const int index = machine.current / 32;
    Warp& warp = machine.warps[index];
    fibers[machine.current].status = FINISHED;
    living--;
    warp.alive &= ~(1u << lane());
    for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {  // the others need not wait for this lane any more
        const Fiber& x = fibers[32 * index + first_lane(rest)];
        if (x.status == AT_COLLECTIVE && ((x.mask >> lane()) & 1)) {
            try_release_warp(index, x.mask);
            break;
        }
    }
    try_release_block();
    run_another();
    __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and launches

void start_fiber(int i) {
    Fiber& fiber = fibers[i];
    const unsigned x = blockDim.x, y = blockDim.y, n = static_cast<unsigned>(i);
    fiber.thread = {n % x, n / x % y, n / x / y};
    fiber.status = READY;
    fiber.copies.clear();
    fiber.groups = 0;
    if (!fiber.stack) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) abort();
        fiber.stack = static_cast<char*>(memory);
        mprotect(fiber.stack, 4096, PROT_NONE);  // an overflow is a fault, not a riddle
    }
#if defined(__x86_64__)
    // Unequal offsets: stacks that all start at the same place of a page fight for the same cache sets.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - i % 61 * 192);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(thread_main);
    for (int k = 0; k < 6; ++k) *--top = nullptr;  // the registers that emulator_switch pops
    fiber.context = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
#endif
}

void run_block(unsigned index) {
    const unsigned gx = gridDim.x, gy = gridDim.y;
    machine.block = index;
    blockIdx = {index % gx, index / gx % gy, index / gx / gy};
    if (machine.shared) memset(machine.shared, 0xFF, machine.shared_bytes);
    memset(machine.dynamic_shared, 0xFF, machine.launch->dynamic_shared);
    living = threads;
    at_barrier = 0;
    machine.epoch++;
    check_block();
    wgmma_block();
    for (int first = 0; first < threads; first += 32) {
        Warp& warp = machine.warps[first / 32];
        warp.alive = threads - first >= 32 ? ~0u : (1u << (threads - first)) - 1;
        warp.waiting = 0;
        warp.epoch++;
    }
    ready.clear();
    taken = 0;
    for (int i = 0; i < threads; ++i) {
        start_fiber(i);
        ready.push_back(i);
    }
    int first = 0;
    if (order() == BACKWARD) first = threads - 1;
    if (order() == RANDOM) first = static_cast<int>(random_word() % static_cast<unsigned>(threads));
    ready.erase(ready.begin() + first);
    resume_as(first);
    switch_context(scheduler_context, fibers[first].context);
}

void run_blocks() {
    const size_t blocks = size_t{gridDim.x} * gridDim.y * gridDim.z;
    size_t position = 0, step = 1;
    if (order() == RANDOM && blocks > 2) {  // any step that shares no divisor with the number visits each block once
        do step = 1 + random_word() % (blocks - 1);
        while (std::gcd(step, blocks) != 1);
        position = random_word() % blocks;
    }
    for (size_t k = 0; k < blocks && !failed; ++k, position = (position + step) % blocks)
        run_block(static_cast<unsigned>(order() == BACKWARD ? blocks - 1 - k : position));
    // Every kernel's text is a library with stacks of its own, and a process may have 65,530 mappings in all.
    for (Fiber& fiber : fibers) {
        if (fiber.stack) munmap(fiber.stack, STACK_BYTES);
        fiber.stack = nullptr;
    }
}

// Finds the mapping and the thread-local segment of the library that `inside` points into.
struct Library { char *inside, *start, *end, *shared; size_t shared_bytes; };
int look_at_library(dl_phdr_info* info, size_t, void* out) {
    Library found{static_cast<Library*>(out)->inside, nullptr, nullptr, nullptr, 0};
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        char* start = reinterpret_cast<char*>(info->dlpi_addr + part.p_vaddr);
        if (part.p_type == PT_LOAD) {
            if (!found.start || start < found.start) found.start = start;
            if (start + part.p_memsz > found.end) found.end = start + part.p_memsz;
        }
        if (part.p_type == PT_TLS) {
            found.shared = static_cast<char*>(info->dlpi_tls_data);
            found.shared_bytes = part.p_memsz;
        }
    }
    if (found.inside < found.start || found.inside >= found.end) return 0;
    *static_cast<Library*>(out) = found;
    return 1;
}

// The segment exists, in every thread that asks for it, once one variable in it has been touched.
thread_local volatile char anchor;

// What a CUDA driver would refuse with "invalid argument".
const char* geometry_error(const Launch& launch) {
    const unsigned *grid = launch.grid, *block = launch.block;
    if (!grid[0] || !grid[1] || !grid[2]) return "a grid of zero blocks";
    if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) return "a grid beyond 2^31-1 x 65535 x 65535";
    if (!block[0] || !block[1] || !block[2]) return "a block of zero threads";
    if (block[2] > 64) return "a block of more than 64 threads along z";
    if (size_t{block[0]} * block[1] * block[2] > MAX_THREADS) return "a block of more than 1024 threads";
    if (machine.shared_bytes > 48 * 1024) return "more than 48 KiB of static shared memory";
    if (machine.shared_bytes + launch.dynamic_shared > launch.most_shared) return "more shared memory than the GPU has";
    return nullptr;
}

}  // namespace

const char* stack_of(int thread) { return fibers[thread].stack; }
unsigned living_lanes() { return machine.warps[machine.current / 32].alive; }
int lane() { return machine.current % 32; }
void* dynamic_shared() { return machine.dynamic_shared; }

void fail(const char* format, ...) {
    const Launch& launch = *machine.launch;
    int used = 0;
    if (machine.current >= 0) {
        const uint3 t = fibers[machine.current].thread;
        used = snprintf(launch.message, launch.message_size, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x,
                        blockIdx.y, blockIdx.z, t.x, t.y, t.z);
    }
    va_list list;
    va_start(list, format);
    vsnprintf(launch.message + used, launch.message_size - static_cast<size_t>(used), format, list);
    va_end(list);
    failed = true;
    if (machine.current < 0) abort();
    back_to_scheduler();  // the other fibers are left where they are and started afresh by the next block
}

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int source_lane, Site site) {
    Fiber& me = fibers[machine.current];
    if (!((mask >> lane()) & 1))
        fail("lane %d is not in the mask %08x that it passes at %s:%d", lane(), mask, site.file, site.line);
    me.kind = kind;
    me.mask = mask;
    me.value = value;
    me.source_lane = source_lane & 31;
    me.site = site;
    me.status = AT_COLLECTIVE;
    machine.warps[machine.current / 32].waiting |= 1u << lane();
    try_release_warp(machine.current / 32, mask);
    if (me.status == AT_COLLECTIVE || order() != FORWARD) run_another();
    return me.result;
}

int barrier(Barrier kind, int predicate, Site site) {
    Fiber& me = fibers[machine.current];
    if (at_barrier == 0) {
        barrier_kind = kind;
        barrier_site = site;
        barrier_result = kind == AND;
    } else if (barrier_kind != kind || barrier_site.line != site.line || strcmp(barrier_site.file, site.file)) {
        fail("divergent __syncthreads: this thread is at %s:%d, others are at %s:%d", site.file, site.line,
             barrier_site.file, barrier_site.line);
    }
    if (kind == COUNT) barrier_result += predicate != 0;
    if (kind == AND) barrier_result &= predicate != 0;
    if (kind == OR) barrier_result |= predicate != 0;
    at_barrier++;
    me.site = site;
    me.status = AT_BARRIER;
    try_release_block();
    run_another();
    return static_cast<int>(me.result);
}

// A copy may be made at any time from its start to the end of the wait for it. Whoever reads in between, or still reads
// what it overwrites, is wrong: the bytes are poisoned at the start and written at the end, both seen by the checker.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
    Fiber& me = fibers[machine.current];
    const size_t size = bytes + zeros;
    if (size != 4 && size != 8 && size != 16) fail("an asynchronous copy of %zu bytes, not 4, 8 or 16", size);
    if (reinterpret_cast<uintptr_t>(to) % size || (bytes && reinterpret_cast<uintptr_t>(from) % size))
        fail("misaligned asynchronous copy of %zu bytes", size);
    check_copy_start(to, size);
    memset(to, 0xFF, size);
    me.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros, me.groups});
}

void close_copies() { fibers[machine.current].groups++; }

void wait_for_copies(unsigned newest) {
    Fiber& me = fibers[machine.current];
    size_t kept = 0;
    for (const Copy& copy : me.copies) {
        if (copy.group + newest >= me.groups) {
            me.copies[kept++] = copy;
            continue;
        }
        if (copy.bytes) check_access(copy.from, copy.bytes, false);
        check_access(copy.to, copy.bytes + copy.zeros, true);
        memcpy(copy.to, copy.from, copy.bytes);
        memset(copy.to + copy.bytes, 0, copy.zeros);
    }
    me.copies.resize(kept);
}

int run(const Launch* launch, void (*body)(void*), void* argument, void* inside_the_library) {
    anchor = 1;
    Library library{static_cast<char*>(inside_the_library), nullptr, nullptr, nullptr, 0};
    dl_iterate_phdr(look_at_library, &library);
    machine.launch = launch;
    machine.current = -1;
    machine.library = library.start;
    machine.library_end = library.end;
    machine.shared = library.shared;
    machine.shared_bytes = library.shared_bytes;
    if (const char* error = geometry_error(*launch)) {
        snprintf(launch->message, launch->message_size, "%s", error);
        return 1;
    }
    std::vector<char> dynamic(launch->dynamic_shared + 128);
    machine.dynamic_shared = dynamic.data() + (128 - reinterpret_cast<uintptr_t>(dynamic.data()) % 128);
    blockDim = {launch->block[0], launch->block[1], launch->block[2]};
    gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
    threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    kernel_body = body;
    kernel_argument = argument;
    random_state = launch->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
    failed = false;
    check_launch();
    run_blocks();
    machine.current = -1;
    return failed;
}

}  // namespace emulator
