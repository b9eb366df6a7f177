"""Adapters of PEFT on low-bit weights. Importing this module is enough; ``integrations.transformers`` does it.

PEFT asks a list of functions for the LoRA layer that fits a module. Without this module a low-bit layer gets the one of
``nn.Linear``, which trains but fails on the shape of the packed weight when it is merged. Here a low-bit layer gets
``LoraLinear`` or ``LoraEmbedding``, also when an adapter is loaded from a folder:

- **Training** is as on a plain layer. Adapters are float32, the base layer computes in the dtype of its input.
- **Merging** gives a plain layer: the decoded weight plus the adapter, in float32, rounded once to the dtype that the
  weight had. Unmerging puts the low-bit layer back, to the bit.
- **DoRA** takes its norms from the decoded weight.

``merge_and_unload`` merges to another dtype, or back to low bits.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning.integrations.versions import check

check("peft")

from peft import PeftModel  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.tuners.lora.dora import DoraEmbeddingLayer  # noqa: E402
from peft.tuners.tuners_utils import check_adapters_to_merge  # noqa: E402

from lowbit_lightning.convert.lowbit import adopt, dequantize, low_bit_layers  # noqa: E402
from lowbit_lightning.layers.embedding import LowBitEmbedding  # noqa: E402
from lowbit_lightning.layers.lowbit import FLOATS, LowBitLinear, LowBitWeight, Weights  # noqa: E402

__all__ = ["LoraEmbedding", "LoraLinear", "merge_and_unload"]


class _OnLowBits:
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
        self.base_layer = plain = _decoded(low)
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


class LoraLinear(_OnLowBits, lora.Linear):
    """LoRA and DoRA on a ``LowBitLinear``."""

    fan_in_fan_out = property(lambda self: False, lambda self, value: None)
    """A low-bit weight is ``[out_features, in_features]``, one that was Transformers' ``Conv1D`` too."""


class LoraEmbedding(_OnLowBits, lora.Embedding):
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


def _decoded(low: LowBitWeight) -> Any:
    """A copy of the layer as an ``nn.Linear`` or ``nn.Embedding`` in float32."""
    plain: Any = copy.deepcopy(low)
    plain.drop(torch.float32)
    plain.__class__ = nn.Embedding if isinstance(low, LowBitEmbedding) else nn.Linear
    return plain


def merge_and_unload(
    model: PeftModel,
    *,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    """Merge LoRA adapters into a low-bit model; returns the model without PEFT.

    ``model.merge_and_unload()`` does the first of these:

    - without ``dtype`` and ``weights``, layers that have adapters become plain ones in the dtype that their weights had
      before they were quantised; the other layers stay in low bits;
    - with ``dtype``, the whole model is in that dtype afterwards, and not quantised any more;
    - with ``weights``, merged layers are put into low bits again. That rounds a second time, and what adapters learned
      may be smaller than the rounding: a warning says the signal-to-noise ratio, and ``convert.weight_report`` has it
      by layer.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gave.
        dtype: float32, float16 or bfloat16.
        weights: a format, or "same": of each layer the one that it had.
        safe_merge, adapter_names: as for ``PeftModel.merge_and_unload``.

    Raises:
        TypeError, ValueError: for another dtype or format, or both at once. Nothing is changed then.
    """
    if dtype is not None and weights is not None:
        raise ValueError(f"give dtype or weights, not both: got {dtype} and {weights!r}")
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    given = None if weights in (None, "same") else Weights.of(str(weights))
    before: dict[str, tuple[Weights, torch.dtype]] = {}
    for name, layer in model.named_modules():
        low = vars(layer).get("low_bit", layer.base_layer) if isinstance(layer, _OnLowBits) else None
        if isinstance(layer, _OnLowBits) and isinstance(low, LowBitWeight):
            before[name.removeprefix("base_model.model.")] = low.weights, low.dtype
            layer.merged_dtype = torch.float32 if weights else dtype
            if layer.merged_adapters:  # merged before, perhaps to another dtype
                rest = [one for one in layer.merged_adapters if one not in (adapter_names or layer.active_adapters)]
                layer.unmerge()
                if rest:
                    layer.merge(safe_merge, rest)
    base = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    if dtype is not None:
        dequantize(base, dtype).to(dtype)
    if weights is not None:
        _quantise_again(base, before, given)
    if not any(low_bit_layers(base)) and getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    return base


def _quantise_again(base: nn.Module, before: dict[str, tuple[Weights, torch.dtype]], given: Weights | None) -> None:
    """Put merged layers into low bits, and say what that cost."""
    ratios: dict[str, float] = {}
    for name, (own, dtype) in before.items():
        layer = base.get_submodule(name)
        if not isinstance(layer, LowBitWeight):
            low = adopt(layer, given or own)
            low.dtype = dtype
            ratios[name] = low.snr_db if low.snr_db is not None else math.inf
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        warnings.warn(
            f"{len(ratios)} merged weights were rounded to {given or 'low bits'} again: signal to noise "
            f"{ratios[worst]:.1f} dB ({worst}) or better; dtype=torch.bfloat16 merges without that error",
            stacklevel=3,
        )


def _create(original: Any) -> Any:
    """``LoraModel._create_new_module`` that knows low-bit layers, for this call only: a config that is saved with
    PEFT's own table of classes could not be loaded elsewhere."""

    @functools.wraps(original)
    def create(lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        known = lora_config._custom_modules
        lora_config._custom_modules = {**(known or {}), LowBitLinear: LoraLinear, LowBitEmbedding: LoraEmbedding}
        try:
            return original(lora_config, *args, **kwargs)
        finally:
            lora_config._custom_modules = known

    return create


lora.LoraModel._create_new_module = staticmethod(_create(lora.LoraModel._create_new_module))
# By this name PEFT finds out that a module has ``dequantize``, as HQQ's have.
LowBitWeight.W_q = property(lambda layer: layer.weight)  # type: ignore[attr-defined]
