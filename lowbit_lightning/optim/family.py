"""The optimizers: each a rule of ``kernels/rules`` and a constructor with torch.optim's signature, or the paper's."""

from __future__ import annotations

from collections.abc import Iterable
from math import log
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowbit_lightning.optim.base import LowBitOptimizer
from lowbit_lightning.optim.options import Options

__all__ = ["LAMB", "LARS", "SGD", "AdEMAMix", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]

Betas = tuple[float, float]


class SGD(LowBitOptimizer):
    """Stochastic gradient descent, with momentum and Nesterov's variant; semantics of ``torch.optim.SGD``.

    One state, ``momentum_buffer``; no state without momentum. Args: as ``torch.optim.SGD``, and ``Options``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov}, options)

    def _rule(self, group: dict[str, Any]) -> str:
        if not group["momentum"]:
            return "sgd"
        return "sgd_nesterov" if group["nesterov"] else "sgd_momentum"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``LowBitOptimizer``."""
        group = {**self.defaults, **param_group}
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening 0, "
                f"got momentum={group['momentum']}, dampening={group['dampening']}"
            )
        super().add_param_group(param_group)

    def _completed(self, entries: dict[str, Any]) -> dict[str, Any]:
        if "step" in entries:
            return entries
        # torch's SGD keeps no count, and None for a buffer that is not there yet
        return {"step": 1.0, **entries} if entries.get("momentum_buffer") is not None else {}


class Adam(LowBitOptimizer):
    """Adam (Kingma & Ba, 2015); semantics of ``torch.optim.Adam``: weight decay is added to the gradient.

    States ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad. Args: as ``torch.optim.Adam``, and
    ``Options``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return ("adamw" if group["decoupled_weight_decay"] else "adam") + ("_amsgrad" if group["amsgrad"] else "")


class AdamW(LowBitOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019); semantics of ``torch.optim.AdamW``: decay first.

    States ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad. Args: as ``torch.optim.AdamW``, and
    ``Options``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "adamw_amsgrad" if group["amsgrad"] else "adamw"


class RMSprop(LowBitOptimizer):
    """RMSprop (Tieleman & Hinton, 2012); semantics of ``torch.optim.RMSprop``, centered and momentum included.

    States ``square_avg``, ``grad_avg`` (centered), ``momentum_buffer`` (momentum). If centered, the variance is a
    difference of two states. If they have 8 bits, it is kept at 1/64 of ``square_avg`` or more, which is the error of
    the maps. Args: as ``torch.optim.RMSprop``, and ``Options``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "momentum": momentum, "centered": centered}, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "rmsprop" + ("_centered" if group["centered"] else "") + ("_momentum" if group["momentum"] else "")

    @staticmethod
    def _derived(group: dict[str, Any], bits: int) -> dict[str, float]:
        return {"variance_floor": 1 / 64 if bits == 8 else 0.0}


class Adagrad(LowBitOptimizer):
    """Adagrad (Duchi et al., 2011); semantics of ``torch.optim.Adagrad``.

    One state, ``sum``. It only grows, and in 8 bits an addition of less than half a step of its map is lost. But each
    block's largest sum is stored exactly, and the others keep their ratio to it, so on long runs they grow with it.
    Args: as ``torch.optim.Adagrad``, and ``Options``.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**defaults, "initial_accumulator_value": initial_accumulator_value}, options)

    def state_dict(self, *, bits: int | None = None) -> dict[str, Any]:
        """See ``LowBitOptimizer``."""
        saved = super().state_dict(bits=bits)
        if bits == 32:  # torch's Adagrad makes its sums when it is built, and looks for all of them
            for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=True):
                value = float(ours["initial_accumulator_value"])
                for key, p in zip(theirs["params"], ours["params"], strict=True):
                    if key not in saved["state"]:
                        full = torch.full_like(p, value, dtype=torch.float32, requires_grad=False)
                        saved["state"][key] = {"step": torch.tensor(0.0, dtype=torch.float32), "sum": full}
        return saved


class Lion(LowBitOptimizer):
    """Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2): the sign of a momentum.

    One state, ``exp_avg``. Use a learning rate 3 to 10 times smaller, and a weight decay as much larger, than
    AdamW's.
    """

    rule = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)


class LAMB(LowBitOptimizer):
    """Layer-wise adaptive moments for large batches (You et al., 2020): AdamW with a trust ratio ||p|| / ||update||.

    Norms are taken over whole parameters, summed over the ranks that share one. States ``exp_avg``, ``exp_avg_sq``.
    Args: as ``AdamW``.
    """

    rule = "lamb"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)


class LARS(LowBitOptimizer):
    """Layer-wise adaptive rates (You et al., 2017, "Large Batch Training of Convolutional Networks", algorithm 1).

    Momentum SGD whose rate is scaled, by parameter, by ``trust_coefficient * ||p|| / (||g|| + weight_decay * ||p|| +
    eps)``; 1 where either side is zero. Norms are of whole parameters, summed over the ranks that share one. One
    state, ``momentum_buffer``.
    """

    rule = "lars"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient}, options)


class AdEMAMix(LowBitOptimizer):
    """AdamW with a second, slow momentum (Pagliardini et al., 2024, "The AdEMAMix Optimizer").

    ``betas`` are those of the fast momentum, the second moment and the slow momentum; ``alpha`` is the slow one's
    weight. With ``t_alpha`` and ``t_beta3`` (steps) both are warmed up as the paper's appendix has it; None means
    from the start. States ``exp_avg``, ``exp_avg_slow``, ``exp_avg_sq``; the slow one is always kept in 32 bits: a step
    changes it by less than the resolution of 8 bits, so it would stand still and the loss would be worse (by 6 % after
    2000 steps of a small language model). Args: names as in bitsandbytes, and ``Options``.
    """

    rule = "ademamix"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, options)

    @staticmethod
    def _derived(group: dict[str, Any], bits: int) -> dict[str, float]:
        beta1, _, beta3 = group["betas"]
        tiny = 1e-300  # in place of a beta of zero, which has no logarithm
        return {
            "log_beta1": log(max(beta1, tiny)),
            "log_beta3": log(max(beta3, tiny)),
            "t_alpha": float(group["t_alpha"] or 1),
            "t_beta3": float(group["t_beta3"] or 1),
        }
