// The first launch of an optimizer step, one thread per parameter: advances the step counts and computes the rule's
// scalars. On the device, so that nothing waits for the host: step counts, learning rate and factors may live there.
//
// Specialised by the rule's generated text.
#include "gpu.h"
#include "rule_scalars.h"
#include "rule.h"  // generated from rules.py
#include "parameter.h"

constexpr int HYPER = RULE_HYPER ? RULE_HYPER : 1;
struct Hyper { double value[HYPER]; };

// scalars: [count]. factor: of the gradients. `skip` and `advance` are for the step: the norms change nothing.
extern "C" __global__ void prepare(
    const Parameter* parameters, int64_t count, const Hyper hyper, const float* lr, const float* unscale,
    const float* clip, const float* skip, const double* square_sums, int maximize, int advance, Scalars* scalars,
    float* factor) {
    if (skip && *skip != 0.0f) return;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0) {
        float f = 1.0f;
        if (unscale) f *= *unscale;
        if (clip) f *= *clip;
        *factor = maximize ? -f : f;
    }
    if (i >= count) return;
    const float step = *parameters[i].step + 1.0f;
    if (advance) *parameters[i].step = step;
    double values[HYPER];
#pragma unroll
    for (int h = 0; h < RULE_HYPER; ++h) values[h] = hyper.value[h];
    if (lr) values[0] = *lr;
    const double* sums = nullptr;
#if RULE_NORMS
    if (square_sums) sums = square_sums + i * RULE_NORMS;
#endif
    scalars[i] = rule_scalars(values, step, sums);
}
