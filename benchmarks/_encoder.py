"""``nn.TransformerEncoder`` on bytes, as torch builds it: norms after, ReLU, dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Tokens, int64 ``[batch, context]``, to logits of the next, ``[batch, context, 256]``."""

    def __init__(self, width: int = 512, layers: int = 6, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(1024, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        return self.head(self.encoder(x, mask=mask, is_causal=True))
