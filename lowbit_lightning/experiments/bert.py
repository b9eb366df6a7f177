"""A byte-level BERT (Devlin et al., 2018) in plain Lightning: it fills in bytes of a text that are masked."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lowbit_lightning.experiments.text import VOCABULARY
from lowbit_lightning.experiments.transformer import Block, initialise

MASK = VOCABULARY  # the token that stands for a hidden byte


class BERT(L.LightningModule):
    """An encoder on bytes, trained to fill in the masked ones. A batch is windows of bytes, int64 [batch, context + 1]
    (``experiments.Text`` has such); the last byte of each window is not used.

    Args:
        width: channels of the residual stream. layers: blocks. heads: of attention; they divide ``width``.
        masked: share of the bytes that is hidden.
    """

    def __init__(self, width: int = 256, layers: int = 3, heads: int = 4, masked: float = 0.15) -> None:
        super().__init__()
        if not 0 < masked < 1:
            raise ValueError(f"masked must be between 0 and 1, got {masked}")
        self.save_hyperparameters("width", "layers", "heads", "masked")
        self.masked = masked
        self.tokens = nn.Embedding(VOCABULARY + 1, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        initialise(self, layers)
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(VOCABULARY, average="micro")

    def encode(self, tokens: Tensor) -> Tensor:
        """One vector of ``width`` per byte: [batch, context] -> [batch, context, width]."""
        out: Tensor = self.norm(self.blocks(self.tokens(tokens)))
        return out

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, context] -> [batch, context, 256]
        logits: Tensor = self.head(self.encode(tokens))
        return logits.float()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, for those who ask which one it is (``layers.outputs``): it may be as wide as others."""
        return self.head

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        loss = self._filled(windows[:, :-1], index)[0]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, index: int) -> None:
        loss, logits, targets = self._filled(windows[:, :-1], index)
        self.val_loss(loss)
        self.val_accuracy(logits, targets)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, windows: Tensor, index: int) -> None:
        self.validation_step(windows, index)

    def predict_step(self, windows: Tensor, index: int) -> Tensor:
        """A vector for each window, the mean over its bytes: [batch, width]."""
        return self.encode(windows[:, :-1]).mean(1)

    def _filled(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits [masked, 256] and targets [masked]. Batch number ``index`` always hides the same places."""
        generator = torch.Generator().manual_seed(index)
        hidden = (torch.rand(tokens.shape, generator=generator) < self.masked).to(tokens.device)
        hidden[:, 0] = True  # at least one
        logits, targets = self(tokens.masked_fill(hidden, MASK))[hidden], tokens[hidden]
        return F.cross_entropy(logits, targets), logits, targets
