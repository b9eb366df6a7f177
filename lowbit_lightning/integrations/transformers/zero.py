"""Under ZeRO-3 of DeepSpeed, a rank keeps its part of a weight as soon as the weight is in low bits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled


def check(experts: Iterable[str]) -> None:
    """Raise a ValueError if DeepSpeed would compute ``experts``, names of low-bit ones, by its own linear function."""
    names = [*experts]
    if not names or not is_deepspeed_zero3_enabled():
        return
    if deepspeed_config()["zero_optimization"].get("memory_efficient_linear", True):
        raise ValueError(
            f"{names[:4]} are experts, which DeepSpeed's own linear function can't compute in low bits: set "
            'memory_efficient_linear to false in the config\'s "zero_optimization", or quantise with experts=False'
        )


def partition(layer: nn.Module) -> None:
    """Leave each rank its part of the layer's parameters. All ranks have to call it for the same layers in the same
    order. Without ZeRO-3 nothing is done."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.Init(module=layer, config_dict_or_path=deepspeed_config())
