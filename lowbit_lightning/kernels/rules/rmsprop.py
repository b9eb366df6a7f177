"""RMSprop (Tieleman & Hinton, 2012) with torch's variants: centered (Graves, 2013) and with momentum.

Centered, the variance is a difference of two states; ``variance_floor`` keeps it above the error of their 8-bit forms.
"""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    {
        "rmsprop": "",
        "rmsprop_momentum": "momentum",
        "rmsprop_centered": "centered",
        "rmsprop_centered_momentum": "centered momentum",
    },
    """
hyper: lr >= 0, alpha >= 0, eps >= 0, weight_decay >= 0, variance_floor, momentum >= 0
states: square_avg >= 0, grad_avg, momentum_buffer
scalars:
    rest = 1 - alpha
    one = 1.0
direction:
    g = fused(weight_decay, p, g)
    square_avg = fused(rest * g, g, square_avg * (alpha * square_avg_scale))
    if centered:
        grad_avg = fused(rest, g, grad_avg * (alpha * grad_avg_scale))
        variance = maximum(square_avg - grad_avg * grad_avg, variance_floor * square_avg)
        # where square_avg has overflowed, inf - inf would make a finite gradient's parameter NaN; torch's stays
        variance = where(square_avg - square_avg == square_avg - square_avg, variance, square_avg)
    else:
        variance = square_avg
    if momentum:
        momentum_buffer = (momentum * momentum_buffer_scale) * momentum_buffer + over_root(one, g, variance, one, eps)
finish:
    if momentum:
        p = fused(-lr, momentum_buffer, p)
    else:
        p = p - over_root(lr, g, variance, one, eps)
""",
)
