"""Stochastic gradient descent, with momentum and Nesterov's variant (Sutskever et al., 2013), in torch's order."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    {"sgd": "", "sgd_momentum": "momentum", "sgd_nesterov": "momentum nesterov"},
    """
hyper: lr >= 0, momentum >= 0, dampening, weight_decay >= 0
states: momentum_buffer
scalars:
    if momentum:
        gain = where(step == 1, 1.0, 1 - dampening)  # torch's first step copies the gradient into the buffer
    if nesterov:
        pull = lr * momentum
direction:
    g = fused(weight_decay, p, g)
    if momentum:
        momentum_buffer = fused(gain, g, (momentum * momentum_buffer_scale) * momentum_buffer)
finish:
    if nesterov:
        p = fused(-lr, g, fused(-pull, momentum_buffer, p))
    else:
        if momentum:
            p = fused(-lr, momentum_buffer, p)
        else:
            p = fused(-lr, g, p)
""",
)
