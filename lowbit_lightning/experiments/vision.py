"""A vision transformer (Dosovitskiy et al., 2020) in plain Lightning, and pictures that need no network:
scikit-learn's handwritten digits, 1,797 of 8 by 8 pixels."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lowbit_lightning.experiments.transformer import Block, initialise


class Digits(L.LightningDataModule):
    """Pictures float32 [batch, 1, 8, 8] from 0 to 1, and classes int64 [batch]. Every fifth picture is for validation.

    Args:
        batch: pictures in a batch. seed: of the order of the pictures.

    Raises:
        ModuleNotFoundError: without scikit-learn, which holds the pictures.
    """

    def __init__(self, batch: int = 64, seed: int = 1) -> None:
        super().__init__()
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Digits needs scikit-learn: pip install 'lowbit-lightning[examples]'") from error
        self.batch, self.seed = batch, seed
        found = load_digits()
        pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
        classes = torch.tensor(found.target, dtype=torch.int64)
        held_out = torch.arange(len(classes)) % 5 == 0
        self.train = TensorDataset(pictures[~held_out], classes[~held_out])
        self.validation = TensorDataset(pictures[held_out], classes[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validation, self.batch)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()


class ViT(L.LightningModule):
    """Classifies pictures [batch, channels, size, size].

    Args:
        size: of a picture. patch: of a patch, which divides ``size``. channels: of a picture. classes: to tell apart.
        width: channels of the residual stream. layers: blocks. heads: of attention; they divide ``width``.
    """

    def __init__(
        self,
        size: int = 8,
        patch: int = 2,
        channels: int = 1,
        classes: int = 10,
        width: int = 128,
        layers: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"size={size} has to be a multiple of patch={patch}")
        self.save_hyperparameters("size", "patch", "channels", "classes", "width", "layers", "heads")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        initialise(self, layers)
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, pictures: Tensor) -> Tensor:  # -> [batch, classes]
        x = self.patches(pictures).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits.float()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        pictures, classes = batch
        loss = F.cross_entropy(self(pictures), classes)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        pictures, classes = batch
        logits = self(pictures)
        self.val_loss(F.cross_entropy(logits, classes))
        self.val_accuracy(logits, classes)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.validation_step(batch, index)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The class of each picture, int64 [batch]."""
        return self(batch[0]).argmax(-1)
