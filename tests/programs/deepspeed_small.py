"""More checks for ``deepspeed_ranks.py``: of a small model, against DDP and Lightning's own strategy.

What DeepSpeed does with a gradient is seen with plain SGD: AdamW's steps are the same for half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import optim
from lowbit_lightning.strategies import DeepSpeedStrategy

STEPS, BATCH, STAGES = 6, 6, (1, 2, 3)
SGD: Any = partial(torch.optim.SGD, lr=0.5)
AdamW: Any = partial(torch.optim.AdamW, lr=1e-2)


class Small(L.LightningModule):
    """An embedding, three matrices, vectors; the same batches in the same order on any number of ranks."""

    def __init__(self, optimizer: Any = AdamW, schedule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(64, 128), nn.Linear(128, 256), nn.Linear(256, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 64)
        self.optimizer, self.schedule, self.losses = optimizer, schedule, list[Tensor]()
        self.inputs = torch.randint(0, 64, (BATCH * STEPS, 8), generator=torch.Generator().manual_seed(1))

    def loss(self, index: int) -> Tensor:
        x = self.inputs[index * BATCH + dist.get_rank() : (index + 1) * BATCH : dist.get_world_size()]
        logits = self.head(self.norm(self.down(torch.relu(self.up(self.embed(x))))))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ((x + 7) % 64).flatten())

    def training_step(self, _: Tensor, index: int) -> Tensor:
        loss = self.loss(index)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, _: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(index), sync_dist=True)

    def train_dataloader(self) -> Any:
        return DataLoader(range(STEPS))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(range(2))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def mean_losses(self) -> list[float]:
        """Of all ranks; a collective."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()


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


def trainer_of(strategy: Any, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    return L.Trainer(devices=dist.get_world_size(), strategy=strategy, **{**quiet, **fixed, **options})


def fit(strategy: Any, model: Any = None, ckpt_path: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    model, trainer = model or Small(), trainer_of(strategy, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


class Save(L.Callback):
    def __init__(self, path: Path, step: int = 3) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def off(found: list[float], expected: list[float], limit: float) -> str | None:
    worst = max(abs(x - y) / abs(y) for x, y in zip(found, expected, strict=True))
    return None if worst <= limit else f"losses are off by {worst:.1e}: {found}, {expected}"


def raised(action: Callable[[], Any], kind: type[BaseException] = ValueError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return f"no {kind.__name__}"


def convert(path: Path) -> None:
    """DeepSpeed's own tool, as the command line runs it."""
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


# -- checks: folder -> what is wrong, or None --------------------------------------------------------------------------


def gradients_are_those_of_ddp(folder: Path) -> str | None:
    """Accumulated, clipped, in int8, and by hand."""
    kinds: list[tuple[dict[str, Any], tuple[int, ...], float]] = [
        ({"accumulate_grad_batches": 3}, (1, 2), 1e-6),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, (2, 3), 1e-6),
        ({"accumulate_grad_batches": 3, "precision": "int8-mixed"}, (2,), 1e-3),
    ]
    for options, stages, limit in kinds:
        expected = fit("ddp", Small(SGD), **options)[0].mean_losses()
        for stage in stages:
            found = fit(DeepSpeedStrategy(stage, optimizer_bits=32), Small(SGD), **options)[0].mean_losses()
            problem = off(found, expected, limit)
            if problem:
                return f"stage {stage}, {options}: {problem}"
    expected = fit("ddp", ByHand())[0].mean_losses()
    problem = off(fit(DeepSpeedStrategy(3, optimizer_bits=32), ByHand())[0].mean_losses(), expected, 1e-6)
    message = raised(partial(fit, DeepSpeedStrategy(2), ByHand()), RuntimeError)
    return problem or (None if "do not add such gradients up" in message else message)


def evaluation_is_that_of_ddp(folder: Path) -> str | None:
    """Of a model that was trained, and of its checkpoint, also where stage 3 keeps no parameter whole."""
    ddp = fit("ddp")[0]
    (expected,) = trainer_of("ddp", limit_val_batches=2).validate(ddp, verbose=False)
    (folder / "evaluation.json").write_text(json.dumps(expected["val_loss"]))
    for stage in (2, 3):
        strategy, path = f"lowbit_deepspeed_stage_{stage}", folder / f"evaluated_{stage}"
        model, _ = fit(cut(stage), callbacks=[Save(path, STEPS)])
        (after,) = trainer_of(strategy, limit_val_batches=2).validate(model, verbose=False)
        problem = off([after["val_loss"], loaded_value(cut(stage), path)], 2 * [expected["val_loss"]], 1e-5)
        if problem:
            return f"stage {stage}: {problem}"
    return None


def cut(stage: int, bits: Any = 32, **options: Any) -> DeepSpeedStrategy:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return DeepSpeedStrategy(config={"zero_optimization": zero, **options}, optimizer_bits=bits)


def loaded_value(strategy: Any, path: Path) -> float:
    found = trainer_of(strategy, limit_val_batches=2).validate(Small(), ckpt_path=path, verbose=False)
    return found[0]["val_loss"]


def a_checkpoint_is_evaluated_on_fewer_ranks(folder: Path) -> str | None:
    expected = json.loads((folder / "evaluation.json").read_text())
    return off([loaded_value(cut(stage), folder / f"evaluated_{stage}") for stage in (2, 3)], 2 * [expected], 1e-5)


def evaluation_on_more_ranks_is_refused(folder: Path) -> str | None:
    message = raised(partial(loaded_value, cut(3), folder / "evaluated_3"))
    return None if "convert_zero_checkpoint_to_fp32_state_dict" in message else message


def groups(parameters: Any) -> Any:
    """Two, which differ in all that counts."""
    matrices, vectors = list[Tensor](), list[Tensor]()
    for p in parameters:
        (vectors if len(getattr(p, "ds_shape", p.shape)) < 2 else matrices).append(p)
    return torch.optim.AdamW([
        {"params": matrices, "lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.99)},
        {"params": vectors, "lr": 2e-2, "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ])  # fmt: skip


def a_universal_checkpoint_where_none_was_needed(folder: Path) -> str | None:
    """``load_universal`` in a config, on the ranks that saved: hyperparameters and losses of the run that went on."""
    path = folder / "needless"
    through, expected = fit(cut(3, 8), Small(groups), callbacks=[Save(path)])
    if dist.get_rank() == 0:
        convert(path)
    dist.barrier()
    model, trainer = fit(cut(3, 8, checkpoint={"load_universal": True}), Small(groups), path)
    found, wanted = (
        [(g["lr"], g["weight_decay"], g["betas"]) for g in t.optimizers[0].param_groups] for t in (trainer, expected)
    )
    problem = off(model.mean_losses(), through.mean_losses()[3:], 1e-3)
    return problem or (None if found == wanted and len(set(wanted)) == 2 else f"{found}, not {wanted}")


def learning_rates_are_logged_as_under_ddp(folder: Path) -> str | None:
    """Under the same names."""
    found = []
    for strategy in ("ddp", "lowbit_deepspeed_stage_2"):
        model = Small(schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))
        monitor, logger = LearningRateMonitor("step"), CSVLogger(folder / strategy)
        fit(strategy, model, callbacks=[monitor], logger=logger, log_every_n_steps=1)
        found.append(monitor.lrs)
    return None if found == [{"lr-AdamW": [1e-2 * 0.5**i for i in range(STEPS)]}] * 2 else str(found)


def configurations_are_heeded(folder: Path) -> str | None:
    """A scheduler of DeepSpeed's with a value for each group; clipping given twice; a second run that differs."""
    rates, params = [], {"warmup_min_lr": [0.0], "warmup_max_lr": [1e-2], "warmup_num_steps": 3, "total_num_steps": 8}
    for bits in (None, 8):
        strategy = cut(2, bits, scheduler={"type": "WarmupDecayLR", "params": params})
        rates.append({group["lr"] for group in fit(strategy)[1].optimizers[0].param_groups})
    if rates[0] != rates[1] or len(rates[0]) != 1:
        return f"learning rates are {rates}"
    message = raised(partial(fit, cut(2, gradient_clipping=0.5), gradient_clip_val=0.1))
    if "gradient_clip_val=0.1" not in message or "gradient_clipping is 0.5" not in message:
        return message
    model, (_, trainer) = Small(SGD), fit(cut(2), accumulate_grad_batches=2, gradient_clip_val=1e-3)
    trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.fit_loop.max_epochs = 3, None, 2
    trainer.fit(model)
    return off(model.mean_losses(), fit("ddp", Small(SGD), accumulate_grad_batches=3)[0].mean_losses(), 1e-6)


REFUSED: Any = (("saved_8", 2, 32), ("saved_8", 2, None), ("saved_32", 2, 8), ("saved_8", 3, 8))


def other_groups_and_stages_are_refused(folder: Path) -> str | None:
    """On the ranks that saved, and on others."""
    if dist.get_world_size() == 2:
        for bits in (8, 32):
            fit(cut(2, bits), callbacks=[Save(folder / f"saved_{bits}")])
    for name, stage, bits in REFUSED:
        model = Small()
        message = raised(partial(fit, cut(stage, bits), model, folder / name))
        words = "use stage=2" if stage == 3 else f"saved with optimizer_bits={name[6:]}, in other groups"
        if words not in message or model.losses:
            return f"{name} at stage {stage} with bits={bits}: {message}, {len(model.losses)} steps"
    return None


def what_the_converter_would_drop(folder: Path) -> str | None:
    """AdEMAMix: two ranks resume to the bit, DeepSpeed's tool refuses, and so do other ranks."""
    make, path = partial(optim.AdEMAMix, lr=1e-2), folder / "ademamix"
    if dist.get_world_size() == 1:
        message = raised(partial(fit, cut(2, 8), Small(make), path))
        return None if "exp_avg_slow" in message and "devices=2" in message else message
    through, _ = fit(cut(2, 8), Small(make), callbacks=[Save(path)])
    resumed, _ = fit(cut(2, 8), Small(make), path)
    message = raised(partial(convert, path), AssertionError) if dist.get_rank() == 0 else "universal_checkpoint_info"
    dist.barrier()
    same = resumed.losses == through.losses[3:]
    return None if same and "universal_checkpoint_info" in message else f"{message}; {resumed.losses}"


def steps_that_are_not_finite_are_skipped(folder: Path) -> str | None:
    """By DeepSpeed, on all ranks, whoever's gradient it was."""
    for stage in (2, 3):
        model, trainer = fit(cut(stage, 8), Broken())
        counts = [float(entries["step"]) for entries in trainer.optimizers[0].state.values()]
        if counts != [STEPS - 1] * 2 or [bool(loss.isfinite()) for loss in model.losses].count(False) > 1:
            return f"stage {stage}: {counts} steps, {model.losses}"
    return None


CHECKS: dict[str, tuple[Callable[[Path], str | None], ...]] = {
    "2": (
        gradients_are_those_of_ddp,
        evaluation_is_that_of_ddp,
        learning_rates_are_logged_as_under_ddp,
        configurations_are_heeded,
        a_universal_checkpoint_where_none_was_needed,
        other_groups_and_stages_are_refused,
        what_the_converter_would_drop,
        steps_that_are_not_finite_are_skipped,
    ),
    "1": (
        a_checkpoint_is_evaluated_on_fewer_ranks,
        other_groups_and_stages_are_refused,
        what_the_converter_would_drop,
    ),
    "3": (evaluation_on_more_ranks_is_refused,),
}
