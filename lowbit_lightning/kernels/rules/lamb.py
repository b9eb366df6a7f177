"""LAMB (You et al., 2020, "Large Batch Optimization for Deep Learning", algorithm 2), phi the identity."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    "lamb",
    """
hyper: lr >= 0, 0 <= beta1 < 1, 0 <= beta2 < 1, eps >= 0, weight_decay >= 0
states: exp_avg, exp_avg_sq >= 0
scalars:
    rest1 = 1 - beta1
    rest2 = 1 - beta2
    correction = 1 / (1 - power(beta1, step))
    root_correction = 1 / sqrt(1 - power(beta2, step))
direction:
    exp_avg = fused(rest1, g, exp_avg * (beta1 * exp_avg_scale))
    exp_avg_sq = fused(rest2 * g, g, exp_avg_sq * (beta2 * exp_avg_sq_scale))
    update = over_root(correction, exp_avg, exp_avg_sq, root_correction, eps) + weight_decay * p
norms of p, update:
    trusted = lr * ratio(p_norm, update_norm)
finish:
    p = p - trusted * update
""",
)
