"""Adam (Kingma & Ba, 2015), AdamW (Loshchilov & Hutter, 2019), and amsgrad (Reddi et al., 2018), which divides by the
largest second moment so far. In torch's order: AdamW decays first."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    {"adam": "", "adam_amsgrad": "amsgrad", "adamw": "decoupled", "adamw_amsgrad": "decoupled amsgrad"},
    """
hyper: lr >= 0, 0 <= beta1 < 1, 0 <= beta2 < 1, eps >= 0, weight_decay >= 0
states: exp_avg, exp_avg_sq >= 0, max_exp_avg_sq >= 0
scalars:
    if decoupled:
        decay = 1 - lr * weight_decay
    rest1 = 1 - beta1
    rest2 = 1 - beta2
    step_size = lr / (1 - power(beta1, step))
    root_correction = 1 / sqrt(1 - power(beta2, step))
direction:
    if decoupled:
        p = p * decay
    else:
        g = fused(weight_decay, p, g)
    exp_avg = fused(rest1, g, exp_avg * (beta1 * exp_avg_scale))
    exp_avg_sq = fused(rest2 * g, g, exp_avg_sq * (beta2 * exp_avg_sq_scale))
    if amsgrad:
        max_exp_avg_sq = maximum(max_exp_avg_sq * max_exp_avg_sq_scale, exp_avg_sq)
finish:
    if amsgrad:
        p = p - over_root(step_size, exp_avg, max_exp_avg_sq, root_correction, eps)
    else:
        p = p - over_root(step_size, exp_avg, exp_avg_sq, root_correction, eps)
""",
)
