"""``precision="int8-mixed"`` on two ranks: under DDP with DeterministicResume, under FSDP2, and what "auto" answers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from support.on_ranks import on_ranks
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, convert, kernels
from lowbit_lightning.callbacks import DeterministicResume
from lowbit_lightning.layers import speed
from lowbit_lightning.layers.speed import Times
from lowbit_lightning.precision import autocast
from lowbit_lightning.strategies import ShardedStrategy
from lowbit_lightning.strategies.blocks import average_gradients

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")


class Model(L.LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        self.seed, self.losses, self.dtypes = seed, list[float](), set[torch.dtype]()

    def on_fit_start(self) -> None:
        torch.manual_seed(self.seed + self.global_rank)  # each rank drops out on its own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.net(batch[0])
        loss = nn.functional.cross_entropy(y.float(), batch[1])
        self.losses.append(loss.item())
        self.dtypes.add(y.dtype)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def weights(self) -> list[float]:
        return [p.double().sum().item() for p in self.parameters()]


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(model: Model, *callbacks: L.Callback, max_epochs: int = 2, **settings: Any) -> None:
    kept = {"precision": "int8-mixed", "strategy": "ddp", "devices": 2, "max_epochs": max_epochs}
    own = {name: settings.pop(name) for name in tuple(settings) if name != "ckpt_path"}
    trainer = quiet_trainer(callbacks=[DeterministicResume(), *callbacks], **{**kept, **own})
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4, shuffle=True), **settings)


@on_ranks(2)
def test_a_run_under_ddp_resumes_to_the_bit(folder: Path) -> None:
    """Stopped in the middle of an epoch; each rank has its own data, and both have the same weights."""
    through, resumed = Model(seed=1), Model(seed=99)
    kernels.reset_calls()
    fit(through, SaveAt(3, folder / "three.ckpt"))
    assert sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul") == 2 * 8 * (2 + 3)
    fit(resumed, ckpt_path=folder / "three.ckpt")
    assert len(resumed.losses) == 2 * 8 - 3
    assert resumed.losses == through.losses[3:]
    assert resumed.weights() == through.weights()
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, (through.weights(), through.losses))
    assert ranks[0][0] == ranks[1][0]
    assert ranks[0][1] != ranks[1][1]


@on_ranks(2)
def test_gradients_of_sharded_layers_are_those_of_the_layers_alone(folder: Path) -> None:
    """Under FSDP2, bit for bit: equal batches have equal means."""
    torch.manual_seed(5)
    alone = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 33))
    report = convert.swap_linears(alone, output_layer=None)
    sharded = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    average_gradients(sharded, mesh)
    assert convert.swap_linears(sharded, output_layer=None) == report, "a sharded layer counts as swapped"
    x = torch.randn(6, 32)
    for model in (alone, sharded):
        model(x).square().sum().backward()
    for (name, p), q in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        expected, found = p.grad, q.grad.full_tensor()  # type: ignore[union-attr]
        assert torch.equal(expected, found), name  # type: ignore[arg-type]


class Attends(Model):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.net = nn.Sequential(nn.Unflatten(1, (2, 16)), nn.Linear(16, 32), layer, nn.Flatten(1), nn.Linear(64, 2))


@on_ranks(2)
def test_an_attention_trains_alike_replicated_and_sharded(folder: Path) -> None:
    """The same losses under DDP and under lowbit_sharded, with 4 matrices of 3 products in each step."""
    losses = []
    for strategy in ("ddp", ShardedStrategy(optimizer_bits=None)):
        model = Attends(seed=1)
        kernels.reset_calls()
        fit(model, max_epochs=1, strategy=strategy, plugins=[Int8MixedPrecision(autocast="off")], precision=None)
        assert sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul") == 8 * 4 * 3
        losses.append(model.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@on_ranks(2)
def test_all_ranks_take_the_first_ones_dtype(folder: Path) -> None:
    """On each of two ranks the other one seems to be faster."""
    first, model = dist.get_rank() == 0, Model(seed=1)
    with (
        mock.patch.object(autocast, "computes_in_bf16", return_value=first),
        mock.patch.object(autocast, "seconds", return_value=(2.0, 1.0) if first else (1.0, 2.0)),
    ):
        fit(model, max_epochs=1)
    assert model.dtypes == {torch.bfloat16}


@on_ranks(2)
def test_all_ranks_leave_the_layers_that_the_first_one_leaves(folder: Path) -> None:
    """Each of two ranks measures that another layer is slower."""
    first, model = dist.get_rank() == 0, Model(seed=1)
    model.net[2] = nn.Linear(32, 64)
    model.net[4] = nn.Linear(64, 2)
    kinds: list[str] = []

    def times(shape: Any, device: Any) -> Times:
        square = shape.matmuls[0][1].outputs == 32
        return Times(2.0, 1.0) if square == first else Times(1.0, 2.0)

    class Kinds(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            kinds[:] = [type(model.net[i]).__name__ for i in (0, 2)]

    with mock.patch.object(speed, "times", times):
        fit(model, Kinds(), max_epochs=1)
    assert kinds == ["Linear", "Int8Linear"]
