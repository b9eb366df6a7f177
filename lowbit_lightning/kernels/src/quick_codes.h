// The codes of a thread's eight elements of a full block, in few instructions, where nothing is special: the same as
// dynamic_map.h's.
#pragma once
#include "over_root_quick.h"

// Whether it holds for all threads of the warp; where a group has several, of the CUDA block.
LB_FN bool holds_for_all(bool condition) {
    if constexpr (GROUP > 32) return __syncthreads_and(condition);
    else return __all_sync(ALL_LANES, condition);
}
// Which conditions hold for a thread of the group.
LB_FN void hold_for_any(bool& a, bool& b) {
    if constexpr (GROUP == 32) {
        a = __any_sync(ALL_LANES, a);
        b = __any_sync(ALL_LANES, b);
    } else {
        uint32_t key[2] = {a, b};
        group_max<GROUP>(key);
        a = key[0];
        b = key[1];
    }
}

// Of a block of both signs, from its largest magnitude: its codes and its scale. Whether they are right: for a warp, or
// all threads of the CUDA block where a group has several. The element of largest magnitude is among those whose f is
// 128: their sign is the scale's, if they have one.
template <class C>
LB_FN bool encode_signed(
    const float (&v)[PER_THREAD], float most, uint32_t place, uint32_t (&word)[PER_THREAD / 4], float& scale) {
    const float inverse = quick_reciprocal(most);
    uint32_t sign[PER_THREAD / 4], below = 0, above = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD / 4; ++i) {
        word[i] = encode_bytes<C>(v + 4 * i, inverse, place);
        sign[i] = sign_bytes(v + 4 * i);
        below |= word[i] & sign[i];
        above |= word[i] & ~sign[i];
    }
    bool has_below = below & 0x80808080u, has_above = above & 0x80808080u;
    hold_for_any(has_below, has_above);
    scale = has_above ? most : -most;
#pragma unroll
    for (int i = 0; i < PER_THREAD / 4; ++i) word[i] = signed_codes(word[i], has_above ? sign[i] : ~sign[i]);
    const bool easy = !(has_below && has_above) && most >= SMALLEST_SCALE && most <= 0x1p125f;
    return GROUP == 32 ? easy : holds_for_all(easy);
}
