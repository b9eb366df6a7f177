// A quantisation block and the group of threads that it belongs to.
//
// A block of BLOCK elements belongs to BLOCK / 8 threads, 8 elements each: 4 threads for BLOCK = 32, a warp for 256, 16
// warps for 4096. A thread's elements lie in runs of RUN, so that its accesses are 16 bytes wide and those of a warp
// adjacent: two runs of 4 floats, or one run of 8 halves.
#pragma once

constexpr int PER_THREAD = 8;
constexpr int GROUP = BLOCK / PER_THREAD;         // threads
constexpr int THREADS = GROUP > 256 ? GROUP : 256;  // of a CUDA block, which handles several quantisation blocks
constexpr int GROUPS = THREADS / GROUP;
constexpr int WARPS = THREADS / 32;

// Where a quantisation block lies.
struct Position {
    int64_t start;  // its first element
    int64_t block;  // its number: the index of its scale
    int n;          // its length; 0: none, the thread only keeps its group company
};

LB_FN Position position_of(int64_t block, int64_t blocks_per_row, int64_t row_length) {
    // A 64-bit division takes a hundred instructions, a 32-bit one twenty.
    const bool small = ((block | blocks_per_row) >> 32) == 0;
    const int64_t row = small ? (uint32_t)block / (uint32_t)blocks_per_row : block / blocks_per_row;
    const int64_t column = (block - row * blocks_per_row) * BLOCK;
    const int64_t left = row_length - column;
    return {row * row_length + column, block, (int)(left < BLOCK ? left : BLOCK)};
}

// A thread's elements of its block, in runs of RUN adjacent ones. Accesses in packets want the address of the thread's
// first element, others that of the block.
template <int RUN> struct Share {
    static constexpr int STRIDE = BLOCK / (PER_THREAD / RUN);  // from a run to the next
    // Index in the block of the thread's i-th element.
    LB_FN int index(int i) {
        return i / RUN * STRIDE + (int)(threadIdx.x % GROUP) * RUN + i % RUN;
    }
    // Whether the elements of a full block that starts here can be accessed in packets.
    template <class T> LB_FN bool aligned(const T* block) {
        return ((uint64_t)block & (ACCESS_WIDTH<T, RUN> - 1)) == 0;
    }
    template <bool PACKETS, class T, class R> LB_FN void load(const T* block, int n, R (&v)[PER_THREAD]) {
        assume_global(block);
        if constexpr (PACKETS) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i += RUN) load_packet<RUN>(block + i / RUN * STRIDE, v + i);
        } else {
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) v[i] = index(i) < n ? raise(block[index(i)]) : R(0);
        }
    }
    template <bool PACKETS, class T, class R> LB_FN void store(T* block, int n, const R (&v)[PER_THREAD]) {
        assume_global(block);
        if constexpr (PACKETS) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i += RUN) store_packet<RUN>(block + i / RUN * STRIDE, v + i);
        } else {
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i)
                if (index(i) < n) block[index(i)] = (T)v[i];
        }
    }
    // The same of floats, rounded to T.
    template <bool PACKETS, class T> LB_FN void store_rounded(T* block, int n, const float (&v)[PER_THREAD]) {
        assume_global(block);
        if constexpr (PACKETS) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i += RUN) ::store_rounded<RUN>(block + i / RUN * STRIDE, v + i);
        } else {
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i)
                if (index(i) < n) block[index(i)] = narrow<T>(v[i]);
        }
    }
    // The same of bytes, in packets.
    LB_FN void store_bytes(uint8_t* block, const uint32_t (&word)[PER_THREAD / 4]) {
        assume_global(block);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i += RUN)
            copy((const Packet<RUN>*)(word + i / 4), (Packet<RUN>*)(block + i / RUN * STRIDE));
    }

  private:
    LB_FN int32_t raise(uint8_t code) { return (int32_t)(code | COUNTED); }
    template <class T> LB_FN float raise(T x) { return widen(x); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. Every thread of the CUDA block has to call them, at the same place.

template <int N> LB_FN uint32_t lanes_max(uint32_t key) {  // over N adjacent lanes
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if (N == 32) return __reduce_max_sync(ALL_LANES, key);
#endif
#pragma unroll
    for (int half = N / 2; half; half /= 2) {
        const uint32_t other = __shfl_xor_sync(ALL_LANES, key, half);
        key = key > other ? key : other;
    }
    return key;
}

// The largest of each key over the threads of a group of SIZE threads; all of them get it. What one thread of the group
// reads before, another may overwrite after.
template <int SIZE, int KEYS> LB_FN void group_max(uint32_t (&key)[KEYS]) {
    constexpr int LANES = SIZE < 32 ? SIZE : 32;
#pragma unroll
    for (int k = 0; k < KEYS; ++k) key[k] = lanes_max<LANES>(key[k]);
    __syncwarp();  // a shuffle orders no memory
    if constexpr (SIZE > 32) {
        __shared__ uint32_t of_warp[KEYS][1024 / 32];
        const int warp = threadIdx.x / 32, first = threadIdx.x / SIZE * (SIZE / 32);
        __syncthreads();  // the keys of the last call have been read
        if (threadIdx.x % 32 == 0)
            for (int k = 0; k < KEYS; ++k) of_warp[k][warp] = key[k];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KEYS; ++k)
            for (int w = first; w < first + SIZE / 32; ++w) key[k] = key[k] > of_warp[k][w] ? key[k] : of_warp[k][w];
    }
}

// What a value says about its block's scale, as a number whose maximum over the block decides. Signed: the value of
// largest magnitude, positive on a tie. Otherwise: the largest value, if any is positive.
LB_FN uint32_t scale_key(float x, bool is_signed) {
    const int32_t bits = to_bits(x);
    if (!is_signed) return bits > 0 ? (uint32_t)bits : 0;
    return (uint32_t)bits << 1 | (~(uint32_t)bits >> 31);
}
LB_FN float scale_of(uint32_t key, bool is_signed) {
    if (!is_signed) return not_too_small(from_bits((int32_t)key));
    const float magnitude = from_bits((int32_t)(key >> 1));
    return not_too_small(key & 1 ? magnitude : -magnitude);
}
