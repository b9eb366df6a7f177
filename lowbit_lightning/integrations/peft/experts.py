"""LoRA on the experts of a mixture of experts, in low bits.

PEFT's own way (``target_parameters``) needs a plain parameter, and adds the adapter to all experts at each call. Here
``target_modules=["gate_up_proj", "down_proj"]`` names the low-bit tensors. Each expert has a pair of factors, and an
expert that is used computes ``x W^T + s (x A^T) B^T`` with ``W`` in packed form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lowbit_lightning.layers.experts import TENSOR_ATTRIBUTES, ActsAsTensor, LowBitMatrix, LowBitTensor

Factors = tuple[Tensor, Tensor, float]
"""A ``[..., r, row_length]``, B ``[..., rows, r]``, and the scale of their product."""


class LoraExperts(lora.Linear, ActsAsTensor):
    """Takes the place of a ``LowBitTensor`` ``[experts, rows, row_length]``, as one with adapters.

    ``lora_A[name].weight`` is ``[experts * r, row_length]``, ``lora_B[name].weight`` ``[rows, experts * r]``.

    Raises:
        ValueError: for DoRA, ``lora_bias`` and dropout, and when it is merged in place: ``merge_and_unload`` of this
            package merges experts.
    """

    base_layer: LowBitTensor

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, *args: Any, **kwargs: Any) -> None:
        """See ``peft``: makes a new adapter, of rank r for each expert."""
        config = kwargs.get("config")  # of newer versions of PEFT; older ones give its fields
        asked = kwargs if config is None else {**vars(config), **kwargs}
        for option in ("use_dora", "lora_bias", "lora_dropout"):
            if asked.get(option):
                raise ValueError(f"{option}={asked[option]!r} is not possible on experts: leave it out, or their names")
        experts = len(self.base_layer)
        super().update_layer(adapter_name, r * experts, lora_alpha * experts, *args, **kwargs)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if asked.get("use_rslora") else r)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises: there is no plain layer that could take the place of experts here."""
        raise ValueError(
            "adapters of experts can't be merged in place: call lowbit_lightning.integrations.peft.merge_and_unload"
        )

    @property
    def shape(self) -> torch.Size:
        return self.base_layer.shape

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self.base_layer.dtype

    @property
    def device(self) -> torch.device:
        return self.base_layer.device

    def __len__(self) -> int:
        return len(self.base_layer)

    def factors(self, names: list[str] | None = None) -> list[Factors]:
        """Of all experts: A ``[experts, r, row_length]``, B ``[experts, rows, r]``. ``names``: None is the active
        ones."""
        experts, rows, length = self.shape
        if names is None:
            names = [] if self.disable_adapters else self.active_adapters
        return [
            (
                self.lora_A[name].weight.view(experts, -1, length),
                self.lora_B[name].weight.view(rows, experts, -1).transpose(0, 1),
                self.scaling[name],
            )
            for name in names
            if name in self.lora_A
        ]

    def dequantize(self, dtype: torch.dtype | None = None, names: list[str] | None = None) -> Tensor:
        """All experts with their adapters, decoded, in ``dtype``."""
        weight = self.base_layer.dequantize(torch.float32)
        for a, b, scale in self.factors(names):
            weight = torch.baddbmm(weight, b.float(), a.float(), alpha=scale)
        return weight.to(dtype or self.dtype)

    def __getitem__(self, index: Any) -> Any:
        found, factors = self.base_layer[index], self.factors()
        if not factors:
            return found
        if not isinstance(found, LowBitMatrix):
            return self.dequantize()[index]
        return _AdaptedMatrix(found, [(a[index], b[index], scale) for a, b, scale in factors])

    def __getattr__(self, name: str) -> Any:
        if name in TENSOR_ATTRIBUTES:
            return getattr(self.dequantize(), name)
        return super().__getattr__(name)


class _AdaptedMatrix(LowBitMatrix):
    """One expert, ``[rows, row_length]``, with adapters."""

    def __init__(self, base: LowBitMatrix, factors: list[Factors]) -> None:
        super().__init__(base.packed, base.scales, base.weights, base.row_length, base.dtype)
        self.factors = factors

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = super().dequantize(torch.float32)
        for a, b, scale in self.factors:
            weight = weight + scale * (b.float() @ a.float())
        return weight.to(dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().multiply(x, bias)
        for a, b, scale in self.factors:
            added = nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * scale
            y = y + added.to(y.dtype)
        return y
