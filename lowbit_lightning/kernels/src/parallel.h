// parallel_for(count, threads, body): body(i) for i in [0, count), dynamically shared among threads.
// OpenMP where the build has it (the object then uses torch's own pool); else threads made for the call, which is
// slower by some tens of microseconds but leaves nothing behind that a fork could break.
#pragma once
#include <cstdint>
#ifdef _OPENMP
template <class F> static void parallel_for(int64_t count, int threads, const F& body) {
    if (threads < 2 || count < 2) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) body(i);
}
#else
#include <atomic>
#include <thread>
#include <vector>
template <class F> static void parallel_for(int64_t count, int threads, const F& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i = next++; i < count; i = next++) body(i);
    };
    std::vector<std::thread> helpers;
    for (int t = 1; t < threads && t < count; ++t) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
}
#endif
