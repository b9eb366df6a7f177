"""``DeepSpeedStrategy`` on two ranks, then on one and on three, which load what two saved and DeepSpeed's own tool
converted. DDP, or DeepSpeed with torch's own AdamW, is the yardstick."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from support import on_ranks as rounds
from support.deepspeed_runs import (
    GPT,
    SAVED_AT,
    SETTINGS,
    SGD,
    STEPS,
    Broken,
    ByHand,
    Compare,
    Mixed,
    Small,
    Watch,
    convert,
    cut,
    equal,
    fit,
    groups,
    loop,
    misplaced,
    nbytes,
    off,
    picture,
    trainer_of,
)
from support.on_ranks import on_ranks
from support.sharded_model import raised
from torch.utils.data import DataLoader

from lowbit_lightning import Int8MixedPrecision, kernels, optim
from lowbit_lightning.callbacks import LowBitMonitor
from lowbit_lightning.layers.int8 import FEWEST_ROWS
from lowbit_lightning.strategies import DeepSpeedStrategy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux")

STAGES = 1, 2, 3
LIMITS = {"32": 1e-6, "8": 1e-3, "int8": 5e-3}  # as for lowbit_sharded; relative, of any loss
BYTES = 0.34  # of float32's: 2.03 bytes for 8, and the embedding and 1-D parameters with 8 for 8


def before_ranks() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@on_ranks(2, slow=(2,))
def test_stages_train_like_torch(folder: Path) -> str | None:
    """Losses, bytes of state, and how many int8 products ran. Stages 1 and 2 are one optimizer of DeepSpeed's."""
    zero_utils: Any = importlib.import_module("deepspeed.runtime.zero.utils")
    for stage in STAGES if rounds.THOROUGH else STAGES[1:]:
        plain, trainer = fit(DeepSpeedStrategy(stage, optimizer_bits=None), GPT())
        expected, whole = plain.mean_losses(), nbytes(picture(trainer))
        for mode, limit in LIMITS.items():
            strategy = (
                DeepSpeedStrategy(stage, optimizer_bits=32) if mode == "32" else f"lowbit_deepspeed_stage_{stage}"
            )
            kernels.reset_calls()
            model, trainer = fit(strategy, GPT(), precision="int8-mixed" if mode == "int8" else "32-true")
            problem = off(model.mean_losses(), expected, limit)
            states = picture(trainer)
            problem = problem or (None if mode == "32" else misplaced(states))
            if mode != "32" and not nbytes(states) <= BYTES * whole:
                problem = problem or f"{nbytes(states)} bytes of states, and {whole} in 32 bits"
            inner: Any = trainer.optimizers[0]
            if not zero_utils.is_zero_supported_optimizer(inner.optimizer):
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


@on_ranks(2)
def test_clipping_accumulation_and_offload(folder: Path) -> str | None:
    options: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    bf16: dict[str, Any] = {"gradient_clip_val": 0.1, "precision": "bf16-true"}
    plain: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}]
    offloaded: list[dict[str, Any]] = [{"stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    for shared, kinds, limit in ((options, [*plain[1:], *offloaded], 1e-6), (bf16, plain, 1e-3)):
        # DDP in bf16 has no float32 copies of the weights.
        yardstick: Any = "ddp" if shared is options else DeepSpeedStrategy(2, optimizer_bits=None)
        expected, _ = fit(yardstick, GPT(), **shared)
        for kind in kinds:
            model, _ = fit(DeepSpeedStrategy(optimizer_bits=32, **kind), GPT(), **shared)
            problem = off(model.mean_losses(), expected.mean_losses(), limit)
            if problem:
                return f"{kind}, {shared}: {problem}"
    return None


@on_ranks(2)
def test_a_checkpoint_resumes_to_the_bit(folder: Path) -> str | None:
    for stage in STAGES:
        path, name = folder / f"stage_{stage}", f"lowbit_deepspeed_stage_{stage}"
        if dist.get_rank() == 0:
            path.mkdir()
            (path / "latest_universal").write_text("of an older checkpoint")
        watch = Watch(path)
        through, _ = fit(name, GPT(), callbacks=[watch])
        if (path / "latest_universal").exists():
            return f"stage {stage}: an older conversion is still in use"
        again, monitor = Watch(), LowBitMonitor(every_n_steps=1)
        resumed, _ = fit(DeepSpeedStrategy(stage, paged="disk"), GPT(), path, callbacks=[again, monitor])
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


@on_ranks(1, 3, after=test_a_checkpoint_resumes_to_the_bit)
def test_a_universal_checkpoint_resumes(folder: Path) -> str | None:
    """On another number of ranks: states within a code of those saved, and the losses of the run that went on."""
    for stage in STAGES:
        path = folder / f"stage_{stage}"
        compared = Compare(path / "universal" / "zero", stage)
        strategy = DeepSpeedStrategy(stage, paged="disk" if stage == 3 else False)
        model, trainer = fit(strategy, GPT(), path, callbacks=[compared])
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


@on_ranks(1, after=test_a_checkpoint_resumes_to_the_bit)
def test_an_unconverted_checkpoint_is_refused(folder: Path) -> str | None:
    path = folder / "stage_2"
    moved = folder / f"hidden_{dist.get_rank()}"
    moved.mkdir(exist_ok=True)
    (moved / "checkpoint").symlink_to(path / "checkpoint")
    return raised(partial(fit, "lowbit_deepspeed_stage_2", GPT(), moved), ValueError, "ds_to_universal")


@on_ranks(2)
def test_evaluates_without_and_after_fit(folder: Path) -> str | None:
    """In int8, though the batches are small; the values are DDP's."""
    FEWEST_ROWS["cpu"] = (1, 1, 1)
    expected: list[float] = []
    for name in ("ddp", "lowbit_deepspeed_stage_2", "lowbit_deepspeed_stage_3"):
        trained, _ = fit(name, GPT(), precision="int8-mixed")
        values = []
        for model in (GPT(), trained):
            evaluation = trainer_of(name, precision="int8-mixed", limit_val_batches=2)
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


@on_ranks(2)
def test_refusals_come_before_training(folder: Path) -> str | None:
    kinds: tuple[Any, ...] = optim.LAMB, optim.LARS
    for optimizer in kinds:
        model = Small(partial(optimizer, lr=1e-2))
        problem = raised(
            partial(fit, "lowbit_deepspeed_stage_2", model), ValueError, optimizer.__name__, "lowbit_sharded"
        )
        if problem or model.losses:
            return f"{problem}, after {len(model.losses)} steps"
    return None


@on_ranks(2)
def test_deepspeed_alone(folder: Path) -> str | None:
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
            problem = raised(partial(loop, stage, optim.LAMB), ValueError, "flat partitions")
            if problem:
                return f"stage {stage}: {problem}"
    return None


@on_ranks(2)
def test_gradients_are_those_of_ddp(folder: Path) -> str | None:
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
    return problem or raised(partial(fit, DeepSpeedStrategy(2), ByHand()), RuntimeError, "do not add such gradients up")


@on_ranks(2)
def test_all_kinds_of_layers_train_as_under_ddp(folder: Path) -> str | None:
    """Convolutions, attention, experts in int8 and in low bits; their products are counted."""
    counted = "int8_conv", "int8_conv_input", "int8_conv_weight", "int8_grouped_outer"

    def trained(strategy: Any, **settings: Any) -> tuple[list[float], list[int]]:
        kernels.reset_calls()
        plugin = Int8MixedPrecision(swap="all", autocast="off", **settings)
        model, _ = fit(strategy, Mixed(partial(SGD, lr=0.1)), plugins=[plugin], max_steps=3)
        calls = {op: n for (op, _), n in kernels.calls().items()}
        return model.mean_losses(), [calls.get(op, 0) for op in counted]

    for settings, stages in (({}, (2, 3)), ({"rotation": "hadamard"}, (3,))):
        expected, products = trained("ddp", **settings)
        if products != [3, 3, 3, 6]:
            return f"under DDP the products are {products}"
        for stage in stages:  # at 3 query, key and value are no longer one tensor, so each is projected by itself
            found, own = trained(cut(stage), **settings)
            problem = off(found, expected, 1e-6 if stage < 3 else 2e-3)
            if problem or own != products:
                return f"stage {stage}, {settings}: {problem}, products {own}"
    return None


@on_ranks(2)
def test_evaluation_is_that_of_ddp(folder: Path) -> str | None:
    """Of a model that was trained, and of its checkpoint, also where stage 3 keeps no parameter whole."""
    ddp = fit("ddp")[0]
    (expected,) = trainer_of("ddp", limit_val_batches=2).validate(ddp, verbose=False)
    (folder / "evaluation.json").write_text(json.dumps(expected["val_loss"]))
    for stage in (2, 3):
        strategy, path = f"lowbit_deepspeed_stage_{stage}", folder / f"evaluated_{stage}"
        model, _ = fit(cut(stage), callbacks=[Watch(path, STEPS)])
        (after,) = trainer_of(strategy, limit_val_batches=2).validate(model, verbose=False)
        problem = off([after["val_loss"], loaded_value(cut(stage), path)], 2 * [expected["val_loss"]], 1e-5)
        if problem:
            return f"stage {stage}: {problem}"
    return None


def loaded_value(strategy: Any, path: Path) -> float:
    found = trainer_of(strategy, limit_val_batches=2).validate(Small(), ckpt_path=path, verbose=False)
    return found[0]["val_loss"]


@on_ranks(1, after=test_evaluation_is_that_of_ddp)
def test_a_checkpoint_is_evaluated_on_fewer_ranks(folder: Path) -> str | None:
    expected = json.loads((folder / "evaluation.json").read_text())
    return off([loaded_value(cut(stage), folder / f"evaluated_{stage}") for stage in (2, 3)], 2 * [expected], 1e-5)


@on_ranks(3, after=test_evaluation_is_that_of_ddp)
def test_evaluation_on_more_ranks_is_refused(folder: Path) -> str | None:
    words = "convert_zero_checkpoint_to_fp32_state_dict"
    return raised(partial(loaded_value, cut(3), folder / "evaluated_3"), ValueError, words)


@on_ranks(2)
def test_a_universal_checkpoint_where_none_was_needed(folder: Path) -> str | None:
    """``load_universal`` in a config, on the ranks that saved: hyperparameters and losses of the run that went on."""
    path = folder / "needless"
    through, expected = fit(cut(3, 8), Small(groups), callbacks=[Watch(path)])
    if dist.get_rank() == 0:
        convert(path)
    dist.barrier()
    model, trainer = fit(cut(3, 8, checkpoint={"load_universal": True}), Small(groups), path)
    found, wanted = (
        [(g["lr"], g["weight_decay"], g["betas"]) for g in t.optimizers[0].param_groups] for t in (trainer, expected)
    )
    problem = off(model.mean_losses(), through.mean_losses()[SAVED_AT:], 1e-3)
    return problem or (None if found == wanted and len(set(wanted)) == 2 else f"{found}, not {wanted}")


@on_ranks(2)
def test_learning_rates_are_logged_as_under_ddp(folder: Path) -> str | None:
    """Under the same names."""
    found = []
    for strategy in ("ddp", "lowbit_deepspeed_stage_2"):
        model = Small(schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))
        monitor, logger = LearningRateMonitor("step"), CSVLogger(folder / strategy)
        fit(strategy, model, callbacks=[monitor], logger=logger, log_every_n_steps=1)
        found.append(monitor.lrs)
    return None if found == [{"lr-AdamW": [1e-2 * 0.5**i for i in range(STEPS)]}] * 2 else str(found)


@on_ranks(2)
def test_configurations_are_heeded(folder: Path) -> str | None:
    """A scheduler of DeepSpeed's with a value for each group; clipping given twice, or anew; a run that differs."""
    rates, params = [], {"warmup_min_lr": [0.0], "warmup_max_lr": [1e-2], "warmup_num_steps": 3, "total_num_steps": 8}
    for bits in (None, 8):
        strategy = cut(2, bits, scheduler={"type": "WarmupDecayLR", "params": params})
        rates.append({group["lr"] for group in fit(strategy)[1].optimizers[0].param_groups})
    if rates[0] != rates[1] or len(rates[0]) != 1:
        return f"learning rates are {rates}"
    twice = partial(fit, cut(2, gradient_clipping=0.5), gradient_clip_val=0.1)
    problem = raised(twice, ValueError, "gradient_clip_val=0.1", "gradient_clipping is 0.5")
    if problem:
        return problem
    fit(cut(2), callbacks=[Watch(folder / "clipped")], gradient_clip_val=0.5)
    for asked in (None, 0.1):  # DeepSpeed would go on with 0.5
        _, resumed = fit(cut(2), None, folder / "clipped", gradient_clip_val=asked)
        clipping = resumed.optimizers[0].clip_grad  # type: ignore[attr-defined]
        if clipping != (asked or 0):
            return f"a resumed run clips at {clipping}, not at {asked}"
    model, (_, trainer) = Small(SGD), fit(cut(2), accumulate_grad_batches=2, gradient_clip_val=1e-3)
    trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.fit_loop.max_epochs = 3, None, 2
    trainer.fit(model)
    return off(model.mean_losses(), fit("ddp", Small(SGD), accumulate_grad_batches=3)[0].mean_losses(), 1e-6)


@on_ranks(2)
def test_other_groups_and_stages_are_refused(folder: Path) -> str | None:
    for bits in (8, 32):
        fit(cut(2, bits), callbacks=[Watch(folder / f"saved_{bits}")])
    return accepted(folder)


@on_ranks(1, after=test_other_groups_and_stages_are_refused)
def test_other_groups_and_stages_are_refused_on_other_ranks(folder: Path) -> str | None:
    return accepted(folder)


def accepted(folder: Path) -> str | None:
    refused: Any = (("saved_8", 2, 32), ("saved_8", 2, None), ("saved_32", 2, 8), ("saved_8", 3, 8))
    for name, stage, bits in refused:
        words = "use stage=2" if stage == 3 else f"saved with optimizer_bits={name[6:]}, in other groups"
        model = Small()
        problem = raised(partial(fit, cut(stage, bits), model, folder / name), ValueError, words)
        if problem or model.losses:
            return f"{name} at stage {stage} with bits={bits}: {problem}, {len(model.losses)} steps"
    return None


MIX = partial(optim.AdEMAMix, lr=1e-2)


@on_ranks(2)
def test_what_the_converter_would_drop(folder: Path) -> str | None:
    """AdEMAMix: two ranks resume to the bit, DeepSpeed's tool refuses."""
    path = folder / "ademamix"
    through, _ = fit(cut(2, 8), Small(MIX), callbacks=[Watch(path)])
    resumed, _ = fit(cut(2, 8), Small(MIX), path)
    if resumed.losses != through.losses[SAVED_AT:]:
        return f"{resumed.losses} follow, not {through.losses[SAVED_AT:]}"
    tool = dist.get_rank() == 0
    problem = raised(partial(convert, path), AssertionError, "universal_checkpoint_info") if tool else None
    dist.barrier()
    return problem


@on_ranks(1, after=test_what_the_converter_would_drop)
def test_what_the_converter_would_drop_loads_on_as_many_ranks(folder: Path) -> str | None:
    load = partial(fit, cut(2, 8), Small(MIX), folder / "ademamix")
    return raised(load, ValueError, "exp_avg_slow", "devices=2")


@on_ranks(2)
def test_steps_that_are_not_finite_are_skipped(folder: Path) -> str | None:
    """By DeepSpeed, on all ranks, whoever's gradient it was."""
    for stage in (2, 3):
        model, trainer = fit(cut(stage, 8), Broken())
        counts = [float(entries["step"]) for entries in trainer.optimizers[0].state.values()]
        if counts != [STEPS - 1] * 2 or [bool(loss.isfinite()) for loss in model.losses].count(False) > 1:
            return f"stage {stage}: {counts} steps, {model.losses}"
    return None
