"""QLoRA (Dettmers et al., 2023): adapters of low rank beside frozen weights that are stored in 4 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit_lightning.convert import quantize
from lowbit_lightning.experiments.gpt import GPT


class LoRA(nn.Module):
    """A frozen layer and an adapter of low rank beside it (Hu et al., 2021): ``base(x) + scale * up(down(x))``. It
    begins as the layer alone."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return out


class QLoRA(GPT):
    """A GPT whose linear layers are frozen in low bits, with an adapter beside each layer of its blocks.

    Args:
        base: a checkpoint of ``GPT`` to start from; empty: random weights, which only a test wants.
        width, layers, heads: as for ``GPT``; those of ``base``.
        weights: the format of the frozen weights: "nf4", "int8", "int4" and others of ``lowbit_lightning.quantize``.
        rank: of the adapters.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that is not there, or holds another model.
    """

    def __init__(
        self,
        base: str = "",
        width: int = 256,
        layers: int = 3,
        heads: int = 4,
        weights: str = "nf4",
        rank: int = 8,
    ) -> None:
        super().__init__(width, layers, heads)
        self.save_hyperparameters("base", "width", "layers", "heads", "weights", "rank")
        if base:
            if not Path(base).exists():
                raise FileNotFoundError(f"base={base!r}: no such checkpoint; lowbit fit --config gpt.yaml makes one")
            try:
                self.load_state_dict(torch.load(base, map_location="cpu", weights_only=True)["state_dict"])
            except RuntimeError as error:
                raise ValueError(
                    f"base={base!r} holds another model than width={width}, layers={layers}, heads={heads}: {error}"
                ) from None
        self.requires_grad_(False)
        sizes = {
            (block, name): (layer.in_features, layer.out_features)
            for block in self.blocks
            for name, layer in block.named_children()
            if isinstance(layer, nn.Linear)
        }
        quantize(self.blocks, weights, output_layer=None)
        for (block, name), (in_features, out_features) in sizes.items():
            setattr(block, name, LoRA(getattr(block, name), in_features, out_features, rank))
