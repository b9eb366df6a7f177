"""Text to learn from, without a network: bytes of any file or folder; by default Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 256  # bytes


def read_text(path: str) -> bytes:
    """All bytes of a file, or of every file below a folder, in the order of a hash of their names: the same order on
    every machine, and one in which the tail is a fair sample of the whole.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    root = Path(path or sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return root.read_bytes()
    if not root.is_dir():
        raise FileNotFoundError(f"text={path!r}: no such file or folder")
    skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__"} if not path else {".git"}
    names = {p.relative_to(root).as_posix(): p for p in root.rglob("*" if path else "*.py") if p.is_file()}
    names = {name: p for name, p in names.items() if not skipped & set(Path(name).parts)}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return b"\n".join(names[name].read_bytes() for name in ordered)


class Windows(Dataset[Tensor]):
    """``count`` batches of random windows, int64 [batch, context + 1]; batch i is the same whenever and by whomever it
    is read."""

    def __init__(self, text: Tensor, context: int, batch: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - context, (count, batch), generator=generator)
        self.text, self.offsets = text, torch.arange(context + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[self.starts[index][:, None] + self.offsets].long()


class Text(L.LightningDataModule):
    """Windows of a text: of its first nine tenths to train on, of the rest to validate and test on.

    Args:
        text: a file, or a folder whose files are joined; empty: Python's standard library.
        context: bytes in a window, and one more to predict.
        batch: windows in a batch.
        batches: batches in an epoch, of all ranks together.
        validation_batches: batches in a validation.
        seed: of the windows to train on.

    Raises:
        FileNotFoundError: for a text that is not there. ValueError: for one that is too short.
    """

    def __init__(
        self,
        text: str = "",
        context: int = 128,
        batch: int = 8,
        batches: int = 10_000,
        validation_batches: int = 16,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.context, self.batch, self.batches = context, batch, batches
        self.validation_batches, self.seed = validation_batches, seed
        whole = torch.frombuffer(bytearray(read_text(text) or b"\0"), dtype=torch.uint8)
        cut = len(whole) * 9 // 10
        if len(whole) - cut <= context:
            raise ValueError(
                f"text={text!r} holds {len(whole)} bytes; with context={context} at least {10 * (context + 1)} are "
                "needed (a tenth of them is for validation)"
            )
        self.train, self.validation = whole[:cut], whole[cut:]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.train, self.batches, self.seed)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.validation, self.validation_batches, 0)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self.val_dataloader()

    def _loader(self, text: Tensor, count: int, seed: int) -> DataLoader[Tensor]:
        return DataLoader(Windows(text, self.context, self.batch, count, seed), batch_size=None)
