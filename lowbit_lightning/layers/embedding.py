"""Embeddings: tables in low bits, and ``StableEmbedding``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import Format
from lowbit_lightning.layers.lowbit import LowBitWeight, Weights


class LowBitEmbedding(LowBitWeight, nn.Embedding):  # type: ignore[misc]  # both say what weight is
    """``nn.Embedding`` with its table in low bits, for inference and for training the layers after it.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for ``nn.Embedding``; the output has ``dtype``, or
            the dtype to which the module was cast.
        weights: a format or its name, as for ``LowBitLinear``.
        fit: how blocks are fitted, as ``Weights`` says.

    Input: int32 or int64 indices ``[...]``; output ``[..., embedding_dim]``. The table cannot be trained.
    """

    default: str = "nf4"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weights: str | Format | None = None,
        fit: str | None = None,
    ) -> None:
        chosen = Weights.of(weights or self.default, fit=fit)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.keep(self.weight, chosen)

    @classmethod
    def adopt(cls, embedding: nn.Embedding, weights: Weights) -> None:
        """Turn a plain ``nn.Embedding`` into this class in place.

        Raises:
            ValueError: for one with ``max_norm``, which rescales the table while it looks rows up.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"an embedding with max_norm={embedding.max_norm} changes its table: it stays as it is")
        embedding.__class__ = cls
        embedding.keep(embedding.weight, weights)  # type: ignore[operator]

    @classmethod
    def release(cls, layer: LowBitEmbedding, dtype: torch.dtype | None = None) -> None:
        """Turn the layer into a plain ``nn.Embedding`` in place, with the decoded table in ``dtype``."""
        layer.drop(dtype)
        layer.__class__ = nn.Embedding  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Embedding`` does, and quantise. Does nothing on the meta device."""
        if not hasattr(self, "weights"):  # still being built as an ``nn.Embedding``
            super().reset_parameters()
        elif not self.weight.is_meta:
            fresh = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device=self.weight.device)
            self.keep(fresh.weight.to(self.dtype), self.weights)

    def forward(self, input: Tensor) -> Tensor:
        return kernels.lowbit_embedding(input, self.weight, self.scales, self.format, self.row_length, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weights}"


class Embedding8bit(LowBitEmbedding):
    """``LowBitEmbedding`` with ``weights="int8"``: a row has one scale."""

    default = "int8"


class Embedding4bit(LowBitEmbedding):
    """``LowBitEmbedding`` with ``weights="nf4"``, or the 4-bit format that is named: ``"fp4"``, ``"int4"``."""

    default = "nf4"


class Embedding32bit(nn.Embedding):
    """``nn.Embedding`` that starts Xavier-uniform and whose table has 32-bit optimizer states.

    Arguments and shapes are those of ``nn.Embedding``. Rows of a table are updated rarely and by very different
    amounts, which 8 bits resolve badly. Every optimizer of ``lowbit_lightning.optim`` reads the table's attribute
    ``state_bits``. DeepSpeed's optimizers see flat partitions instead of parameters: there the group needs ``bits=32``.
    """

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    # The table becomes another object when it is copied, materialised from the meta device, or sharded.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, nn.Parameter):
            value.state_bits = 32  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.weight.state_bits = 32  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.weight.state_bits = 32  # type: ignore[attr-defined]
        return result


class StableEmbedding(Embedding32bit):
    """``nn.Embedding`` that trains stably with 8-bit optimizers: Xavier-uniform initialisation, 32-bit optimizer states
    for its table, and a layer norm after the look-up, in float32 (Dettmers et al. 2022, "8-bit Optimizers via
    Block-wise Quantization", arXiv 2110.02861).

    Arguments and shapes are those of ``nn.Embedding``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(self.embedding_dim, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return self.norm(found.to(self.norm.weight.dtype)).to(found.dtype)
