"""``GlobalOptimManager``: hyperparameters of single parameters, whatever their groups say."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

BITS = "optim_bits"
STEP = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")
"""What a step reads. Optimizers of ``bitsandbytes.optim`` do; of others only ``optim_bits`` is changed."""
_REFUSED = {
    "min_8bit_size": "set optim_bits of the parameter to 8 or 32",
    "max_unorm": "there is no clipping of updates; clip gradients",
    "skip_zeros": "all elements are updated",
    "percentile_clipping": "clip gradients by torch.nn.utils.clip_grad_norm_",
    "block_wise": "states are always quantised in blocks",
}


class GlobalOptimManager:
    """The one object that keeps overrides; ``GlobalOptimManager.get_instance()`` gives it.

    An override of ``optim_bits`` sets ``parameter.state_bits``, which every optimizer of this package reads; it may
    come before or after the optimizer is built, and converts states that are there. Parameters are not kept alive.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("there is one GlobalOptimManager: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._forget()
        return cls._instance

    def initialize(self) -> None:
        """Forget all overrides."""
        for p in self._own:
            p.state_bits = None
        self._forget()

    def _forget(self) -> None:
        self._own: Any = WeakTensorKeyDictionary()
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []

    def register_parameters(self, params: Any) -> None:
        """Does nothing: overrides find their parameters by identity, which ``model.cuda()`` keeps."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Give parameters a hyperparameter of their own, or several.

        Args:
            parameters: one or several.
            key, value: ``optim_bits`` (8 or 32), ``lr``, ``betas``, ``eps``, ``weight_decay``, ``alpha``, ``t_alpha``
                or ``t_beta3``.
            key_value_dict: several of them, instead.

        Raises:
            TypeError, ValueError: naming the argument and what is allowed; nothing is changed.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError(
                f"either key and value or key_value_dict must be given, got key={key!r}, {key_value_dict!r}"
            )
        config = dict(key_value_dict) if key_value_dict is not None else {key: value}
        _check(config)
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if strangers := [type(p).__name__ for p in given if not isinstance(p, Tensor)]:
            raise TypeError(f"parameters must be tensors, got {strangers}")
        for p in given:
            self._own[p] = {**self._own.get(p, {}), **config}
            if BITS in config:
                p.state_bits = config[BITS]  # type: ignore[union-attr]

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """``override_config`` of a module's parameter, also after that was replaced (materialised, sharded).

        Raises:
            AttributeError, TypeError, ValueError: naming the argument and what is allowed; nothing is changed.
        """
        _check(config)
        self.override_config(getattr(module, param_name), key_value_dict=config)
        self._modules.append((weakref.ref(module), param_name, dict(config)))

    def find(self) -> None:
        """Override the parameters that modules have now."""
        for reference, name, config in self._modules:
            module = reference()
            if module is not None and (p := getattr(module, name)) not in self._own:
                self.override_config(p, key_value_dict=config)

    def of(self, p: Tensor) -> dict[str, Any]:
        """The overrides of a parameter that a step reads."""
        return {key: value for key, value in self._own.get(p, {}).items() if key != BITS}

    def __bool__(self) -> bool:
        return len(self._own) > 0


def _check(config: Mapping[Any, Any]) -> None:
    for key, value in config.items():
        if key in _REFUSED:
            raise ValueError(f"{key!r} of single parameters is not served: {_REFUSED[key]}")
        if key not in (BITS, *STEP):
            raise ValueError(f"key must be one of {[BITS, *STEP]}, got {key!r}")
        if key == BITS and value not in (8, 32):
            raise ValueError(f"optim_bits must be 8 or 32, got {value!r}")
