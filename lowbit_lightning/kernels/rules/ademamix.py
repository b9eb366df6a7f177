"""AdEMAMix (Pagliardini et al., 2024, algorithm 1 with the schedulers of its appendix A.1); decay as in AdamW."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    "ademamix",
    """
hyper: lr >= 0, 0 <= beta1 < 1, 0 <= beta2 < 1, eps >= 0, weight_decay >= 0, 0 <= beta3 < 1, alpha >= 0,
    log_beta1, log_beta3, t_alpha >= 0, t_beta3 >= 0
states: exp_avg, exp_avg_slow slow, exp_avg_sq >= 0
scalars:
    shrink = lr * weight_decay  # 1 - shrink would be rounded to float32, which adds up over steps
    rest1 = 1 - beta1
    rest2 = 1 - beta2
    root_correction = 1 / sqrt(1 - power(beta2, step))
    correction = 1 / (1 - power(beta1, step))
    warm = minimum(step / t_beta3, 1.0)
    rising = exponential(log_beta1 * log_beta3 / ((1 - warm) * log_beta3 + warm * log_beta1))
    rest3 = 1 - where(warm < 1, rising, beta3)
    weight = alpha * minimum(step / t_alpha, 1.0)
direction:
    p = fused(-shrink, p, p)
    exp_avg = fused(rest1, g, exp_avg * (beta1 * exp_avg_scale))
    exp_avg_sq = fused(rest2 * g, g, exp_avg_sq * (beta2 * exp_avg_sq_scale))
    exp_avg_slow = exp_avg_slow * exp_avg_slow_scale
    exp_avg_slow = exp_avg_slow + (g - exp_avg_slow) * rest3
    update = exp_avg * correction + weight * exp_avg_slow
finish:
    p = p - over_root(lr, update, exp_avg_sq, root_correction, eps)
""",
)
