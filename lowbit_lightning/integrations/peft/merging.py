"""``merge_and_unload``: adapters into low-bit models, to a float dtype or back to low bits."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lowbit_lightning.convert.lowbit import adopt, dequantize, layer_at, low_bit_layers
from lowbit_lightning.integrations.peft.experts import LoraExperts
from lowbit_lightning.integrations.peft.layers import OnLowBits
from lowbit_lightning.layers.lowbit import FLOATS, LowBitWeight, Weights

BASE = "base_model.model."
"""What PEFT puts before the names of a model."""


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
    before = _merge_experts(model, torch.float32 if weights else dtype, adapter_names)
    for name, layer in [*model.named_modules()]:
        low = vars(layer).get("low_bit", layer.base_layer) if isinstance(layer, OnLowBits) else None
        if isinstance(layer, OnLowBits) and isinstance(low, LowBitWeight):
            before[name.removeprefix(BASE)] = low.weights, low.dtype
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


def _merge_experts(
    model: PeftModel, dtype: torch.dtype | None, adapter_names: list[str] | None
) -> dict[str, tuple[Weights, torch.dtype]]:
    """Make experts with adapters plain parameters; their names, with what they were."""
    before: dict[str, tuple[Weights, torch.dtype]] = {}
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraExperts):
            owner, _, part = name.rpartition(".")
            holder = model.get_submodule(owner)
            merged = layer.dequantize(dtype, adapter_names)
            del holder._modules[part]
            holder.register_parameter(part, nn.Parameter(merged.detach(), requires_grad=False))
            before[name.removeprefix(BASE)] = layer.base_layer.weights, layer.dtype
    return before


def _quantise_again(base: nn.Module, before: dict[str, tuple[Weights, torch.dtype]], given: Weights | None) -> None:
    """Put merged layers into low bits, and say what that cost."""
    ratios: dict[str, float] = {}
    for name, (own, dtype) in before.items():
        layer = layer_at(base, name)
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
