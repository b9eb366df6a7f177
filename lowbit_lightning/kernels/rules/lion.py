"""Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2)."""

from lowbit_lightning.kernels.rules.rule import define

RULES = define(
    "lion",
    """
hyper: lr >= 0, 0 <= beta1 < 1, 0 <= beta2 < 1, weight_decay >= 0
states: exp_avg
scalars:
    shrink = lr * weight_decay  # 1 - shrink would be rounded to float32, which adds up over steps
    rest1 = 1 - beta1
    rest2 = 1 - beta2
direction:
    p = fused(-shrink, p, p)
    # sign(inf) is finite: the last term keeps a non-finite gradient visible
    update = sign(fused(rest1, g, (beta1 * exp_avg_scale) * exp_avg)) + (g - g)
    exp_avg = fused(rest2, g, (beta2 * exp_avg_scale) * exp_avg)
finish:
    p = fused(-lr, update, p)
""",
)
