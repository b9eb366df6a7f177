"""Buffers under lowbit_sharded: equal on all ranks, and beside parameters that are gathered in bfloat16."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_gradients
from lightning.pytorch.plugins import LayerSync, MixedPrecision
from support.on_ranks import ALONE, on_ranks
from support.ranks import equal
from support.sharded_model import raised, trainer, world
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning.precision import Int8MixedPrecision
from lowbit_lightning.strategies import ShardedStrategy, buffers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

SAMPLES = 24  # of all ranks, in a step


class Mixing(nn.Module):
    """lerp takes one dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.average: Tensor
        self.register_buffer("average", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(x.detach().float().mean(0), 0.1)
        return x * torch.lerp(self.weight, self.average, 0.1)


class Normed(L.LightningModule):
    """Buffers of which each rank computes its own, from its own samples."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        parts = nn.BatchNorm1d(64), Mixing(), parametrizations.spectral_norm(nn.Linear(64, 64))
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh()) for _ in range(2)]
        self.layers = nn.Sequential(nn.Linear(64, 64), *parts, nn.Sequential(*blocks), nn.Linear(64, 1))
        self.losses: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.layers(batch[0]).float().square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.evaluated.append(self.layers(torch.linspace(-1, 1, 128).view(2, 64)).float().sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader:
        data = torch.randn(4 * SAMPLES, 64, generator=torch.Generator().manual_seed(1))
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(TensorDataset(data[rank::ranks]), batch_size=SAMPLES // ranks)

    val_dataloader = train_dataloader


def fit(strategy: Any, path: Path | None = None, seed: int = 0, **options: Any) -> tuple[Normed, L.Trainer]:
    model = Normed(seed)
    made = trainer(strategy, **{"limit_val_batches": 1, **options})
    made.fit(model, ckpt_path=path)
    return model, made


def results(model: Normed) -> dict[str, dict[str, Tensor]]:
    outputs = {"losses": torch.stack(model.losses), "evaluated": torch.stack(model.evaluated)}
    return {"buffers": dict(model.named_buffers()), "outputs": outputs}


def equal_on_all_ranks(tensors: dict[str, Tensor]) -> str | None:
    for name, x in tensors.items():
        first = x.clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, x):
            return f"{name} differs from rank 0's by {float((first - x).abs().max()):.1e}"
    return None


@on_ranks(2, slow=(4, 1, 3, 2))
def test_buffers_are_those_of_rank_0(folder: Path) -> str | None:
    """On every rank, when it evaluates and when it resumes; the numbers of DDP."""
    for accumulate in (1, 2):
        ours, _ = fit(ShardedStrategy(optimizer_bits=None), accumulate_grad_batches=accumulate)
        found = results(ours)
        problem = equal_on_all_ranks({**found["buffers"], "evaluated": found["outputs"]["evaluated"]})
        if problem is None and world() > 1:
            expected = results(fit("ddp", accumulate_grad_batches=accumulate)[0])
            for key, x in {**expected["buffers"], **expected["outputs"]}.items():
                off = float(({**found["buffers"], **found["outputs"]}[key] - x).abs().max())
                problem = problem or (None if off <= 1e-5 else f"{key} is off DDP's by {off:.1e}")
        if problem:
            return f"accumulate={accumulate}: {problem}"
    return None


@on_ranks(2, slow=(4, 1, 3, 2))
def test_a_resume_has_the_buffers_of_the_run(folder: Path) -> str | None:
    """Saved between a training step and the next forward, as a file and as a folder."""
    for distributed in (False, True):
        path = folder / f"buffers_{world()}_{distributed}"

        class Save(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any, path: Path = path) -> None:
                if trainer.global_step == 4:
                    trainer.save_checkpoint(path)

        def make(distributed: bool = distributed) -> ShardedStrategy:
            return ShardedStrategy(optimizer_bits=None, save_distributed_checkpoint=distributed)

        whole, _ = fit(make(), max_epochs=2, callbacks=[Save()], limit_val_batches=0)
        rest, _ = fit(make(), path, seed=1, max_epochs=2, limit_val_batches=0)
        expected = {"": dict(whole.named_buffers()), "losses": {"": torch.stack(whole.losses[4:])}}
        problem = equal({"": dict(rest.named_buffers()), "losses": {"": torch.stack(rest.losses)}}, expected)
        if problem:
            return f"distributed={distributed}: {problem}"
    return None


@on_ranks(2, slow=(4, 3, 2))
def test_parameters_and_buffers_of_two_dtypes_mix(folder: Path) -> str | None:
    """Gathered in bfloat16; computed with as under DDP, up to the rounding of the weights."""
    for precision in (MixedPrecision("bf16-mixed", "cpu"), Int8MixedPrecision(autocast="bf16")):
        ours, _ = fit(ShardedStrategy(optimizer_bits=None), plugins=[precision])
        theirs, _ = fit("ddp", plugins=[precision])
        kept = {p.dtype for p in ours.parameters()}, {b.dtype for b in ours.buffers() if b.is_floating_point()}
        losses = torch.stack([torch.stack(model.losses) for model in (ours, theirs)])
        dist.all_reduce(losses)  # that of one rank, of six samples, is off by 4 % for the rounding of weights alone
        off = float((losses[0] / losses[1] - 1).abs().max())
        if kept != ({torch.float32}, {torch.float32}) or off > 0.05:
            return f"{type(precision).__name__}: losses are off by {off:.1e}, parameters and buffers {kept}"
    return None


class OverAllRanks(nn.BatchNorm1d):
    """SyncBatchNorm for CPUs, which torch's refuses."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        mean, square = (with_gradients.all_reduce(y.mean(0)) / world() for y in (x, x * x))
        var, count = square - mean * mean, len(x) * world()
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
            self.running_var.lerp_(var * count / (count - 1), 0.1)  # type: ignore[union-attr]
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Synchronised(LayerSync):
    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.__class__ = OverAllRanks
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


class ShardsItself(Normed):
    def configure_model(self) -> None:
        fully_shard(self)


@on_ranks(ALONE, 2, slow=(ALONE, 4, 1, 3, 2))
def test_batch_norm_may_be_synchronised(folder: Path) -> str | None:
    """By a plugin of its own: the losses of a single device. By torch's, which CPUs lack: it is applied."""
    ours, _ = fit(ShardedStrategy(optimizer_bits=None) if dist.is_initialized() else "auto", plugins=[Synchronised()])
    losses = torch.stack(ours.losses)
    if not dist.is_initialized():
        torch.save(losses, folder / "synchronised.pt")
        return None
    dist.all_reduce(losses)
    off = float((losses / world() - torch.load(folder / "synchronised.pt")).abs().max())
    if off > 1e-3:  # Mixing averages over a rank's samples; without synchronisation it is 0.1
        return f"losses are off by {off:.1e}"
    model = Normed()
    made = trainer("lowbit_sharded", sync_batchnorm=True)
    problem = raised(lambda: made.fit(model), ValueError, "SyncBatchNorm expected input tensor to be on GPU")
    if problem or not isinstance(model.layers[1], nn.SyncBatchNorm):
        return problem or f"{model.layers[1]}"
    made, own = trainer("lowbit_sharded", sync_batchnorm=True), ShardsItself()
    return raised(lambda: made.fit(own), ValueError, "layers.1", "configure_model", "convert_sync_batchnorm")


# -- in this process ---------------------------------------------------------------------------------------------------

MIXING: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "BatchNorm2d": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.BatchNorm2d(8)),
    "BatchNorm3d": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1, 1)), nn.BatchNorm3d(8)),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MIXING)
def test_modules_compute_with_buffers_wider_than_their_parameters(kind: str, training: bool) -> None:
    """FSDP2 puts a parameter in bfloat16 into its place; the numbers are those of the same values in float32."""
    x = torch.randn(6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # old spectral_norm
        exact, module = (MIXING[kind]().train(training) for _ in range(2))
    for p in exact.parameters():
        p.data = torch.randn(p.shape).bfloat16().float()
    module.load_state_dict(exact.state_dict())
    buffers.widen(module)
    cast = {name: nn.Parameter(p.detach().bfloat16()) for name, p in module.named_parameters()}
    for name, p in cast.items():
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._parameters[own] = p
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(x), exact(x)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), exact.buffers(), strict=True))
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    for name, p in exact.named_parameters():
        assert module.get_parameter(name) is cast[name]
        assert p.grad is not None
        torch.testing.assert_close(cast[name].grad, p.grad.bfloat16())
