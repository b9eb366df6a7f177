// Hopper's wgmma on one processor, from the description in PTX: 64 x N int32 sums of two int8 matrices that lie in
// shared memory, read through their 64-bit descriptors.
//
// A product may read its operands at any time from its start to the end of the wait for it, and the sums are nobody's
// in between. So a thread's sums are poisoned when a product starts, and the product is made when the thread waits: as
// late as it can be. Check mode also reports, at the place:
//   - an operand that was written without a fence.proxy.async and a barrier after it, or is being copied to;
//   - a write to an operand before all threads of the warpgroup have waited;
//   - an access to sums while a product is under way, and one that no wgmma.fence separates from the next product.
// This is stricter than a GPU where one warp's wait would do for all.
#include <cstdio>
#include <map>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace {

constexpr int GROUP = 128, ROWS = 64, COLUMNS = 32;  // threads; rows of A; bytes of a row in one product

struct Product {  // of a warpgroup
    uint64_t a, b;
    int n;
    Site site;
    int left;  // threads that have not waited for it
};

struct Sums {  // of a thread: where they are, how many, their values without the products under way, and how many are
    int count;
    std::vector<int32_t> values;
    int under_way;
};

struct Pending {
    size_t product;
    unsigned group;
    int32_t* sums;
};

struct Thread {
    std::vector<Pending> pending;
    std::map<int32_t*, Sums> sums;
    size_t started;
    unsigned groups;  // closed so far
    bool ordered;     // a wgmma.fence came after the last access to sums
    bool returned;
    std::vector<unsigned> proxy_fences;  // when: the epochs of the machine
};

Thread threads[MAX_THREADS];
std::vector<Product> products[MAX_THREADS / GROUP];
bool used;

// PTX, "Canonical Layouts", along K: 8 rows of `width` chunks of 16 bytes, one after the other; the next 8 rows
// `stride` on; without a swizzle the next chunk `leading` on. Then bits 4 and up of the address change with bits 7
// and up.
uint32_t address_of(uint64_t descriptor, int row, int byte) {
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
    const uint32_t bits = mode ? 4 - mode : 0, width = 1u << bits;
    const uint32_t chunk = static_cast<uint32_t>(byte / 16), r = static_cast<uint32_t>(row);
    uint32_t address = start + r / 8 * stride + r % 8 * width * 16 + static_cast<uint32_t>(byte % 16);
    address += chunk * (mode ? 16 : leading);
    return address ^ (address >> 7 & (width - 1)) << 4;
}

const char* operand(uint64_t descriptor, int row, int byte) {
    const uint32_t address = address_of(descriptor, row, byte), at = address - SHARED_START;
    if (address < SHARED_START || at + 16 > machine.launch->dynamic_shared)
        fail("wgmma reads shared memory at %u, beyond the %zu bytes of the launch", at, machine.launch->dynamic_shared);
    return machine.dynamic_shared + at;
}

void look_at_operands(const Product& product, bool start) {
    for (int chunk = 0; chunk < COLUMNS; chunk += 16) {
        const auto look = [&](uint64_t of, int rows) {
            for (int row = 0; row < rows; ++row) check_product(operand(of, row, chunk), 16, start, product.site);
        };
        look(product.a, ROWS);
        look(product.b, product.n);
    }
}

void read_row(uint64_t descriptor, int row, int8_t* to) {
    for (int chunk = 0; chunk < COLUMNS; chunk += 16) memcpy(to + chunk, operand(descriptor, row, chunk), 16);
}

// This thread's part of a product: of warp w, rows 16 w + lane / 4 and 8 more, and two columns of each 8.
void multiply(const Product& product, int32_t* sums) {
    int8_t a[2][COLUMNS], b[COLUMNS];
    const int warp = machine.current % GROUP / 32;
    for (int half = 0; half < 2; ++half) read_row(product.a, 16 * warp + 8 * half + lane() / 4, a[half]);
    for (int column = lane() % 4 * 2; column < product.n; column += column % 2 ? 7 : 1) {
        read_row(product.b, column, b);
        for (int half = 0; half < 2; ++half) {
            int32_t sum = 0;
            for (int k = 0; k < COLUMNS; ++k) sum += a[half][k] * b[k];
            sums[column / 8 * 4 + half * 2 + column % 2] += sum;
        }
    }
}

Thread& me() { return threads[machine.current]; }

}  // namespace

uint32_t shared_address(const void* p) {
    return SHARED_START + static_cast<uint32_t>(static_cast<const char*>(p) - machine.dynamic_shared);
}

void fence_proxy() {
    used = true;
    me().proxy_fences.push_back(machine.epoch);
    machine.proxy_fences[machine.current]++;
}

// Whether a thread had a proxy fence after its first `before` ones, and then a barrier.
bool is_shared_with_products(unsigned thread, unsigned before) {
    const auto& fences = threads[thread].proxy_fences;
    return fences.size() > before && fences[before] < machine.epoch;
}

void wgmma_fence() { used = me().ordered = true; }
void wgmma_commit() { me().groups++; }

void wgmma(int32_t* sums, int n, uint64_t a, uint64_t b, Site site) {
    Thread& thread = me();
    const unsigned size = blockDim.x * blockDim.y * blockDim.z;
    if (size % GROUP) fail("wgmma at %s:%d in a block of %u threads, not whole warpgroups", site.file, site.line, size);
    if (a >> 49 & 7 || b >> 49 & 7) fail("a wgmma descriptor with a base offset, which is not emulated");
    if (!thread.ordered) fail("wgmma at %s:%d without a wgmma.fence after its sums were used", site.file, site.line);
    auto& group = products[machine.current / GROUP];
    const size_t number = thread.started++;
    if (number == group.size()) {
        for (int i = 0; i < GROUP; ++i)
            if (threads[machine.current / GROUP * GROUP + i].returned) fail("wgmma at %s:%d by a part of a warpgroup",
                                                                            site.file, site.line);
        group.push_back({a, b, n, site, GROUP});
        look_at_operands(group.back(), true);
    } else if (const Product& first = group[number]; first.a != a || first.b != b || first.n != n) {
        fail("threads of a warpgroup start different products, at %s:%d and %s:%d", first.site.file, first.site.line,
             site.file, site.line);
    }
    auto known = thread.sums.emplace(sums, Sums{}).first;
    if (!known->second.under_way++) {
        known->second.count = n / 2;
        known->second.values.assign(sums, sums + n / 2);
        memset(sums, 0xFF, sizeof(int32_t) * static_cast<size_t>(n / 2));
    }
    thread.pending.push_back({number, thread.groups, sums});
}

void wgmma_wait(unsigned newest) {
    Thread& thread = me();
    size_t kept = 0;
    for (const Pending& one : thread.pending) {
        if (one.group + newest >= thread.groups) {
            thread.pending[kept++] = one;
            continue;
        }
        Product& product = products[machine.current / GROUP][one.product];
        Sums& sums = thread.sums[one.sums];
        multiply(product, sums.values.data());
        if (!--product.left) look_at_operands(product, false);
        if (!--sums.under_way) memcpy(one.sums, sums.values.data(), sizeof(int32_t) * sums.values.size());
    }
    thread.pending.resize(kept);
}

void wgmma_finish() {
    if (!used) return;
    if (!me().pending.empty()) fail("the thread returns while a product is under way");
    if (me().started != products[machine.current / GROUP].size()) fail("wgmma by a part of a warpgroup");
    me().returned = true;
}

void wgmma_block() {
    if (!used) return;
    for (Thread& thread : threads) thread = {};
    for (unsigned& fences : machine.proxy_fences) fences = 0;
    for (auto& group : products) group.clear();
    used = false;
}

void check_sums(const char* p, bool write, size_t pc) {
    if (!used) return;
    for (auto& [start, sums] : me().sums) {
        const char* first = reinterpret_cast<const char*>(start);
        if (p < first || p >= first + sizeof(int32_t) * static_cast<size_t>(sums.count)) continue;
        if (sums.under_way) fail("%s of sums while a product is under way [pc 0x%zx]", write ? "write" : "read", pc);
        me().ordered = false;
    }
}

}  // namespace emulator
