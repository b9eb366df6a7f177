"""LoRA layers of PEFT on low-bit linear layers and embeddings."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lowbit_lightning.layers.embedding import LowBitEmbedding
from lowbit_lightning.layers.lowbit import LowBitWeight


class OnLowBits:
    """What LoRA layers on low-bit weights share: merging and its inverse."""

    base_layer: nn.Module
    merged_adapters: list[str]
    active_adapters: list[str]
    merged_dtype: torch.dtype | None = None
    """To what a merge rounds; None: the dtype that the weight had."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See ``peft``. The base layer is a plain one afterwards."""
        if "low_bit" in vars(self):  # further adapters: all are merged anew, and rounded once
            further = check_adapters_to_merge(self, adapter_names)
            if not further:
                return
            adapter_names = [*self.merged_adapters, *further]
            self.unmerge()
        low = self.base_layer
        if not isinstance(low, LowBitWeight):
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        self.base_layer = plain = decoded(low)
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:
            if not self.merged_adapters:  # it failed, or there was nothing to merge
                self.base_layer = low
        if self.merged_adapters:
            vars(self)["low_bit"] = low  # not a submodule: it is not saved
            plain.weight.data = low.oriented(plain.weight.data).to(self.merged_dtype or low.dtype)
            plain.__class__ = vars(plain).pop("plain", type(plain))  # what it was: Transformers' ``Conv1D`` perhaps

    def unmerge(self) -> None:
        """See ``peft``. The low-bit layer is put back as it was."""
        low = vars(self).pop("low_bit", None)
        if low is None:
            super().unmerge()  # type: ignore[misc]
            return
        self.base_layer = low.to(next(self.base_layer.parameters()).device)
        self.merged_adapters.clear()


class LoraLinear(OnLowBits, lora.Linear):
    """LoRA and DoRA on a ``LowBitLinear``."""

    fan_in_fan_out = property(lambda self: False, lambda self, value: None)
    """A low-bit weight is ``[out_features, in_features]``, one that was Transformers' ``Conv1D`` too."""


class LoraEmbedding(OnLowBits, lora.Embedding):
    """LoRA and DoRA on a ``LowBitEmbedding``."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See ``peft``: makes a new adapter."""
        super().update_layer(adapter_name, *args, **kwargs)
        magnitudes = self.lora_magnitude_vector or {}
        if adapter_name in magnitudes:
            magnitudes[adapter_name].__class__ = _DecodedDora


class _DecodedDora(DoraEmbeddingLayer):
    """DoRA's part of an embedding, with the decoded table."""

    def forward(self, x: Tensor, *, base_layer: nn.Module, **kwargs: Any) -> Any:
        table = base_layer.dequantize() if isinstance(base_layer, LowBitWeight) else base_layer.weight
        return super().forward(x, base_layer=SimpleNamespace(weight=table), **kwargs)


def decoded(low: LowBitWeight) -> Any:
    """A copy of the layer as an ``nn.Linear`` or ``nn.Embedding`` in float32."""
    plain: Any = copy.deepcopy(low)
    plain.drop(torch.float32)
    plain.__class__ = nn.Embedding if isinstance(low, LowBitEmbedding) else nn.Linear
    return plain
