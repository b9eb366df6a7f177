"""How PEFT finds the layers of this package."""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners import lora

from lowbit_lightning.integrations.peft.experts import LoraExperts
from lowbit_lightning.integrations.peft.layers import LoraEmbedding, LoraLinear
from lowbit_lightning.layers.embedding import LowBitEmbedding
from lowbit_lightning.layers.experts import LowBitTensor
from lowbit_lightning.layers.lowbit import LowBitLinear, LowBitWeight

LAYERS = {LowBitLinear: LoraLinear, LowBitEmbedding: LoraEmbedding, LowBitTensor: LoraExperts}


def _create(original: Any) -> Any:
    """``LoraModel._create_new_module`` that knows low-bit layers, for each call only: PEFT's table of custom classes
    is part of a config and is not saved with it."""

    @functools.wraps(original)
    def create(lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        known = lora_config._custom_modules
        lora_config._custom_modules = {**(known or {}), **LAYERS}
        try:
            return original(lora_config, *args, **kwargs)
        finally:
            lora_config._custom_modules = known

    return create


def register() -> None:
    """Tell PEFT, once."""
    lora.LoraModel._create_new_module = staticmethod(_create(lora.LoraModel._create_new_module))
    # By this name PEFT finds out that a module has ``dequantize``, as HQQ's have.
    LowBitWeight.W_q = property(lambda layer: layer.weight)  # type: ignore[attr-defined]
    # By these it finds out the sizes of a module that it does not know.
    LowBitTensor.infeatures = property(lambda layer: layer.shape[2])  # type: ignore[attr-defined]
    LowBitTensor.outfeatures = property(lambda layer: layer.shape[1])  # type: ignore[attr-defined]
