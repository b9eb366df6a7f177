"""The optimizers' update rules, one text each, for every backend; ``rule.py`` says what a text may contain.

A new rule is a new entry of ``RULES``: no backend changes. Each follows torch.optim in the order of its operations
where torch has the optimizer, and the paper where it has not.
"""

from __future__ import annotations

from typing import Any

from lowbit_lightning.kernels.rules.rule import Rule, State, fused, power, ratio

__all__ = ["RULES", "Rule", "State", "fused", "get", "power", "ratio"]

_MOMENTUM = State("momentum_buffer")
_EXP_AVG, _EXP_AVG_SQ = State("exp_avg"), State("exp_avg_sq", non_negative=True)
_MAX_EXP_AVG_SQ = State("max_exp_avg_sq", non_negative=True)

# -- SGD -------------------------------------------------------------------------------------------------------------

_SGD_HYPER = ("lr", "momentum", "dampening", "weight_decay")
_COUPLED_DECAY = "g = fused(weight_decay, p, g)\n"
_SGD: dict[str, Any] = {
    "hyper": _SGD_HYPER,
    "states": (_MOMENTUM,),
    # torch's first step copies the gradient into the buffer: no dampening then.
    "scalars": "gain = where(step == 1, 1.0, 1 - dampening)",
    "direction": _COUPLED_DECAY
    + "momentum_buffer = fused(gain, g, (momentum * momentum_buffer_scale) * momentum_buffer)",
}

# -- Adam and its kin ------------------------------------------------------------------------------------------------

_ADAM_HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")
_ADAM_SCALARS = """
    rest1 = 1 - beta1
    rest2 = 1 - beta2
    step_size = lr / (1 - power(beta1, step))
    root_correction = 1 / sqrt(1 - power(beta2, step))
"""
_DECAY = "decay = 1 - lr * weight_decay\n"
_DECOUPLED_DECAY = "p = p * decay\n"
# The same without rounding 1 - lr * weight_decay to float32, which adds up over steps; for rules that torch has not.
_SHRINK = "shrink = lr * weight_decay\n"
_SHRUNK = "p = fused(-shrink, p, p)\n"
_ADAM_MOMENTS = """
    exp_avg = fused(rest1, g, exp_avg * (beta1 * exp_avg_scale))
    exp_avg_sq = fused(rest2 * g, g, exp_avg_sq * (beta2 * exp_avg_sq_scale))
"""
_ADAM_FINISH = "p = p - step_size * exp_avg / (sqrt(exp_avg_sq) * root_correction + eps)"
_AMSGRAD = "max_exp_avg_sq = maximum(max_exp_avg_sq * max_exp_avg_sq_scale, exp_avg_sq)"
_AMSGRAD_FINISH = "p = p - step_size * exp_avg / (sqrt(max_exp_avg_sq) * root_correction + eps)"
_ADAM: dict[str, Any] = {"hyper": _ADAM_HYPER, "states": (_EXP_AVG, _EXP_AVG_SQ)}
_ADAM_MAX: dict[str, Any] = {
    "hyper": _ADAM_HYPER,
    "states": (_EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ),
    "finish": _AMSGRAD_FINISH,
}


def _rules() -> list[Rule]:
    return [
        Rule("sgd", ("lr", "weight_decay"), (), direction=_COUPLED_DECAY, finish="p = fused(-lr, g, p)"),
        Rule("sgd_momentum", **_SGD, finish="p = fused(-lr, momentum_buffer, p)"),
        Rule(
            "sgd_nesterov",
            **{**_SGD, "scalars": _SGD["scalars"] + "\npull = lr * momentum"},
            finish="p = fused(-lr, g, fused(-pull, momentum_buffer, p))",
        ),
        # Kingma & Ba, 2015; amsgrad: Reddi et al., 2018, the largest second moment so far.
        Rule("adam", **_ADAM, scalars=_ADAM_SCALARS, direction=_COUPLED_DECAY + _ADAM_MOMENTS, finish=_ADAM_FINISH),
        Rule("adam_amsgrad", **_ADAM_MAX, scalars=_ADAM_SCALARS, direction=_COUPLED_DECAY + _ADAM_MOMENTS + _AMSGRAD),
        # Loshchilov & Hutter, 2019, in torch's order: decay first.
        Rule(
            "adamw",
            **_ADAM,
            scalars=_DECAY + _ADAM_SCALARS,
            direction=_DECOUPLED_DECAY + _ADAM_MOMENTS,
            finish=_ADAM_FINISH,
        ),
        Rule(
            "adamw_amsgrad",
            **_ADAM_MAX,
            scalars=_DECAY + _ADAM_SCALARS,
            direction=_DECOUPLED_DECAY + _ADAM_MOMENTS + _AMSGRAD,
        ),
        # You et al., 2020, algorithm 2, phi the identity.
        Rule(
            "lamb",
            **_ADAM,
            scalars=_ADAM_SCALARS + "correction = 1 / (1 - power(beta1, step))",
            direction=_ADAM_MOMENTS
            + "update = exp_avg * correction / (sqrt(exp_avg_sq) * root_correction + eps) + weight_decay * p",
            finish="p = p - trusted * update",
            norms=("p", "update"),
            norm_scalars="trusted = lr * ratio(p_norm, update_norm)",
        ),
        # You et al., 2017, algorithm 1.
        Rule(
            "lars",
            ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"),
            (_MOMENTUM,),
            direction="""
                gradient = g
                momentum_buffer = (momentum * momentum_buffer_scale) * momentum_buffer
            """,
            finish="""
                momentum_buffer = momentum_buffer + trusted * (g + weight_decay * p)
                p = p - momentum_buffer
            """,
            norms=("p", "gradient"),
            norm_scalars="""
                denominator = gradient_norm + weight_decay * p_norm + eps
                trusted = lr * ratio(trust_coefficient * p_norm, denominator)
            """,
        ),
        # Chen et al., 2023, algorithm 2. sign(inf) is finite: the last term keeps a non-finite gradient visible.
        Rule(
            "lion",
            ("lr", "beta1", "beta2", "weight_decay"),
            (_EXP_AVG,),
            scalars=_SHRINK + "rest1 = 1 - beta1\nrest2 = 1 - beta2",
            direction=_SHRUNK
            + """
                update = sign(fused(rest1, g, (beta1 * exp_avg_scale) * exp_avg)) + (g - g)
                exp_avg = fused(rest2, g, (beta2 * exp_avg_scale) * exp_avg)
            """,
            finish="p = fused(-lr, update, p)",
        ),
        # Pagliardini et al., 2024, algorithm 1 with the schedulers of its appendix A.1; decay as in AdamW.
        Rule(
            "ademamix",
            (*_ADAM_HYPER, "beta3", "alpha", "log_beta1", "log_beta3", "t_alpha", "t_beta3"),
            (_EXP_AVG, State("exp_avg_slow", slow=True), _EXP_AVG_SQ),
            scalars=_SHRINK
            + _ADAM_SCALARS
            + """
                correction = 1 / (1 - power(beta1, step))
                warm = minimum(step / t_beta3, 1.0)
                rising = exponential(log_beta1 * log_beta3 / ((1 - warm) * log_beta3 + warm * log_beta1))
                rest3 = 1 - where(warm < 1, rising, beta3)
                weight = alpha * minimum(step / t_alpha, 1.0)
            """,
            direction=_SHRUNK
            + _ADAM_MOMENTS
            + """
                exp_avg_slow = exp_avg_slow * exp_avg_slow_scale
                exp_avg_slow = exp_avg_slow + (g - exp_avg_slow) * rest3
                update = exp_avg * correction + weight * exp_avg_slow
            """,
            finish="p = p - lr * update / (sqrt(exp_avg_sq) * root_correction + eps)",
        ),
        *_rmsprop_rules(),
        # Duchi et al., 2011.
        Rule(
            "adagrad",
            ("lr", "lr_decay", "weight_decay", "eps"),
            (State("sum", non_negative=True),),
            scalars="step_size = lr / (1 + (step - 1) * lr_decay)",
            direction=_COUPLED_DECAY + "sum = fused(g, g, sum * sum_scale)",
            finish="p = p - step_size * g / (sqrt(sum) + eps)",
        ),
    ]


def _rmsprop_rules() -> list[Rule]:
    """Tieleman & Hinton, 2012, with torch's variants: centered (Graves, 2013) and with momentum.

    Centered, the variance is a difference of two states; ``variance_floor`` keeps it above the error of their 8-bit
    forms.
    """
    average, mean = State("square_avg", non_negative=True), State("grad_avg")
    rules = []
    for centered in (False, True):
        direction = _COUPLED_DECAY + "square_avg = fused(rest * g, g, square_avg * (alpha * square_avg_scale))\n"
        denominator = "sqrt(square_avg) + eps"
        if centered:
            direction += """
                grad_avg = fused(rest, g, grad_avg * (alpha * grad_avg_scale))
                variance = maximum(square_avg - grad_avg * grad_avg, variance_floor * square_avg)
            """
            denominator = "sqrt(variance) + eps"
        hyper = ("lr", "alpha", "eps", "weight_decay", *(("variance_floor",) if centered else ()))
        states = (average, *((mean,) if centered else ()))
        name = "rmsprop_centered" if centered else "rmsprop"
        rules += [
            Rule(name, hyper, states, f"p = p - lr * g / ({denominator})", direction, "rest = 1 - alpha"),
            Rule(
                f"{name}_momentum",
                (*hyper, "momentum"),
                (*states, _MOMENTUM),
                "p = fused(-lr, momentum_buffer, p)",
                direction
                + f"momentum_buffer = (momentum * momentum_buffer_scale) * momentum_buffer + g / ({denominator})",
                "rest = 1 - alpha",
            ),
        ]
    return rules


RULES: dict[str, Rule] = {rule.name: rule for rule in _rules()}
"""Every rule by name."""


def get(name: str) -> Rule:
    """The rule of that name. Raises ValueError for an unknown one."""
    if name not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {name!r}")
    return RULES[name]
