// The first launch of an optimizer step, one thread per parameter: advances the step counts and computes the rule's
// scalars. On the device, so that nothing waits for the host: step counts, learning rate and factors may live there.
//
// Specialised by the rule's generated text.
#include "gpu.h"
#include "rule_scalars.h"
#include "rule.h"  // generated from the rule
#include "parameter.h"
#include "step_settings.h"

struct Hyper { double value[HYPER]; };

// scalars: [count]. factor: of the gradients. `advance` is for the step: norms change nothing and are never skipped.
extern "C" __global__ void prepare(
    const Parameter* parameters, int64_t count, const Hyper hyper, const StepSettings told, const double* square_sums,
    int advance, Scalars* scalars, float* factor) {
    if (advance && skipped(told)) return;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0) *factor = factor_of(told);
    if (i >= count) return;
    const float step = *parameters[i].step + 1.0f;
    if (advance) *parameters[i].step = step;
    const double* sums = nullptr;
#if RULE_NORMS
    if (square_sums) sums = square_sums + i * RULE_NORMS;
#endif
    scalars[i] = scalars_of(told, hyper.value, step, sums);
}
