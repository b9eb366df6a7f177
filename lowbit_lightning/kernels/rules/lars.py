"""LARS (You et al., 2017, "Large Batch Training of Convolutional Networks", algorithm 1)."""

from lowbit_lightning.kernels.rules.rule import NOT_NEGATIVE, State, define

RULES = define(
    "lars",
    hyper={
        "lr": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "trust_coefficient": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
    },
    states=(State("momentum_buffer"),),
    text="""
direction:
    gradient = g
    momentum_buffer = (momentum * momentum_buffer_scale) * momentum_buffer
norms of p, gradient:
    denominator = gradient_norm + weight_decay * p_norm + eps
    trusted = lr * ratio(trust_coefficient * p_norm, denominator)
finish:
    momentum_buffer = momentum_buffer + trusted * (g + weight_decay * p)
    p = p - momentum_buffer
""",
)
