"""A byte-level GPT in plain Lightning: nothing here knows of low-bit arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from lowbit_lightning.experiments.text import VOCABULARY
from lowbit_lightning.experiments.transformer import Block, Past, initialise


class GPT(L.LightningModule):
    """A GPT on bytes. A batch is windows of bytes, int64 [batch, context + 1]; ``experiments.Text`` has such.

    It has no optimizer of its own: the config of ``lowbit fit`` names one, or a subclass configures one.

    Args:
        width: channels of the residual stream. layers: blocks. heads: of attention; they divide ``width``.
    """

    def __init__(self, width: int = 256, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters("width", "layers", "heads")
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        initialise(self, layers)
        self.val_loss = MeanMetric()
        self.val_perplexity = Perplexity()

    def forward(self, tokens: Tensor, past: Sequence[Past] | None = None) -> Tensor:
        """Logits ``[batch, context, 256]`` of tokens ``[batch, context]``. With ``past``, of ``empty_past`` or from
        earlier calls, the tokens go on from those that were read before."""
        x, nothing = self.tokens(tokens), [None] * len(self.blocks)
        for block, seen in zip(self.blocks, nothing if past is None else past, strict=True):
            x = block(x, seen)
        logits: Tensor = self.head(self.norm(x))
        return logits.float()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, for those who ask which one it is (``layers.outputs``): it may be as wide as others."""
        return self.head

    def empty_past(self, window: int) -> list[Past]:
        """What the blocks remember while the model writes: a position sees ``window`` others before it."""
        return [Past(window) for _ in self.blocks]

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, index: int) -> None:
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        self.val_loss(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        self.val_perplexity(logits, targets)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def test_step(self, windows: Tensor, index: int) -> None:
        self.validation_step(windows, index)

    def predict_step(self, windows: Tensor, index: int) -> Tensor:
        """The likeliest next byte of each position, int64 [batch, context]."""
        return self(windows[:, :-1]).argmax(-1)
