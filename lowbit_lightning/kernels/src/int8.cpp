// The scaled int8 product; what it means is said in reference.py. int8_gemm.h computes the sums, by an engine that is
// chosen here, and hands them over a few rows at a time, to be scaled while they are in the caches.
#include "int8_amx.h"
#include "int8_dot.h"
#include "int8_gemm.h"
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// out[m][n] = sum * a_scales[m] * b_scales[n] (+ bias[n]), rounded in this order
template <class T> struct Epilogue {
    const float *a_scales, *b_scales, *bias;  // bias may be null
    T* out;
    int64_t N;

    // Fetches the lines that results will be written to: stores that wait for memory would hold the next tile up.
    void expect(int64_t m, int64_t n, int64_t count) const {
        const char* to = (const char*)(out + m * N + n);
        for (int64_t i = 0; i < count * (int64_t)sizeof(T); i += 64) __builtin_prefetch(to + i, 1);
    }
    void operator()(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
        const V a_scale = splat<V>(a_scales[m]);
        int64_t j = 0;
        for (; j + W <= count; j += W) scale(a_scale, sums + j, m * N, n + j, W);
        if (j < count) scale(a_scale, sums + j, m * N, n + j, (int)(count - j));
    }

private:
    inline __attribute__((always_inline)) void scale(
        V a_scale, const int32_t* sums, int64_t row, int64_t n, int width) const {
        V y = to_float(load_raw<I>(sums, W)) * a_scale * load(b_scales + n, width);
        if (bias) y = y + load(bias + n, width);
        store(out + row + n, y, width);
    }
};

template <class Engine, class T>
static void product(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const Epilogue<T>& epilogue,
                    void* memory, int threads) {
    const Workspace<Engine> w(memory, a, M, N, K);
    prepare(w, a, b, M, N, K, threads);
    multiply(w, M, N, threads, epilogue);
}

// Of a large result that is fresh from the system each page costs a fault, together a fifth of the time of the product.
// Huge pages are 512 times fewer; where the system gives them to all who ask, or to nobody, this changes nothing.
static void ask_for_huge_pages(void* result, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t start = ((uintptr_t)result + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = ((uintptr_t)result + (uintptr_t)bytes) / PAGE * PAGE;
    if (start < end) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
}

#ifdef LB_AMX
#define LB_NAME (amx_allowed() ? "AMX" : "AMX refused, " LB_DOT_NAME)
#define LB_BY_ENGINE(...)                                                                              \
    if (amx_allowed()) { typedef Amx Engine; __VA_ARGS__; } else { typedef Dots Engine; __VA_ARGS__; }
#else
#define LB_NAME LB_DOT_NAME
#define LB_BY_ENGINE(...) { typedef Dots Engine; __VA_ARGS__; }
#endif

extern "C" {
const char* lb_int8_instructions() { return LB_NAME; }
int64_t lb_int8_matmul_workspace(int64_t M, int64_t N, int64_t K) {
    LB_BY_ENGINE(return Workspace<Engine>::bytes(M, N, K))
}

// dtype: 0 float32, 1 float16, 2 bfloat16
void lb_int8_matmul(const int8_t* a, const int8_t* b, int64_t M, int64_t N, int64_t K, const float* a_scales,
                    const float* b_scales, const float* bias, void* out, int dtype, void* workspace, int threads) {
    const auto run = [&](auto* to) {
        ask_for_huge_pages(to, M * N * (int64_t)sizeof *to);
        const Epilogue<std::remove_pointer_t<decltype(to)>> epilogue{a_scales, b_scales, bias, to, N};
        LB_BY_ENGINE(product<Engine>(a, b, M, N, K, epilogue, workspace, threads))
    };
    if (dtype == 0) run((float*)out);
    else if (dtype == 1) run((Half*)out);
    else run((BFloat16*)out);
}
}
