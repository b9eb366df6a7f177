"""RMSprop (Tieleman & Hinton, 2012) with torch's variants: centered (Graves, 2013) and with momentum.

Centered, the variance is a difference of two states; ``variance_floor`` keeps it above the error of their 8-bit forms.
"""

from lowbit_lightning.kernels.rules.rule import FREE, NOT_NEGATIVE, State, define

RULES = define(
    {
        "rmsprop": "",
        "rmsprop_momentum": "momentum",
        "rmsprop_centered": "centered",
        "rmsprop_centered_momentum": "centered momentum",
    },
    hyper={
        "lr": NOT_NEGATIVE,
        "alpha": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "variance_floor": FREE,
        "momentum": NOT_NEGATIVE,
    },
    states=(State("square_avg", non_negative=True), State("grad_avg"), State("momentum_buffer")),
    text="""
scalars:
    rest = 1 - alpha
direction:
    g = fused(weight_decay, p, g)
    square_avg = fused(rest * g, g, square_avg * (alpha * square_avg_scale))
    if centered:
        grad_avg = fused(rest, g, grad_avg * (alpha * grad_avg_scale))
        variance = maximum(square_avg - grad_avg * grad_avg, variance_floor * square_avg)
    else:
        variance = square_avg
    if momentum:
        momentum_buffer = (momentum * momentum_buffer_scale) * momentum_buffer + g / (sqrt(variance) + eps)
finish:
    if momentum:
        p = fused(-lr, momentum_buffer, p)
    else:
        p = p - lr * g / (sqrt(variance) + eps)
""",
)
