// f * a / (sqrt(x) * c + eps), each operation rounded: what the rules that divide by a root have in common. A rule asks
// the Roots that it is given: these, or over_root_quick.h's on a GPU.
#pragma once

struct Exact {
    template <class V> LB_METHOD V over(float f, V a, V x, float c, float eps) {
        return f * a / (sqrt(x) * c + eps);
    }
};
