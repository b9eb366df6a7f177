// Low-bit weights: dequantised, and multiplied with x.
#include "lowbit_decode.h"
#include "lowbit_gemm.h"
#include "lowbit_product.h"

template <bool NATURAL, class T>
static void decode(const Form& form, const uint8_t* packed, const uint8_t* scales, const int64_t* indices, int64_t rows,
                   int64_t first_chunk, int64_t last_chunk, T* out, int64_t stride, int threads) {
    constexpr int64_t STEP = 8;
    parallel_for(ceil_div(rows, STEP), threads, [&](int64_t task) {
        const Values values(form);
        const Spread spread(form);
        std::vector<float> buffer(2 * (form.blocks + PADDING));
        float* offsets = buffer.data() + form.blocks + PADDING;
        for (int64_t i = task * STEP; i < least(rows, (task + 1) * STEP); ++i) {
            const int64_t row = indices ? indices[i] : i;
            decode_scales(form, scales + row * form.scales_stride, buffer.data(), offsets);
            decode_row<NATURAL>(form, values, spread, packed + row * form.packed_stride, buffer.data(), offsets,
                                first_chunk, last_chunk, out + i * stride);
        }
    });
}

template <class F> static void by_dtype(int dtype, void* out, const F& run) {
    if (dtype == 0) run((float*)out);
    else if (dtype == 1) run((Half*)out);
    else run((BFloat16*)out);
}

extern "C" {
int64_t lb_lowbit_phases() { return PHASES; }
int64_t lb_lowbit_lanes() { return W; }
int64_t lb_lowbit_pairs() { return LB_PAIRS; }  // whether the processor multiplies pairs of bfloat16

// dtype: 0 float32, 1 float16, 2 bfloat16. indices: of `rows` rows, or null for the first ones.
void lb_lowbit_dequantize(const Form* form, const uint8_t* packed, const uint8_t* scales, const int64_t* indices,
                          int64_t rows, void* out, int dtype, int threads) {
    const int64_t chunks = ceil_div(form->length, CHUNK);
    by_dtype(dtype, out, [&](auto* to) {
        decode<true>(*form, packed, scales, indices, rows, 0, chunks, to, form->length, threads);
    });
}
// `rows` rows, chunks first_chunk to last_chunk - 1 of each, in the order [chunk][phase][lane].
void lb_lowbit_panel(const Form* form, const uint8_t* packed, const uint8_t* scales, int64_t rows, int64_t first_chunk,
                     int64_t last_chunk, void* out, int dtype, int threads) {
    const int64_t stride = (last_chunk - first_chunk) * CHUNK;
    by_dtype(dtype, out, [&](auto* to) {
        decode<false>(*form, packed, scales, nullptr, rows, first_chunk, last_chunk, to, stride, threads);
    });
}
// Whether lb_lowbit_gemm multiplies this dtype.
int64_t lb_lowbit_multiplies(int dtype) {
    return dtype == 0 ? LB_MULTIPLIES_FLOATS : dtype == 2 ? LB_MULTIPLIES_PAIRS : 0;
}
// out[M][N] = x[M][K] @ weight.T (+ bias), all but bias of one dtype. x's rows are `stride` elements apart: an even
// number for bfloat16, so if K is odd a zero follows them.
void lb_lowbit_gemm(const Form* form, const uint8_t* packed, const uint8_t* scales, int64_t N, const void* x,
                    int64_t stride, int64_t M, const float* bias, void* out, int dtype, int threads) {
    (void)form, (void)packed, (void)scales, (void)N, (void)x, (void)stride, (void)M, (void)bias, (void)out;
    (void)dtype, (void)threads;
#if LB_MULTIPLIES_FLOATS
    if (dtype == 0) many_rows(*form, packed, scales, N, (const float*)x, stride, M, bias, (float*)out, threads);
#endif
#if LB_MULTIPLIES_PAIRS
    if (dtype == 2)
        many_rows(*form, packed, scales, N, (const float*)x, stride / 2, M, bias, (BFloat16*)out, threads);
#endif
}
// out[M][N] = x[M][K] @ weight.T (+ bias), all but bias of one dtype; for few rows of x
void lb_lowbit_gemv(const Form* form, const uint8_t* packed, const uint8_t* scales, int64_t N, const void* x,
                    int64_t M, const float* bias, void* out, int dtype, int threads) {
    by_dtype(dtype, out, [&](auto* to) { few_rows(*form, packed, scales, N, (decltype(to))x, M, bias, to, threads); });
}
}
