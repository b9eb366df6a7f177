// Looks at every memory access of a kernel that was compiled with -fsanitize=thread: the compiler calls __tsan_read4(p)
// and the like before each, and these are our own versions of those functions. Alignment is checked in every mode.
//
// Every byte of a buffer or of shared memory remembers who wrote it last and who has read it since. Two accesses to a
// byte, one of them a write, are in order if they come from the same thread, or a __syncthreads of their block, or a
// __syncwarp of their warp lies between them. If not, they race, whatever order this run took them in.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace {

enum Readers : unsigned char { ONE, LANES_OF_A_WARP, MANY };

struct Access {
    unsigned thread;  // index + 1; 0: nobody
    unsigned block, block_epoch, warp_epoch;
    unsigned proxy_fences;  // that the thread had had
};

struct Byte {
    Access write, read;
    Readers readers;
    bool under_way;  // an asynchronous copy to it has started and was not waited for
    unsigned char products;  // under way, that read it
};

struct Region {
    std::string name;
    char *start, *end;
    bool shared, read_only;
    std::vector<Byte> bytes;
};

struct Variable {  // a static __shared__ variable, from the library's symbol table
    std::string name;
    size_t offset, size;
};

struct Record {  // as module.py reads it
    uint64_t address;
    uint32_t pc, block;
    uint16_t thread;
    uint8_t bytes, write, shared, pad[3];
};

std::vector<Record> records;
bool recording;

std::vector<Region> regions;
std::vector<Variable> variables;
size_t buffers;      // the first regions; shared memory follows
size_t last_region;  // where the previous access was: the next is most often there too

bool ordered(const Access& earlier, Readers readers) {
    const unsigned me = static_cast<unsigned>(machine.current) + 1;
    if (earlier.block != machine.block) return false;
    if (earlier.block_epoch < machine.epoch) return true;
    if (readers == ONE && earlier.thread == me) return true;
    const unsigned warp = (me - 1) / 32;
    return readers != MANY && (earlier.thread - 1) / 32 == warp && earlier.warp_epoch < machine.warps[warp].epoch;
}

Region* region_of(const char* p) {
    auto holds = [p](const Region& r) { return p >= r.start && p < r.end; };
    if (last_region < regions.size() && holds(regions[last_region])) return &regions[last_region];
    for (size_t i = 0; i < regions.size(); ++i)
        if (holds(regions[i])) return &regions[last_region = i];
    return nullptr;
}

const char* verb(bool write) { return write ? "write" : "read"; }

[[noreturn]] void fail_outside(const char* p, size_t bytes, bool write, size_t pc) {
    const Region* nearest = nullptr;
    for (const Region& r : regions)
        if (!nearest || labs(p - r.end) < labs(p - nearest->end)) nearest = &r;
    fail("out-of-bounds %s of %zu bytes, %+ld bytes from the end of %s [pc 0x%zx]", verb(write), bytes,
         nearest ? static_cast<long>(p - nearest->end) : 0L, nearest ? nearest->name.c_str() : "nothing", pc);
}

void check_byte(Region& region, size_t offset, bool write, size_t pc) {
    Byte& byte = region.bytes[offset];
    const unsigned me = static_cast<unsigned>(machine.current) + 1;
    const unsigned warp_epoch = machine.warps[(me - 1) / 32].epoch;
    const Access now{me, machine.block, machine.epoch, warp_epoch, machine.proxy_fences[me - 1]};
    if (byte.write.thread && !ordered(byte.write, ONE))
        fail("race: %s of %s+%zu after an unsynchronised write by thread %u of block %u [pc 0x%zx]", verb(write),
             region.name.c_str(), offset, byte.write.thread - 1, byte.write.block, pc);
    const bool readers_are_past = !byte.read.thread || ordered(byte.read, byte.readers);
    if (write) {
        if (!readers_are_past)
            fail("race: write of %s+%zu after an unsynchronised read by thread %u of block %u [pc 0x%zx]",
                 region.name.c_str(), offset, byte.read.thread - 1, byte.read.block, pc);
        if (byte.products)
            fail("write of %s+%zu, which a product under way reads [pc 0x%zx]", region.name.c_str(), offset, pc);
        byte = {now, {}, ONE, false, 0};
        return;
    }
    if (byte.under_way)
        fail("read of %s+%zu, to which an asynchronous copy is under way [pc 0x%zx]", region.name.c_str(), offset, pc);
    if (region.shared && !byte.write.thread)
        fail("read of shared memory that was never written: %s+%zu [pc 0x%zx]", region.name.c_str(), offset, pc);
    if (readers_are_past) byte.readers = ONE;
    else if (byte.read.block == machine.block && (byte.read.thread - 1) / 32 == (me - 1) / 32 && byte.readers != MANY)
        byte.readers = LANES_OF_A_WARP;
    else byte.readers = MANY;
    byte.read = now;
}

void check(char* p, size_t bytes, bool write, const void* caller, bool atomic = false) {
    if (machine.current < 0 || !buffers) return;
    const char* stack = stack_of(machine.current);
    const size_t pc = static_cast<size_t>(static_cast<const char*>(caller) - machine.library);
    if (p >= stack && p < stack + STACK_BYTES) return check_sums(p, write, pc);  // the thread's own local memory
    Region* region = region_of(p);
    if (!region) {
        if (p >= machine.library && p < machine.library_end) return;  // __constant__ tables, literals
        fail_outside(p, bytes, write, pc);
    }
    if (p + bytes > region->end) fail_outside(p, bytes, write, pc);
    if (write && region->read_only) fail("write to %s, which is read-only [pc 0x%zx]", region->name.c_str(), pc);
    if (recording && bytes <= 16)
        records.push_back({reinterpret_cast<uint64_t>(p), static_cast<uint32_t>(pc), machine.block,
                           static_cast<uint16_t>(machine.current), static_cast<uint8_t>(bytes), write, region->shared,
                           {}});
    if (atomic) return;
    for (size_t i = 0; i < bytes; ++i) check_byte(*region, static_cast<size_t>(p - region->start) + i, write, pc);
}

}  // namespace

void check_launch() {
    regions.resize(buffers);
    last_region = 0;
    if (!buffers) return;
    for (const Variable& v : variables) {
        char* start = machine.shared + v.offset;
        regions.push_back({v.name, start, start + v.size, true, false, {}});
    }
    if (const size_t bytes = machine.launch->dynamic_shared)
        regions.push_back({"dynamic shared", machine.dynamic_shared, machine.dynamic_shared + bytes, true, false, {}});
    for (Region& r : regions) r.bytes.assign(static_cast<size_t>(r.end - r.start), Byte());
}

void check_block() {
    for (Region& r : regions)
        if (r.shared) std::fill(r.bytes.begin(), r.bytes.end(), Byte());
}

void check_access(const void* p, size_t bytes, bool write) {
    check(static_cast<char*>(const_cast<void*>(p)), bytes, write, __builtin_return_address(0));
}

void check_copy_start(void* to, size_t bytes) {
    check(static_cast<char*>(to), bytes, true, __builtin_return_address(0));
    Region* region = region_of(static_cast<char*>(to));
    for (size_t i = 0; region && i < bytes; ++i)
        region->bytes[static_cast<size_t>(static_cast<char*>(to) - region->start) + i].under_way = true;
}

// A product starts to read an operand, or has done so.
void check_product(const void* p, size_t bytes, bool start, Site site) {
    if (!buffers) return;
    const char* first = static_cast<const char*>(p);
    Region* region = region_of(first);
    for (size_t i = static_cast<size_t>(first - region->start), end = i + bytes; i < end; ++i) {
        Byte& byte = region->bytes[i];
        const char* wrong = nullptr;
        if (!start) byte.products--;
        else if (!byte.write.thread) wrong = "was never written";
        else if (byte.under_way) wrong = "is being copied to";
        else if (byte.write.block_epoch >= machine.epoch) wrong = "was written without a barrier after it";
        else if (!is_shared_with_products(byte.write.thread - 1, byte.write.proxy_fences))
            wrong = "was written without a fence.proxy.async and a barrier after it";
        else byte.products++;
        if (wrong) fail("wgmma at %s:%d reads %s+%zu, which %s", site.file, site.line, region->name.c_str(), i, wrong);
    }
}

void check_atomic(const void* p, size_t bytes) {
    check(static_cast<char*>(const_cast<void*>(p)), bytes, true, __builtin_return_address(0), true);
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------------------------------
// What module.py calls

EMULATOR_PUBLIC void emulator_forget_buffers() {
    emulator::regions.clear();
    emulator::buffers = 0;
}
EMULATOR_PUBLIC void emulator_add_buffer(const char* name, char* start, size_t bytes, int read_only) {
    emulator::regions.push_back({name, start, start + bytes, false, read_only != 0, {}});
    emulator::buffers = emulator::regions.size();
}
EMULATOR_PUBLIC void emulator_add_shared_variable(const char* name, size_t offset, size_t size) {
    emulator::variables.push_back({name, offset, size});
}
EMULATOR_PUBLIC void emulator_record(int on) {
    emulator::recording = on != 0;
    if (on) emulator::records.clear();
}
EMULATOR_PUBLIC const void* emulator_records(size_t* count) {
    *count = emulator::records.size();
    return emulator::records.data();
}

// ---------------------------------------------------------------------------------------------------------------------
// What the instrumented code calls

#define EMULATOR_CALLBACKS(PREFIX, N)                                                        \
    extern "C" void PREFIX##read##N(void* p) {                                               \
        emulator::check(static_cast<char*>(p), N, false, __builtin_return_address(0));       \
    }                                                                                        \
    extern "C" void PREFIX##write##N(void* p) {                                              \
        emulator::check(static_cast<char*>(p), N, true, __builtin_return_address(0));        \
    }
EMULATOR_CALLBACKS(__tsan_, 1)
EMULATOR_CALLBACKS(__tsan_, 2)
EMULATOR_CALLBACKS(__tsan_, 4)
EMULATOR_CALLBACKS(__tsan_, 8)
EMULATOR_CALLBACKS(__tsan_, 16)
EMULATOR_CALLBACKS(__tsan_unaligned_, 2)
EMULATOR_CALLBACKS(__tsan_unaligned_, 4)
EMULATOR_CALLBACKS(__tsan_unaligned_, 8)
EMULATOR_CALLBACKS(__tsan_unaligned_, 16)
extern "C" void __tsan_read_range(void* p, size_t n) {
    emulator::check(static_cast<char*>(p), n, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t n) {
    emulator::check(static_cast<char*>(p), n, true, __builtin_return_address(0));
}

// -fsanitize=alignment: called where a pointer is used that is null or does not keep its type's alignment.
struct Misuse {
    const char* file;
    unsigned line, column;
    const void* type;
    unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const Misuse* misuse, uintptr_t p) {
    emulator::fail("misaligned access (%u bytes, %u past the boundary) at %s:%u", 1u << misuse->log_alignment,
                   static_cast<unsigned>(p & ((1u << misuse->log_alignment) - 1)), misuse->file, misuse->line);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
