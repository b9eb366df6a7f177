"""What the checks under DeepSpeed share: two models, the run of one, pictures of states, DeepSpeed's own converter.

DeepSpeed itself is imported by the ranks alone: what tells partitions from parameters looks whether it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpt
import lightning as L
import torch
import torch.distributed as dist
from gpt_settings import Settings
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import kernels, quantize
from lowbit_lightning.layers import Experts
from lowbit_lightning.strategies import DeepSpeedStrategy
from support.quiet import quiet_trainer

STEPS, SAVED_AT, BATCH, CONTEXT = 6, 3, 6, 16
SETTINGS = Settings(width=128, layers=2, context=CONTEXT, steps=STEPS, warmup=2, learning_rate=1e-3)
SGD: Any = partial(torch.optim.SGD, lr=0.5)  # what DeepSpeed does with a gradient shows: half of it moves AdamW as far
AdamW: Any = partial(torch.optim.AdamW, lr=1e-2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counted(L.LightningModule):
    """The same batches in the same order on any number of ranks, and a list of losses."""

    losses: list[Tensor]

    def rows(self, index: int) -> slice:
        """This rank's part of a batch. A loader starts anew in the middle of an epoch; the index goes on."""
        return slice(index * BATCH + dist.get_rank(), (index + 1) * BATCH, dist.get_world_size())

    def train_dataloader(self) -> Any:
        return DataLoader(range(STEPS))  # type: ignore[arg-type]

    def mean_losses(self) -> list[float]:
        """Of all ranks; a collective."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()


class GPT(Counted, gpt.GPT):
    """The example's model and optimizer."""

    def __init__(self, optimizer: Any = None) -> None:
        torch.manual_seed(0)
        super().__init__(SETTINGS, partial(torch.optim.AdamW, fused=True))
        self.optimizer, self.losses = optimizer, []
        starts = torch.randint(0, 50, (BATCH * STEPS, 1), generator=seeded(1))
        self.windows = (starts + 7 * torch.arange(CONTEXT + 1)) % 256

    def training_step(self, number: Tensor, index: int) -> Tensor:
        loss = super().training_step(self.windows[self.rows(index)], index)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.optimizer is None else self.optimizer(self.parameters())


class Small(Counted):
    """An embedding, three matrices, vectors."""

    def __init__(self, optimizer: Any = AdamW, schedule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(64, 128), nn.Linear(128, 256), nn.Linear(256, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 64)
        self.optimizer, self.schedule, self.losses = optimizer, schedule, []
        self.inputs = torch.randint(0, 64, (BATCH * STEPS, 8), generator=seeded(1))

    def loss(self, index: int) -> Tensor:
        x = self.inputs[self.rows(index)]
        logits = self.head(self.norm(self.down(torch.relu(self.up(self.embed(x))))))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ((x + 7) % 64).flatten())

    def training_step(self, _: Tensor, index: int) -> Tensor:
        loss = self.loss(index)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, _: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(index), sync_dist=True)

    def val_dataloader(self) -> Any:
        return DataLoader(range(2))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


class Routed(nn.Module):
    """Each token goes to two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(128, 4), Experts(4, 128, 32)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x.flatten(0, 1)).softmax(-1).topk(2)
        return x + self.experts(x.flatten(0, 1), index, weights).view(x.shape)


class Mixed(Small):
    """Convolutions of three pixels and of one, attention, experts, and frozen experts in low bits, in place of the
    second matrix."""

    def __init__(self, optimizer: Any = AdamW) -> None:
        super().__init__(optimizer)
        self.down = nn.Sequential(  # type: ignore[assignment]
            nn.Unflatten(2, (32, 8)), nn.Flatten(0, 1), nn.Conv1d(32, 32, 3, padding=1), nn.Conv1d(32, 16, 1),
            nn.Flatten(), nn.Unflatten(0, (-1, 8)), Routed(), quantize(Routed(), "nf4", output_layer=None),
        )  # fmt: skip
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)

    def loss(self, index: int) -> Tensor:
        x = self.inputs[self.rows(index)]
        y = self.down(torch.relu(self.up(self.embed(x))))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return nn.functional.cross_entropy(self.head(self.norm(y)).flatten(0, 1).float(), ((x + 7) % 64).flatten())


class ByHand(Small):
    """Manual optimization: a step for each two batches."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, _: Tensor, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(_, index) / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


class Broken(Small):
    """A loss that is no number, once, on one rank."""

    def loss(self, index: int) -> Tensor:
        return super().loss(index) * (float("nan") if index == 2 and dist.get_rank() == 0 else 1)


def groups(parameters: Any) -> Any:
    """Two, which differ in all that counts."""
    matrices, vectors = list[Tensor](), list[Tensor]()
    for p in parameters:
        (vectors if len(getattr(p, "ds_shape", p.shape)) < 2 else matrices).append(p)
    return torch.optim.AdamW([
        {"params": matrices, "lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.99)},
        {"params": vectors, "lr": 2e-2, "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ])  # fmt: skip


# -- runs ------------------------------------------------------------------------------------------------------------


def trainer_of(strategy: Any, **options: Any) -> L.Trainer:
    fixed: dict[str, Any] = {"limit_val_batches": 0, "use_distributed_sampler": False}
    return quiet_trainer(devices=dist.get_world_size(), strategy=strategy, **{**fixed, **options})


def fit(strategy: Any, model: Any = None, ckpt_path: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    model, trainer = model or Small(), trainer_of(strategy, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def loop(stage: int, make: Callable[[Any], Any], steps: int = 4) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "sub_group_size": 20_000},
        "gradient_clipping": 1.0,
    }
    optimizer = make(model.parameters())
    deepspeed: Any = sys.modules["deepspeed"]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.randn(steps, 8, 64, generator=seeded(dist.get_rank()))
    losses = []
    for batch in x:
        loss = engine(batch).square().mean() + engine.module[0](batch).mean() * 0
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    if not losses:
        return [], engine
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist(), engine


def cut(stage: int, bits: Any = 32, **options: Any) -> DeepSpeedStrategy:
    """Stage 3 keeps no parameter whole."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return DeepSpeedStrategy(config={"zero_optimization": zero, **options}, optimizer_bits=bits)


class Watch(L.Callback):
    """The states when training begins, and when a checkpoint is saved if there is a path for one."""

    def __init__(self, path: Path | None = None, step: int = SAVED_AT) -> None:
        self.path, self.step = path, step
        self.begun, self.saved = list[dict[str, Tensor]](), list[dict[str, Tensor]]()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun = picture(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.saved = picture(trainer)


def off(found: list[float], expected: list[float], limit: float) -> str | None:
    worst = max(abs(x - y) / abs(y) for x, y in zip(found, expected, strict=True))
    return None if worst <= limit else f"losses are off by {worst:.1e}: {found}, {expected}"


def convert(path: Path) -> None:
    """DeepSpeed's own tool, as the command line runs it."""
    ds_to_universal: Any = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    arguments = argparse.Namespace(
        input_folder=str(path / "checkpoint"),
        output_folder=str(path / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


# -- states ----------------------------------------------------------------------------------------------------------


def picture(trainer: Any) -> list[dict[str, Tensor]]:
    """This rank's states, a group after the other."""
    return [
        {k: torch.as_tensor(x).clone() for k, x in entries.items()} for entries in trainer.optimizers[0].state.values()
    ]


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> str | None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.keys() != y.keys():
            return f"group {i} has {sorted(x)}, not {sorted(y)}"
        for name in x:
            if x[name].dtype != y[name].dtype or not torch.equal(x[name], y[name]):
                return f"group {i}: {name} differs"
    return None


def nbytes(states: list[dict[str, Tensor]]) -> int:
    return sum(x.nbytes for entries in states for x in entries.values())


class Compare(L.Callback):
    """Loaded states with DeepSpeed's universal files, a parameter after the other."""

    def __init__(self, folder: Path, stage: int) -> None:
        self.folder, self.stage, self.problem = folder, stage, "nothing was compared"

    def on_train_start(self, trainer: Any, module: L.LightningModule) -> None:
        found = list(self._problems(trainer, module))
        self.problem = next((p for p in found if p), "" if len(found) > 8 else f"only {len(found)} were compared")

    def _problems(self, trainer: Any, module: L.LightningModule) -> Iterator[str | None]:
        zero = trainer.optimizers[0]
        for name, start, count, flat, offset in pieces(zero, module, self.stage):
            for key, codebook in (("exp_avg", "dynamic_signed"), ("exp_avg_sq", "dynamic_unsigned")):
                saved = torch.load(self.folder / name / f"{key}.pt", weights_only=False)
                saved = (saved["param"] if isinstance(saved, dict) else saved).flatten()[start : start + count]
                entries, matrix = zero.state[flat], name.startswith(("head", "blocks")) and "norm" not in name
                problem = within_a_code(entries, key, codebook, offset, saved)
                if (f"{key}_codes" in entries) != (matrix and name.endswith("weight")) or len(saved) != count:
                    problem = f"{sorted(entries)}, {len(saved)} of {count}"
                yield problem and f"{name} {key}: {problem}"


def pieces(zero: Any, module: nn.Module, stage: int) -> Iterator[tuple[str, int, int, Tensor, int]]:
    """What this rank holds: a parameter's name, the range of its elements, and where they lie in which partition."""
    names = {p: name for name, p in module.named_parameters()}
    if stage < 3:
        for i, group in enumerate(zero.bit16_groups):
            for p in group:
                if p._hp_mapping is not None:
                    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    yield names[p], here.start, here.numel, zero.single_partition_of_fp32_groups[i], there.start
        return
    for i, group in enumerate(zero.fp16_groups):
        offset = 0
        for p in group:
            share, start = p.partition_numel(), p.partition_numel() * dist.get_rank()
            yield names[p], start, max(0, min(share, p.ds_numel - start)), zero.fp32_partitioned_groups_flat[i], offset
            offset += share


def within_a_code(entries: Any, key: str, codebook: str, offset: int, saved: Tensor) -> str | None:
    part = slice(offset, offset + len(saved))
    if key in entries:
        return None if torch.equal(entries[key][part], saved) else "32-bit values differ"
    codes, scales = entries[f"{key}_codes"], entries[f"{key}_scales"]
    below, above = (
        kernels.dequantize_blockwise((codes.int() + step).clamp(0, 255).byte(), scales, codebook, 256)
        for step in (-1, 1)
    )
    if codebook == "dynamic_signed":  # its last code is -0.993, and stands for -1 too
        below = torch.where(codes == 0, -scales[0].repeat_interleave(256)[: len(codes)], below)
    low, high = torch.minimum(below, above)[part], torch.maximum(below, above)[part]
    bad = (saved < low) | (saved > high)
    return f"{int(bad.sum())} of {len(saved)} are further than a code away" if bad.any() else None


def misplaced(states: list[dict[str, Tensor]]) -> str | None:
    """Whether other parameters than the matrices of linear layers are in 8 bits, or not all of them."""
    held = {8: 0, 32: 0}  # elements, of all ranks
    for entries in states:
        coded = "exp_avg_codes" in entries
        held[8 if coded else 32] += dist.get_world_size() * entries["exp_avg_codes" if coded else "exp_avg"].numel()
    model = GPT()
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    others = sum(p.numel() for p in model.parameters()) - matrices
    padding = 64
    fits = matrices <= held[8] < matrices + padding and others <= held[32] < others + padding
    return None if fits else f"elements by bits are {held}, not {matrices} and {others}"
