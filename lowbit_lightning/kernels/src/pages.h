// Fresh memory: large results lie in pages that the system has yet to give, at a fault for every 4 KB, which can take
// longer than to compute them. Where it leaves the choice to the process ("madvise", the usual default of Linux), ask
// for pages of 2 MB.
#pragma once
#include <cstdint>
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

static inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE;
    const uintptr_t last = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // refused: as before
#else
    (void)memory, (void)bytes;
#endif
}
