"""AdEMAMix (Pagliardini et al., 2024, algorithm 1 with the schedulers of its appendix A.1); decay as in AdamW."""

from lowbit_lightning.kernels.rules.rule import FRACTION, FREE, NOT_NEGATIVE, State, define

RULES = define(
    "ademamix",
    hyper={
        "lr": NOT_NEGATIVE,
        "beta1": FRACTION,
        "beta2": FRACTION,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "beta3": FRACTION,
        "alpha": NOT_NEGATIVE,
        "log_beta1": FREE,
        "log_beta3": FREE,
        "t_alpha": NOT_NEGATIVE,
        "t_beta3": NOT_NEGATIVE,
    },
    states=(State("exp_avg"), State("exp_avg_slow", slow=True), State("exp_avg_sq", non_negative=True)),
    text="""
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
    p = p - lr * update / (sqrt(exp_avg_sq) * root_correction + eps)
""",
)
