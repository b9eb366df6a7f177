"""Torch's fused path for ``nn.TransformerEncoderLayer``, which must not meet weights in low bits."""

from __future__ import annotations

from torch import nn

from lowbit_lightning.layers.lowbit import LowBitWeight

_KEPT = "_lowbit_lightning_fused_activation"


def settle_fused_path(module: nn.Module) -> None:
    """Have the module's encoder layers call their linear layers in evaluation too, if these are in low bits.

    Torch otherwise hands all weights of an encoder layer to one op, which takes codes for values. It does so only for
    the activations that ``activation_relu_or_gelu`` names, which is 0 for all others. An encoder layer without weights
    in low bits gets back the number that it had.
    """
    for m in module.modules():
        if not isinstance(m, nn.TransformerEncoderLayer):
            continue
        layers: list[nn.Module] = [m.linear1, m.linear2]
        if any(isinstance(layer, LowBitWeight) for layer in layers):
            vars(m).setdefault(_KEPT, m.activation_relu_or_gelu)
            m.activation_relu_or_gelu = 0
        elif _KEPT in vars(m):
            m.activation_relu_or_gelu = vars(m).pop(_KEPT)
