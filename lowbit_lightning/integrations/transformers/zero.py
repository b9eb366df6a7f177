"""Under ZeRO-3 of DeepSpeed, a rank keeps its part of a weight as soon as the weight is in low bits."""

from __future__ import annotations

from torch import nn
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled

from lowbit_lightning.layers.experts import pass_matrices_on


def partition(layer: nn.Module) -> None:
    """Leave each rank its part of the layer's parameters. All ranks have to call it for the same layers in the same
    order. Without ZeRO-3 nothing is done."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.Init(module=layer, config_dict_or_path=deepspeed_config())
        pass_matrices_on()
