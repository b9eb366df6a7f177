"""``bitsandbytes.optim``: its names and signatures over the optimizers of ``lowbit_lightning.optim``.

A name is a family (``Adam``), with bits (``Adam8bit``, ``Adam32bit``) or pages (``PagedAdam8bit``) fixed. A family
takes both as arguments: ``optim_bits`` (32) and ``is_paged``. All have ``min_8bit_size`` (4096), and refuse ``args``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowbit_lightning import optim as ours
from lowbit_lightning.bitsandbytes.overrides import GlobalOptimManager
from lowbit_lightning.bitsandbytes.refused import refusing
from lowbit_lightning.optim.options import check_group

Params = Iterable[Any]
Betas = tuple[float, float]


class _Bitsandbytes(ours.LowBitOptimizer):
    """What all of them share: options by bitsandbytes' names, and overrides of single parameters."""

    fixed_bits: int | None = None
    paged = False

    @classmethod
    def _options(cls, optim_bits: int | None, args: Any, min_8bit_size: int, is_paged: bool = False) -> dict[str, Any]:
        """The options of ``lowbit_lightning.optim``."""
        if args is not None:
            raise ValueError("args must be None: pass optim_bits and min_8bit_size as arguments")
        if cls.fixed_bits is not None and optim_bits not in (None, cls.fixed_bits):
            raise ValueError(
                f"optim_bits must be left out: {cls.__name__} has {cls.fixed_bits} bits, got {optim_bits!r}; "
                f"{cls.family()}(optim_bits={optim_bits!r}) has others"
            )
        bits = cls.fixed_bits or optim_bits or 32
        return {"bits": bits, "min_size": min_8bit_size, "paged": cls.paged or is_paged}

    @classmethod
    def family(cls) -> str:
        return next(c.__name__ for c in reversed(cls.__mro__) if c.__module__ == __name__ and c is not _Bitsandbytes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``LowBitOptimizer``; states of parameters on the CPU are not paged, as in bitsandbytes."""
        GlobalOptimManager.get_instance().find()
        params = param_group["params"]
        param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        if {**self.defaults, **param_group}["paged"] is True and all(p.device.type == "cpu" for p in tensors):
            warnings.warn("parameters are on the CPU: their states are not paged", stacklevel=4)
            param_group = {**param_group, "paged": False}
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """See ``LowBitOptimizer``; as in bitsandbytes, the optimizer shares no tensor with the checkpoint.

        Raises:
            ValueError: for ``move_to_device=False``: states lie where their parameters do.
        """
        if not move_to_device:
            raise ValueError("move_to_device must be True: states lie where their parameters do, or in pages")
        super().load_state_dict(copy.deepcopy(state_dict))

    def step(self, closure: Any = None) -> Any:
        """See ``LowBitOptimizer``."""
        GlobalOptimManager.get_instance().find()
        return super().step(closure)

    def _parts(self, group: dict[str, Any], indices: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
        manager = GlobalOptimManager.get_instance()
        if not manager:
            return [(group, indices)]
        parts: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for i in indices:
            own = manager.of(group["params"][i])
            key = repr(sorted(own.items()))
            if key not in parts:
                parts[key] = self._with(group, own) if own else group, []
            parts[key][1].append(i)
        return list(parts.values())

    def step_parameter(self, p: Tensor, group: dict[str, Any], ordinal: int) -> None:
        """See ``LowBitOptimizer``."""
        own = GlobalOptimManager.get_instance().of(p)
        super().step_parameter(p, self._with(group, own) if own else group, ordinal)

    def _with(self, group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(own.keys() - group.keys()):
            raise ValueError(f"an override sets {unknown}, but {self.family()} has no such hyperparameter")
        values = {**group, **own}
        check_group(values, self.rule_of(values))
        return values


class Adam(_Bitsandbytes, ours.Adam):
    """``lowbit_lightning.optim.Adam``; ``amsgrad`` works."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size, is_paged)
        ours.Adam.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdamW(_Bitsandbytes, ours.AdamW):
    """``lowbit_lightning.optim.AdamW``; ``amsgrad`` works."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size, is_paged)
        ours.AdamW.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **options)


class Lion(_Bitsandbytes, ours.Lion):
    """``lowbit_lightning.optim.Lion``."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size, is_paged)
        ours.Lion.__init__(self, params, lr, betas, weight_decay, **options)


class SGD(_Bitsandbytes, ours.SGD):
    """``lowbit_lightning.optim.SGD``; momentum 0, ``dampening`` and ``nesterov`` work."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size)
        ours.SGD.__init__(self, params, lr, momentum, dampening, weight_decay, nesterov, **options)


class RMSprop(_Bitsandbytes, ours.RMSprop):
    """``lowbit_lightning.optim.RMSprop``; ``momentum`` and ``centered`` work."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size)
        ours.RMSprop.__init__(self, params, lr, alpha, eps, weight_decay, momentum, centered, **options)


class Adagrad(_Bitsandbytes, ours.Adagrad):
    """``lowbit_lightning.optim.Adagrad``; ``lr_decay`` and ``initial_accumulator_value`` work."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        options = self._options(optim_bits, args, min_8bit_size)
        ours.Adagrad.__init__(self, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, **options)


class LAMB(_Bitsandbytes, ours.LAMB):
    """``lowbit_lightning.optim.LAMB``: the update is scaled by the paper's trust ratio ||p|| / ||update||, in both
    directions; bitsandbytes only scales it down, to ``max_unorm * ||p||``."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        given = {"bias_correction": bias_correction, "adam_w_mode": adam_w_mode, "max_unorm": max_unorm}
        for name, wanted in {"bias_correction": True, "adam_w_mode": True, "max_unorm": 1.0}.items():
            if given[name] != wanted:
                raise ValueError(f"{name} must be {wanted}, the trust ratio of LAMB's paper, got {given[name]!r}")
        if amsgrad:
            raise ValueError("amsgrad=True is not served: LAMB has no such variant; use Adam or AdamW")
        options = self._options(optim_bits, args, min_8bit_size)
        ours.LAMB.__init__(self, params, lr, betas, eps, weight_decay, **options)


class LARS(_Bitsandbytes, ours.LARS):
    """``lowbit_lightning.optim.LARS`` with ``max_unorm`` as the paper's trust coefficient: the learning rate is scaled
    by it and ||p|| / ||g||; bitsandbytes only scales an update down, to ``max_unorm * ||p||``."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int | None = None,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
    ) -> None:
        if dampening or nesterov:
            raise ValueError("dampening must be 0 and nesterov False: LARS has no such variants; use SGD")
        options = self._options(optim_bits, args, min_8bit_size)
        ours.LARS.__init__(self, params, lr, momentum, weight_decay, max_unorm, **options)


class AdEMAMix(_Bitsandbytes, ours.AdEMAMix):
    """``lowbit_lightning.optim.AdEMAMix``, whose slow momentum always has 32 bits."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int | None = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        options = self._options(optim_bits, None, min_8bit_size, is_paged)
        ours.AdEMAMix.__init__(self, params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, **options)


def _variant(family: type[_Bitsandbytes], bits: int | None, paged: bool) -> type[_Bitsandbytes]:
    """A family with its bits or pages fixed: ``PagedAdam8bit`` of ``Adam``."""
    name = f"{'Paged' if paged else ''}{family.__name__}{f'{bits}bit' if bits else ''}"
    what = [
        f"``{family.__name__}`` with",
        *([f"{bits}-bit states"] if bits else []),
        *(["paged states"] if paged else []),
    ]
    text = f"{what[0]} {' and '.join(what[1:])}."
    return type(name, (family,), {"fixed_bits": bits, "paged": paged, "__doc__": text, "__module__": __name__})


_FAMILIES = (Adagrad, Adam, AdamW, AdEMAMix, LAMB, LARS, Lion, RMSprop, SGD)
_PAGED = (Adam, AdamW, AdEMAMix, Lion)
_MADE = [_variant(family, bits, False) for family in _FAMILIES for bits in (8, 32)]
_MADE += [_variant(family, bits, True) for family in _PAGED for bits in (None, 8, 32)]
globals().update({kind.__name__: kind for kind in _MADE})

__all__ = ["GlobalOptimManager", *(kind.__name__ for kind in (*_FAMILIES, *_MADE))]

_refuse = refusing(
    __name__,
    {
        **dict.fromkeys(
            ("Optimizer8bit", "Optimizer1State", "Optimizer2State"),
            "subclass lowbit_lightning.optim.LowBitOptimizer, or one of its optimizers",
        ),
        "PytorchLARS": "LARS32bit is tested against plain torch",
        "optimizer": "GlobalOptimManager stands in bitsandbytes.optim itself",
    },
)


def __getattr__(name: str) -> Any:
    return _refuse(name)
