"""Adagrad (Duchi et al., 2011)."""

from lowbit_lightning.kernels.rules.rule import NOT_NEGATIVE, State, define

RULES = define(
    "adagrad",
    hyper={
        "lr": NOT_NEGATIVE,
        "lr_decay": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "initial_accumulator_value": NOT_NEGATIVE,
    },
    states=(State("sum", non_negative=True),),
    text="""
scalars:
    step_size = lr / (1 + (step - 1) * lr_decay)
direction:
    g = fused(weight_decay, p, g)
    sum = fused(g, g, sum * sum_scale)
finish:
    p = p - step_size * g / (sqrt(sum) + eps)
""",
)
