"""Adagrad (Duchi et al., 2011)."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    "adagrad",
    """
hyper: lr >= 0, lr_decay >= 0, weight_decay >= 0, eps >= 0, initial_accumulator_value >= 0
states: sum >= 0
scalars:
    step_size = lr / (1 + (step - 1) * lr_decay)
    one = 1.0
direction:
    g = fused(weight_decay, p, g)
    sum = fused(g, g, sum * sum_scale)
finish:
    p = p - over_root(step_size, g, sum, one, eps)
""",
)
