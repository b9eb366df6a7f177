"""Stochastic gradient descent, with momentum and Nesterov's variant (Sutskever et al., 2013), in torch's order."""

from lowbit_lightning.kernels.rules.rule import FREE, NOT_NEGATIVE, State, define

RULES = define(
    {"sgd": "", "sgd_momentum": "momentum", "sgd_nesterov": "momentum nesterov"},
    hyper={"lr": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "dampening": FREE, "weight_decay": NOT_NEGATIVE},
    states=(State("momentum_buffer"),),
    text="""
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
