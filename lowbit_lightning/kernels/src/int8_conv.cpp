// The implicit int8 products of convolutions; what they mean is said in the reference. int8_conv.h computes the sums.
#include "int8_conv.h"
#include "int8_engine.h"
#include "pages.h"

// B to panels of TAP_COLUMNS columns: panel[tap][group][column][neighbour]. It is [N][taps][K], or turned [K][taps][N].
template <class Engine>
static void pack_taps(const Operand<Engine>& a, const int8_t* b, bool turned, int64_t N, int64_t taps, int64_t K,
                      int threads) {
    const int64_t strips = (N + TAP_COLUMNS - 1) / TAP_COLUMNS;
    parallel_for(strips * taps, threads, [&](int64_t task) {
        const int64_t n = task / taps * TAP_COLUMNS, t = task % taps;
        const int64_t count = least(TAP_COLUMNS, N - n), columns = up_to_multiple(count, Engine::column_step);
        typename Engine::Element* panel = a.panels + (n * taps + t * columns) * a.stride;
        if (!turned) return pack_panel<Engine>(b + (n * taps + t) * K, taps * K, count, K, columns, panel);
        interleave<Engine>(a.stride, count, columns, panel, [&](int64_t k) __attribute__((always_inline)) {
            return k < K ? b + (k * taps + t) * N + n : nullptr;
        });
    });
}

template <class Engine, class T>
static void windows(const int8_t* a, const float* a_scales, const int8_t* b, bool turned, const float* b_scales,
                    const float* bias, int64_t N, int64_t K, const Taps& table, T* out, int threads) {
    const int64_t columns = up_to_multiple(N, Engine::column_step) * table.taps;
    const Operand<Engine> operand(a, table.pixels * table.images, K, K + 1, columns, threads);
    pack_taps(operand, b, turned, N, table.taps, K, threads);
    const Windows<Engine> w{operand, a_scales};
    multiply_windows(w, operand.panels, table, N, threads,
                     [=](int64_t m, int64_t n, int64_t count, const float* total) __attribute__((always_inline)) {
        const auto strip = [&](int64_t j, int width) __attribute__((always_inline)) {
            V y = load(total + j, W) * load(b_scales + n + j, width);
            if (bias) y = y + load(bias + n + j, width);
            store(out + m * N + n + j, y, width);
        };
        if (count == TAP_COLUMNS) return strip(0, W), strip(W, W);
        for (int64_t j = 0; j < count; j += W) strip(j, (int)least(W, count - j));
    });
}

// The same table from the other side: for each pixel of A the rows of the result that read it
static std::vector<int32_t> turned_table(const Taps& table) {
    std::vector<int32_t> turned(table.pixels * table.taps, -1);
    for (int64_t m = 0; m < table.results; ++m)
        for (int64_t t = 0; t < table.taps; ++t) {
            const int32_t from = table.at[m * table.taps + t];
            if (from >= 0) turned[from * table.taps + t] = (int32_t)m;
        }
    return turned;
}

// total[M][taps][channels] += sum * the smaller scale * the larger one
template <class Engine>
static void weights(const int8_t* a, const float* a_scales, const int8_t* x, const float* x_scales, int64_t M,
                    int64_t channels, const Taps& table, float* total, int threads) {
    const Operand<Engine> operand(a, M, table.results * table.images, PART, 0, threads);
    multiply_weights(operand, x, channels, table, threads,
                     [=](int64_t first, int64_t rows, int64_t t, int64_t c, int64_t count, const int32_t* sums,
                         int64_t pitch) {
        for (int64_t j = 0; j < count; j += W) {
            const int width = (int)least(W, count - j);
            const V x_scale = load(x_scales + c + j, width);
            for (int64_t i = 0; i < rows; ++i) {
                float* to = total + ((first + i) * table.taps + t) * channels + c + j;
                const V scale = splat<V>(a_scales[first + i]);  // of the two below one is NaN if either scale is
                const V sum = to_float(load_raw<I>(sums + i * pitch + j, W));
                store(to, load(to, width) + sum * minimum(scale, x_scale) * maximum(x_scale, scale), width);
            }
        }
    });
}

extern "C" {
const char* lb_int8_conv_instructions() { return LB_NAME; }

// dtype: 0 float32, 1 float16, 2 bfloat16. of_input: A is the gradient [results][K], B is [K][taps][N], and out has a
// row for each pixel
void lb_int8_conv(const int8_t* a, const float* a_scales, const int8_t* b, const float* b_scales, const float* bias,
                  int64_t N, int64_t K, const int32_t* table, int64_t results, int64_t taps, int64_t pixels,
                  int64_t images, int of_input, void* out, int dtype, int threads) {
    Taps forward{table, results, taps, pixels, images};
    const std::vector<int32_t> turned = of_input ? turned_table(forward) : std::vector<int32_t>();
    const Taps way = of_input ? Taps{turned.data(), pixels, taps, results, images} : forward;
    const auto run = [&](auto* to) {
        ask_for_huge_pages(to, way.results * images * N * (int64_t)sizeof *to);
        LB_BY_ENGINE(windows<Engine>(a, a_scales, b, of_input, b_scales, bias, N, K, way, to, threads))
    };
    if (dtype == 0) run((float*)out);
    else if (dtype == 1) run((Half*)out);
    else run((BFloat16*)out);
}

void lb_int8_conv_weight(const int8_t* a, const float* a_scales, const int8_t* x, const float* x_scales, int64_t M,
                         int64_t channels, const int32_t* table, int64_t results, int64_t taps, int64_t pixels,
                         int64_t images, float* total, int threads) {
    LB_BY_ENGINE(weights<Engine>(a, a_scales, x, x_scales, M, channels, {table, results, taps, pixels, images}, total,
                                 threads))
}
}
