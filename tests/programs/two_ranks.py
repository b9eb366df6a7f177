"""Two ranks on gloo, started by Lightning, which runs this file again for the second.

Under DDP: train through; stop in the middle of an epoch and resume; report losses and weights. Then, in the same
process group, swapped layers under FSDP2 against the same layers alone.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lowbit_lightning
from lowbit_lightning import convert, kernels
from lowbit_lightning.callbacks import DeterministicResume


class Model(L.LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        self.seed = seed
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        torch.manual_seed(self.seed + self.global_rank)  # each rank drops out on its own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(model: Model, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        precision="int8-mixed",  # type: ignore[arg-type]
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DeterministicResume(), *callbacks],
    )
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4, shuffle=True), **settings)
    return trainer


def report(model: Model) -> dict[str, Any]:
    return {"losses": model.losses, "weights": [p.double().sum().item() for p in model.parameters()]}


def sharded_gradients_differ() -> list[str]:
    """Names whose gradient under FSDP2 isn't that of the unsharded model, bit for bit (equal batches: equal means)."""
    torch.manual_seed(5)
    alone = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 33))
    report = convert.swap_linears(alone, output_layer=None)
    sharded = copy.deepcopy(alone)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    assert convert.swap_linears(sharded, output_layer=None) == report, "a sharded layer counts as swapped"
    x = torch.randn(6, 32)
    for model in (alone, sharded):
        model(x).square().sum().backward()
    pairs = zip(alone.named_parameters(), sharded.parameters(), strict=True)
    return [name for (name, p), q in pairs if not same(p.grad, q.grad.full_tensor())]  # type: ignore


def same(x: Tensor, y: Tensor) -> bool:
    """Equal to the bit; torch 2.7 and 2.8 round the mean over ranks otherwise."""
    return torch.equal(x, y) if torch.__version__ >= "2.13" else torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    assert lowbit_lightning.precision.int8.NAME == "int8-mixed"
    kernels.reset_calls()
    through, resumed = Model(seed=1), Model(seed=99)
    trainer = fit(through, SaveAt(3, folder / "three.ckpt"))
    matmuls = sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul")
    fit(resumed, ckpt_path=folder / "three.ckpt")
    result: dict[str, Any] = {"matmuls": matmuls, "through": report(through), "resumed": report(resumed)}
    result["sharded"] = sharded_gradients_differ()
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
