"""DeepSpeed on gloo ranks of one machine: ``deepspeed_ranks.py FOLDER ROUND...``, where a round is a number of ranks.

One process imports everything and forks the ranks of each round in turn. Every rank runs the round's checks and
writes ``FOLDER/ROUND.RANK.json``: for each check the first thing that is wrong, or null.
``tests/strategies/test_deepspeed.py`` reads them. DDP, or DeepSpeed with torch's own AdamW, is the yardstick. The
round "2" comes first: the others load what it
saved. ``deepspeed_small.py`` has more checks.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed_small as small
import lightning as L
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
from deepspeed_small import convert, off, raised
from deepspeed_states import Compare, equal, nbytes, picture
from support.ranks import fork, join, write_outcomes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import kernels, optim
from lowbit_lightning.callbacks import LowBitMonitor
from lowbit_lightning.layers.int8 import FEWEST_ROWS
from lowbit_lightning.strategies import DeepSpeedStrategy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
gpt: Any = importlib.import_module("gpt")
gpt_settings: Any = importlib.import_module("gpt_settings")

STEPS, SAVED_AT, BATCH, CONTEXT = 6, 3, 6, 16
SETTINGS = gpt_settings.Settings(width=256, layers=2, context=CONTEXT, steps=STEPS, warmup=2, learning_rate=1e-3)
STAGES = 1, 2, 3
LIMITS = {"32": 1e-6, "8": 1e-3, "int8": 5e-3}  # as for lowbit_sharded; relative, of any loss
BYTES = 0.30  # of float32's: 2.03 bytes for 8, and the embedding and 1-D parameters with 8 for 8


class GPT(gpt.GPT):
    """The example's model and optimizer, on the same windows in the same order on any number of ranks."""

    def __init__(self, optimizer: Any = None) -> None:
        torch.manual_seed(0)
        super().__init__(SETTINGS, partial(torch.optim.AdamW, fused=True))
        self.optimizer, self.losses = optimizer, list[Tensor]()
        starts = torch.randint(0, 50, (BATCH * STEPS, 1), generator=seeded(1))
        self.windows = (starts + 7 * torch.arange(CONTEXT + 1)) % 256

    def training_step(self, number: Tensor, index: int) -> Tensor:
        first = index * BATCH + dist.get_rank()  # a loader starts anew in the middle of an epoch; the index goes on
        loss = super().training_step(self.windows[first : (index + 1) * BATCH : dist.get_world_size()], index)
        self.losses.append(loss.detach())
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(range(STEPS))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.optimizer is None else self.optimizer(self.parameters())

    def mean_losses(self) -> list[float]:
        """Of all ranks; a collective."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()


OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(
    strategy: Any, precision: Any = "32-true", model: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Any, L.Trainer]:
    model = model or GPT()
    trainer = L.Trainer(devices=dist.get_world_size(), strategy=strategy, precision=precision, **{**OPTIONS, **options})
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


class Watch(L.Callback):
    """The states when training begins and when a checkpoint is saved."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.begun, self.saved = path, list[dict[str, Tensor]](), list[dict[str, Tensor]]()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun = picture(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)
            self.saved = picture(trainer)


# -- checks: folder -> what is wrong, or None --------------------------------------------------------------------------


def stages_train_like_torch(folder: Path) -> str | None:
    """Losses, bytes of state, and how many int8 products ran."""
    for stage in STAGES:
        plain, trainer = fit(DeepSpeedStrategy(stage, optimizer_bits=None))
        expected, whole = plain.mean_losses(), nbytes(picture(trainer))
        for mode, limit in LIMITS.items():
            strategy = (
                DeepSpeedStrategy(stage, optimizer_bits=32) if mode == "32" else f"lowbit_deepspeed_stage_{stage}"
            )
            kernels.reset_calls()
            model, trainer = fit(strategy, "int8-mixed" if mode == "int8" else "32-true")
            problem = off(model.mean_losses(), expected, limit)
            states = picture(trainer)
            problem = problem or (None if mode == "32" else misplaced(states))
            if mode != "32" and not nbytes(states) <= BYTES * whole:
                problem = problem or f"{nbytes(states)} bytes of states, and {whole} in 32 bits"
            if not is_zero_supported_optimizer(trainer.optimizers[0].optimizer):  # type: ignore[attr-defined]
                problem = problem or "DeepSpeed says that the optimizer is untested"
            if {float(entries["step"]) for entries in states} != {STEPS}:
                problem = problem or f"steps are {[entries['step'] for entries in states]}"
            matmuls = sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul")
            report = getattr(trainer.precision_plugin, "report", None)
            swapped = len(report.swapped) if report else 0
            predicted = 3 * 4 * SETTINGS.layers * STEPS if mode == "int8" else 0
            if matmuls != predicted or swapped != (4 * SETTINGS.layers if predicted else 0):
                problem = problem or f"{matmuls} int8 products in {swapped} layers, not {predicted}"
            if problem:
                return f"stage {stage}, {mode}: {problem}"
    return None


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


def clipping_accumulation_and_offload(folder: Path) -> str | None:
    options: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    bf16: dict[str, Any] = {"gradient_clip_val": 0.1, "precision": "bf16-true"}
    plain: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}]
    offloaded: list[dict[str, Any]] = [{"stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    for shared, kinds, limit in ((options, [*plain[1:], *offloaded], 1e-6), (bf16, plain, 1e-3)):
        # DDP in bf16 has no float32 copies of the weights.
        yardstick: Any = "ddp" if shared is options else DeepSpeedStrategy(2, optimizer_bits=None)
        expected, _ = fit(yardstick, **shared)
        for kind in kinds:
            model, _ = fit(DeepSpeedStrategy(optimizer_bits=32, **kind), **shared)
            problem = off(model.mean_losses(), expected.mean_losses(), limit)
            if problem:
                return f"{kind}, {shared}: {problem}"
    return None


def a_checkpoint_resumes_to_the_bit(folder: Path) -> str | None:
    for stage in STAGES:
        path, name = folder / f"stage_{stage}", f"lowbit_deepspeed_stage_{stage}"
        if dist.get_rank() == 0:
            path.mkdir()
            (path / "latest_universal").write_text("of an older checkpoint")
        watch = Watch(path)
        through, _ = fit(name, callbacks=[watch])
        if (path / "latest_universal").exists():
            return f"stage {stage}: an older conversion is still in use"
        again, monitor = Watch(), LowBitMonitor(every_n_steps=1)
        resumed, _ = fit(DeepSpeedStrategy(stage, paged="disk"), callbacks=[again, monitor], ckpt_path=path)
        missing = {"pages/bytes_in", "int8/optimizer/exp_avg/zero"} - monitor.metrics.keys()
        problem = equal(again.begun, watch.saved)
        if problem is None and resumed.losses != through.losses[SAVED_AT:]:
            problem = f"{resumed.losses} follow, not {through.losses[SAVED_AT:]}"
        if missing:
            problem = problem or f"LowBitMonitor shows {sorted(monitor.metrics)}, not {missing}"
        losses = through.mean_losses()
        if dist.get_rank() == 0:
            (folder / f"losses_{stage}.json").write_text(json.dumps(losses[SAVED_AT:]))
            convert(path)
        dist.barrier()
        if problem:
            return f"stage {stage}: {problem}"
    return None


def a_universal_checkpoint_resumes(folder: Path) -> str | None:
    """On another number of ranks: states within a code of those saved, and the losses of the run that went on."""
    for stage in STAGES:
        path = folder / f"stage_{stage}"
        compared = Compare(path / "universal" / "zero", stage)
        strategy = DeepSpeedStrategy(stage, paged="disk" if stage == 3 else False)
        model, trainer = fit(strategy, callbacks=[compared], ckpt_path=path)
        expected = json.loads((folder / f"losses_{stage}.json").read_text())
        decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
        problem = compared.problem or off(model.mean_losses(), expected, 1e-3)
        if decays != [0.1, 0.0, 0.1]:
            problem = problem or f"weight decays are {decays}"
        if {float(entries["step"]) for entries in picture(trainer)} != {STEPS}:
            problem = problem or f"steps are {[entries['step'] for entries in picture(trainer)]}"
        if problem:
            return f"stage {stage}: {problem}"
    return None


def an_unconverted_checkpoint_is_refused(folder: Path) -> str | None:
    path = folder / "stage_2"
    moved = folder / f"hidden_{dist.get_rank()}"
    moved.mkdir(exist_ok=True)
    (moved / "checkpoint").symlink_to(path / "checkpoint")
    message = raised(lambda: fit("lowbit_deepspeed_stage_2", ckpt_path=moved), ValueError)
    return message if "ds_to_universal" not in message else None


def evaluates_without_and_after_fit(folder: Path) -> str | None:
    """In int8, though the batches are small; the values are DDP's."""
    FEWEST_ROWS["cpu"] = (1, 1, 1)
    expected: list[float] = []
    for name in ("ddp", "lowbit_deepspeed_stage_2", "lowbit_deepspeed_stage_3"):
        options = {**OPTIONS, "precision": "int8-mixed", "strategy": name, "limit_val_batches": 2}
        trained, _ = fit(name, "int8-mixed")
        values = []
        for model in (GPT(), trained):
            evaluation = L.Trainer(devices=dist.get_world_size(), **options)
            kernels.reset_calls()
            windows: Any = list(model.windows[:4])
            values.append(evaluation.validate(model, DataLoader(windows, 2), verbose=False)[0]["val_loss"])
            matmuls = sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul")
            if matmuls != 2 * 4 * SETTINGS.layers:
                return f"{name}: {matmuls} int8 products"
        expected = expected or values
        problem = off(values, expected, LIMITS["int8"])
        if problem:
            return f"{name}: {problem}"
    return None


def refusals_come_before_training(folder: Path) -> str | None:
    kinds: tuple[tuple[Any, str], ...] = (optim.LAMB, "LAMB"), (optim.LARS, "LARS")
    for optimizer, words in kinds:
        model = GPT(partial(optimizer, lr=1e-2))
        message = raised(partial(fit, "lowbit_deepspeed_stage_2", model=model), ValueError)
        if words not in message or "lowbit_sharded" not in message or model.losses:
            return f"{words}: {message}, after {len(model.losses)} steps"
    return None


def deepspeed_alone(folder: Path) -> str | None:
    """``deepspeed.initialize(model, optimizer=ours)`` without Lightning, and its save and load."""
    for stage in (0, *STAGES):
        losses, _ = loop(stage, partial(torch.optim.AdamW, lr=1e-3))
        for bits, limit in ((32, 1e-6), (8, 1e-3)):
            found, engine = loop(stage, partial(optim.AdamW, lr=1e-3, bits=bits))
            problem = off(found, losses, limit)
            if problem:
                return f"stage {stage}, bits={bits}: {problem}"
        paged, _ = loop(stage, partial(optim.AdamW, lr=1e-3, paged="disk"))
        if paged != found:
            return f"stage {stage}, paged: {paged}, not {found}"
        path = str(folder / f"alone_{stage}")
        engine.save_checkpoint(path)
        before = [dict(entries) for entries in engine.optimizer.state.values()]
        _, again = loop(stage, partial(optim.AdamW, lr=1e-3), steps=0)
        again.load_checkpoint(path)
        problem = equal([dict(entries) for entries in again.optimizer.state.values()], before)
        if problem or not before:
            return f"stage {stage}: {problem}"
        if stage:
            message = raised(partial(loop, stage, optim.LAMB), ValueError)
            if "flat partitions" not in message:
                return f"stage {stage}: {message}"
    return None


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


# -- running them ------------------------------------------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[[Path], str | None], ...]] = {
    "2": (
        stages_train_like_torch,
        clipping_accumulation_and_offload,
        a_checkpoint_resumes_to_the_bit,
        evaluates_without_and_after_fit,
        refusals_come_before_training,
        deepspeed_alone,
    ),
    "1": (a_universal_checkpoint_resumes, an_unconverted_checkpoint_is_refused),
    "3": (a_universal_checkpoint_resumes,),
}


def rank_main(rank: int, ranks: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
    for name in ("lightning.pytorch", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    join(rank, ranks, folder / f"store {ranks}")
    checks = (*CHECKS[str(ranks)], *small.CHECKS[str(ranks)])
    write_outcomes(folder / f"{ranks}.{rank}.json", checks, folder)
    dist.destroy_process_group()


def main(folder: Path, rounds: list[str]) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]  # it would be compiled
    for ranks in map(int, rounds):
        fork(rank_main, (ranks, folder), ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
