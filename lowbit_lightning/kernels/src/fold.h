// The order in which squares are summed, as in reference/step.py, once for every compiled backend: values are folded in
// halves, element j with element j + half, until one is left.
#pragma once

constexpr int FOLD = 256;  // sums of blocks that are folded together: formats.FOLD

// FROM values to TO of them.
template <int FROM, int TO = 1, class T> LB_FN void fold_halves(T* v) {
#pragma unroll
    for (int half = FROM / 2; half >= TO; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) v[k] += v[k + half];
}
