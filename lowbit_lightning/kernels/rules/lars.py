"""LARS (You et al., 2017, "Large Batch Training of Convolutional Networks", algorithm 1)."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    "lars",
    """
hyper: lr >= 0, momentum >= 0, weight_decay >= 0, trust_coefficient >= 0, eps >= 0
states: momentum_buffer
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
