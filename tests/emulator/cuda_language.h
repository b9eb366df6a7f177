// CUDA C++ for the host compiler: included before a kernel's text. What a kernel uses and this file lacks is a compile
// error; add it here. The functions that make threads wait are in scheduler.cpp.
// It is read once for every kernel that tests build, so the slow headers of C++ (<cmath>, <string>) stay out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // so the thread-local segment of the library is exactly the shared memory
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ---------------------------------------------------------------------------------------------------------------------
// Vector types. checker.cpp reports an access that does not keep their alignment, in every mode, before it is made.

#define EMULATOR_ALIGN(n) __attribute__((aligned(n)))
#define EMULATOR_VECTORS(T, NAME)                                                                       \
    struct EMULATOR_ALIGN(2 * sizeof(T)) NAME##2 { T x, y; };                                           \
    struct NAME##3 { T x, y, z; };                                                                      \
    struct EMULATOR_ALIGN(sizeof(T) < 4 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; };                \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                          \
    inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                  \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
struct dim3 { unsigned x, y, z; };

// ---------------------------------------------------------------------------------------------------------------------
// What a thread knows of its place: set by the scheduler at every switch.

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Site { const char* file; int line; };  // of a call in the kernel's text
enum Collective { SHUFFLE, BALLOT, SYNCWARP, REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, REDUCE_AND, REDUCE_OR, REDUCE_XOR };
enum Barrier { PLAIN, COUNT, AND, OR };

struct Launch {  // module.py fills it
    unsigned grid[3], block[3];
    size_t dynamic_shared, most_shared;
    void** arguments;
    int order;  // 0 forward, 1 backward, 2 random
    uint64_t seed;
    char* message;
    size_t message_size;
};

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int source_lane, Site site);
int barrier(Barrier kind, int predicate, Site site);
unsigned living_lanes();
int lane();
void* dynamic_shared();
void check_atomic(const void* address, size_t bytes);
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void close_copies();
void wait_for_copies(unsigned newest);
uint32_t shared_address(const void* p);
void fence_proxy();
void wgmma(int32_t* sums, int n, uint64_t a, uint64_t b, Site site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned newest);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int run(const Launch* launch, void (*kernel)(void*), void* argument, void* inside_the_library);

// ---------------------------------------------------------------------------------------------------------------------
// Entry points: EMULATOR_EXPORT(name), appended to the kernel's text, makes two C functions of a kernel. The glue is
// not instrumented: it reads the argument array, which is no memory of the kernel.

#define EMULATOR_GLUE __attribute__((no_sanitize("thread"), noinline))

struct Type { char kind; int size; };  // "p"ointer, "i"nteger, "u"nsigned, "f"loat, "s"truct
template <class T> constexpr Type type_of() {
    if (std::is_pointer<T>::value) return {'p', sizeof(T)};
    if (!std::is_arithmetic<T>::value) return {'s', sizeof(T)};
    return {std::is_floating_point<T>::value ? 'f' : std::is_signed<T>::value ? 'i' : 'u', sizeof(T)};
}
// The types of a kernel's parameters; kind 0 ends the list.
template <class... A> const Type* signature(void (*)(A...)) {
    static const Type types[] = {type_of<A>()..., Type{0, 0}};
    return types;
}
template <class... A> struct Call {
    void (*kernel)(A...);
    void** arguments;
};
template <class... A, size_t... I> EMULATOR_GLUE void call(Call<A...>* c, std::index_sequence<I...>) {
    c->kernel(*static_cast<std::remove_cv_t<A>*>(c->arguments[I])...);
}
template <class... A> EMULATOR_GLUE void thread_body(void* argument) {
    call(static_cast<Call<A...>*>(argument), std::index_sequence_for<A...>());
}
template <class... A> int launch(void (*kernel)(A...), const Launch* how) {
    Call<A...> c{kernel, how->arguments};
    return run(how, thread_body<A...>, &c, reinterpret_cast<void*>(kernel));
}

}  // namespace emulator

#define EMULATOR_PUBLIC extern "C" __attribute__((visibility("default")))
#define EMULATOR_EXPORT(NAME)                                                  \
    EMULATOR_PUBLIC int emulator_launch_##NAME(const emulator::Launch* how) {  \
        return emulator::launch(NAME, how);                                    \
    }                                                                          \
    EMULATOR_PUBLIC const emulator::Type* emulator_signature_##NAME() {        \
        return emulator::signature(NAME);                                      \
    }

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp collectives. The trailing parameters are the place of the call, for messages.

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_AT emulator::Site{file, line}

inline void __syncthreads(EMULATOR_SITE) { emulator::barrier(emulator::PLAIN, 0, EMULATOR_AT); }
inline int __syncthreads_count(int p, EMULATOR_SITE) { return emulator::barrier(emulator::COUNT, p, EMULATOR_AT); }
inline int __syncthreads_and(int p, EMULATOR_SITE) { return emulator::barrier(emulator::AND, p, EMULATOR_AT); }
inline int __syncthreads_or(int p, EMULATOR_SITE) { return emulator::barrier(emulator::OR, p, EMULATOR_AT); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
    emulator::collective(emulator::SYNCWARP, mask, 0, 0, EMULATOR_AT);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATOR_SITE) {
    return static_cast<unsigned>(emulator::collective(emulator::BALLOT, mask, p != 0, 0, EMULATOR_AT));
}
inline int __any_sync(unsigned mask, int p, EMULATOR_SITE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATOR_SITE) { return __ballot_sync(mask, !p, file, line) == 0; }
inline unsigned __activemask() { return emulator::living_lanes(); }

namespace emulator {
template <class T> T shuffle(unsigned mask, T value, int source, Site site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves at most eight bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = collective(SHUFFLE, mask, word, source, site);
    memcpy(&value, &word, sizeof(T));
    return value;
}
}  // namespace emulator

// A source outside the segment of `width` lanes means the caller's own value.
template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMULATOR_SITE) {
    const int first = emulator::lane() & ~(width - 1);
    return emulator::shuffle(mask, v, first + (source & (width - 1)), EMULATOR_AT);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane(), source = lane ^ x;
    return emulator::shuffle(mask, v, source >= (lane & ~(width - 1)) + width ? lane : source, EMULATOR_AT);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
    return emulator::shuffle(mask, v, source < (lane & ~(width - 1)) ? lane : source, EMULATOR_AT);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
    return emulator::shuffle(mask, v, source >= (lane & ~(width - 1)) + width ? lane : source, EMULATOR_AT);
}

// CUDA has these for int and unsigned; the signedness decides what smaller means.
#define EMULATOR_REDUCE(NAME, KIND)                                                              \
    template <class T> T NAME(unsigned mask, T v, EMULATOR_SITE) {                               \
        static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "32-bit integers only");     \
        const uint64_t word = static_cast<uint64_t>(int64_t{v});                                 \
        return static_cast<T>(emulator::collective(emulator::KIND, mask, word, 0, EMULATOR_AT)); \
    }
EMULATOR_REDUCE(__reduce_add_sync, REDUCE_ADD)
EMULATOR_REDUCE(__reduce_min_sync, REDUCE_MIN)
EMULATOR_REDUCE(__reduce_max_sync, REDUCE_MAX)
EMULATOR_REDUCE(__reduce_and_sync, REDUCE_AND)
EMULATOR_REDUCE(__reduce_or_sync, REDUCE_OR)
EMULATOR_REDUCE(__reduce_xor_sync, REDUCE_XOR)

// Asynchronous copies (cp.async): a copy takes place when its thread waits for it, as late as it can on a GPU.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
    emulator::copy_async(to, from, size - zeros, zeros);
}
inline void __pipeline_commit() { emulator::close_copies(); }
inline void __pipeline_wait_prior(unsigned newest) { emulator::wait_for_copies(newest); }

// Hopper's products of warpgroups, which CUDA has as PTX only.
inline size_t __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }
inline void emulated_fence_proxy_async() { emulator::fence_proxy(); }
inline void emulated_wgmma_fence() { emulator::wgmma_fence(); }
inline void emulated_wgmma_commit_group() { emulator::wgmma_commit(); }
inline void emulated_wgmma_wait_group(unsigned newest) { emulator::wgmma_wait(newest); }
inline void emulated_wgmma_s8(int32_t* sums, int n, uint64_t a, uint64_t b, EMULATOR_SITE) {
    emulator::wgmma(sums, n, a, b, EMULATOR_AT);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
#define __trap() emulator::fail("__trap() at %s:%d", __FILE__, __LINE__)

// Fibers switch only where threads wait, so a plain read-modify-write is atomic here.
#define EMULATOR_ATOMIC(NAME, RESULT)                                              \
    template <class T> EMULATOR_GLUE T NAME(T* p, std::common_type_t<T> v) {       \
        emulator::check_atomic(p, sizeof(T));                                      \
        const T old = *p;                                                          \
        *p = (RESULT);                                                             \
        return old;                                                                \
    }
EMULATOR_ATOMIC(atomicAdd, old + v)
EMULATOR_ATOMIC(atomicSub, old - v)
EMULATOR_ATOMIC(atomicMax, v > old ? v : old)
EMULATOR_ATOMIC(atomicMin, v < old ? v : old)
EMULATOR_ATOMIC(atomicExch, v)
EMULATOR_ATOMIC(atomicOr, old | v)
EMULATOR_ATOMIC(atomicAnd, old& v)

// ---------------------------------------------------------------------------------------------------------------------
// Loads with cache hints, integers, bits, single operations with a stated rounding

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> inline void __stcg(T* p, std::common_type_t<T> v) { *p = v; }

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

extern "C" {
float sqrtf(float), fabsf(float), floorf(float), ceilf(float), rintf(float), nearbyintf(float), expf(float);
float copysignf(float, float), fminf(float, float), fmaxf(float, float), fmaf(float, float, float), logf(float);
double sqrt(double), fabs(double), copysign(double, double), fma(double, double, double);
}
inline float sqrt(float x) { return sqrtf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t{b} << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = (selector >> (4 * i)) & 15, byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 255;
        result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);  // bit 3: the byte's sign, spread over it
    }
    return result;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}

template <class To, class From> inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
