"""Weights that int8 training leaves in high precision because they belong to no layer that has an int8 form: which, and
why."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

CONVOLUTION = "transposed convolutions run in high precision"
RECURRENT = "recurrent weights run in high precision: one fused kernel reads them all"
BILINEAR = "bilinear forms run in high precision"
OWN = "matrices that a module holds itself run in high precision: they are no layers"

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (_ConvTransposeNd, CONVOLUTION),
    (nn.RNNBase, RECURRENT),
    (nn.RNNCellBase, RECURRENT),
    (nn.Bilinear, BILINEAR),
)
_NO_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
"""Linear layers and convolutions are candidates; the others look rows up, or scale."""

INSTEAD = (
    "For models like this, precision='bf16-mixed' is the fast choice; 8-bit optimizers (lowbit_lightning.optim), "
    "strategy='lowbit_sharded' and paging serve any model"
)


def others(module: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    """Name of a module -> why its weights stay in high precision, of all that hold matrices and aren't ``linears``."""
    found = {}
    for name, m in module.named_modules():
        reason = next((why for kind, why in _KINDS if isinstance(m, kind)), None)
        if reason is None and name not in linears and not isinstance(m, _NO_PRODUCTS) and _holds_matrices(m, linears):
            reason = OWN
        if reason is not None:
            found[name] = reason
    return found


def _holds_matrices(module: nn.Module, linears: dict[str, nn.Module]) -> bool:
    """A parameter of at least 32 by 32 that is not tied to a layer. Mixtures of experts have three dimensions."""
    weights = {id(p) for layer in linears.values() for p in layer.parameters(recurse=False)}
    return any(
        p.ndim in (2, 3) and min(p.shape[-2:]) >= 32 and id(p) not in weights for p in module.parameters(recurse=False)
    )
