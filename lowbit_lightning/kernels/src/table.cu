// Writes words that travel as a kernel's argument to device memory: how the table of parameters gets there.
//
// A copy from pinned memory would need that memory to stay as it is until the copy has run, and under a CUDA graph for
// the graph's whole life, at every replay. An argument is copied by the launch itself.
struct Words { long long word[WORDS]; };

extern "C" __global__ void write_words(const __grid_constant__ Words words, int count, long long* to) {
    if ((int)threadIdx.x < count) to[threadIdx.x] = words.word[threadIdx.x];
}
