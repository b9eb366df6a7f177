"""``Int8Linear`` and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit_lightning.layers.ops import int8_linear
from lowbit_lightning.layers.product import is_transformed, product

Product = Literal["int8", "high"]
Rounding = Literal["nearest", "stochastic"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHOICES = {
    **dict.fromkeys(("forward", "grad_input", "grad_weight", "save_inputs"), ("int8", "high")),
    "gradient_rounding": ("nearest", "stochastic"),
}


@dataclass(frozen=True)
class Products:
    """How a linear layer computes its three products.

    Args:
        forward, grad_input, grad_weight: "int8", or "high": the dtype of the input. ``grad_weight="high"`` is what
            Wortsman et al. (2023) call SwitchBack.
        save_inputs: what an int8 ``grad_weight`` keeps of the input until the backward: "int8", a byte per element,
            or "high", the input itself. The numbers are the same.
        gradient_rounding: "nearest", or "stochastic": the incoming gradient is rounded to int8 at random and without
            bias, by seeds from torch's default CPU generator.

    Raises:
        ValueError: for any other value.
    """

    forward: Product = "int8"
    grad_input: Product = "int8"
    grad_weight: Product = "int8"
    save_inputs: Product = "int8"
    gradient_rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")

    @property
    def int8(self) -> tuple[str, ...]:
        """The names of the products that run in int8."""
        return tuple(name for name in ("forward", "grad_input", "grad_weight") if getattr(self, name) == "int8")

    def changed(self, fields: Mapping[str, Any]) -> Products:
        """These products with other values in some fields."""
        return replace(self, **fields)

    def __str__(self) -> str:
        """'int8 (forward, grad_input, grad_weight)'."""
        random = self.gradient_rounding == "stochastic" and self.int8 not in ((), ("forward",))
        return f"int8 ({', '.join(self.int8) or 'nothing'}{', gradients rounded at random' if random else ''})"


class Int8Linear(nn.Linear):
    """``nn.Linear`` with its matmuls in int8: same parameters, same ``state_dict``, same gradients up to rounding.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; float32, float16 or bfloat16.
        settings: the fields of ``Products``: ``forward``, ``grad_input``, ``grad_weight``, ``save_inputs``,
            ``gradient_rounding``.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype, or autocast's where that is on.
    Evaluation runs the forward in int8 too. A training step costs three int8 products; one less where the input
    needs no gradient, one less where the weight is frozen. Higher derivatives and the transforms of ``torch.func``
    work too (``product``), with incoming gradients rounded to nearest.

    Raises:
        ValueError: for a bad setting; and in ``forward``, TypeError too, for a dtype, device or shape of the input
            that doesn't fit the weight.
    """

    products: Products
    adopted: bool = False
    """True where a plain ``nn.Linear`` was turned into this layer, and may be turned back."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.products = Products(**settings)

    @classmethod
    def adopt(cls, linear: nn.Linear, products: Products) -> None:
        """Turn a plain ``nn.Linear`` into this class in place: the object, its parameters and hooks stay."""
        if not isinstance(linear, cls):
            linear.__class__ = cls
        linear.products = products  # type: ignore[assignment]
        linear.adopted = True  # type: ignore[assignment]

    @classmethod
    def release(cls, layer: Int8Linear) -> None:
        """Turn the layer into a plain ``nn.Linear`` in place; the inverse of ``adopt``."""
        del layer.products
        vars(layer).pop("adopted", None)
        layer.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        x = self._checked(input)
        rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
        p, weight, bias = self.products, self.weight, self.bias
        kinds = p.forward == "int8", p.grad_input == "int8", p.grad_weight == "int8"
        if is_transformed():
            y = product(rows, weight, kinds)
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            trains = weight.requires_grad and torch.is_grad_enabled()
            save_int8 = trains and p.grad_weight == "int8" and p.save_inputs == "int8"
            y, *_ = int8_linear(rows, weight, bias, *kinds, save_int8, p.gradient_rounding == "stochastic")
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.products}"

    def _checked(self, x: Tensor) -> Tensor:
        """The input in the dtype to compute in (autocast's where it is on); raises if it doesn't fit the weight."""
        weight = self.weight
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"input must be of shape [..., {self.in_features}], got {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"input is on {x.device} but the weight on {weight.device}; move one of them")
        if weight.dtype not in FLOATS:
            raise TypeError(f"Int8Linear's weight must be float32, float16 or bfloat16, got {weight.dtype}")
        kind = x.device.type
        if x.dtype in FLOATS and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        if x.dtype != weight.dtype:
            raise TypeError(f"input must have the weight's dtype, {weight.dtype}, outside autocast, got {x.dtype}")
        return x
