"""Checkpoints under ``strategy="lowbit_sharded"``: files and folders, from and to any number of ranks, DDP and one
device."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from support import on_ranks as rounds
from support.on_ranks import AGAIN, ALONE, on_ranks
from support.ranks import equal
from support.run_program import run as run_program
from support.sharded_model import BATCH, Looker, Net, picture, raised, trainer, world
from torch import Tensor, nn

from lowbit_lightning import optim
from lowbit_lightning.callbacks import DeterministicResume
from lowbit_lightning.strategies import AtomicCheckpointIO, ShardedStrategy, checkpoints, consolidate

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

SAVED = 2  # steps before the checkpoint
QUICK = not rounds.THOROUGH  # 3 steps after it, not 10; a checkpoint is loaded by one strategy, not by each


def adamw(groups: Any, lr: float) -> Any:
    """Matrices in 8 bits, `small` and `single` too; vectors in 32 on one device as in shards."""
    matrices, vectors = groups
    return optim.AdamW([matrices, {**vectors, "bits": 32}], lr=lr, min_size=310)


def strategies() -> dict[str, Callable[[], Any]]:
    """What can run here, by name."""
    if not dist.is_initialized():
        return {"single": lambda: "auto"}
    found: dict[str, Callable[[], Any]] = {
        "file": ShardedStrategy,
        "folder": lambda: ShardedStrategy(save_distributed_checkpoint=True),
        "paged": lambda: ShardedStrategy(paged="disk"),
    }
    return {**found, "ddp": lambda: "ddp_find_unused_parameters_true"} if world() > 1 else found


class Fixed(Net):
    """The batch of a step depends on its number alone, so that runs on any number of ranks go on with the same."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        data = self._data()[self.trainer.global_step * BATCH : (self.trainer.global_step + 1) * BATCH]
        return super().training_step([data[self.trainer.global_rank :: self.trainer.world_size]], index)


class Saver(L.Callback):
    """Saves after SAVED steps, and keeps a picture of what was to be saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.picture: Any = None

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)
            self.picture = picture(model, trainer.optimizers)


def run(strategy: Any, callback: L.Callback, path: Path | None = None, seed: int = 0) -> tuple[Net, L.Trainer]:
    model = Fixed(adamw, steps=SAVED + (3 if QUICK else 10), seed=seed)
    made = trainer(strategy, callbacks=[DeterministicResume(), callback], plugins=[AtomicCheckpointIO()])
    made.fit(model, ckpt_path=path)
    return model, made


@on_ranks(ALONE, 2, 3, AGAIN, slow=(ALONE, 4, 1, 3, 2, AGAIN))
def test_saves_of_every_strategy_load_everywhere(folder: Path) -> str | None:
    """To the bit; then ten steps: equal to the uninterrupted run on as many ranks, close to it on others."""
    place = folder / "saved"
    place.mkdir(exist_ok=True)
    for name, make in strategies().items():
        path = place / f"{world()}_{name}"
        if path.with_suffix(".end").exists():
            continue
        saver = Saver(path)
        model, made = run(make(), saver)
        paged = made.optimizers[0].page_statistics()  # type: ignore[attr-defined]
        if (name == "paged") != (paged is not None and paged.bytes_in > 0):
            return f"{name}: {paged}"
        end = {"picture": saver.picture, "end": picture(model, made.optimizers), "losses": model.mean_losses()}
        if made.is_global_zero:
            torch.save(end, path.with_suffix(".end"))
        if dist.is_initialized():
            dist.barrier()
    mine = strategies()
    for number, end_path in enumerate(sorted(place.glob("*.end"))):
        path, expected = end_path.with_suffix(""), torch.load(end_path)
        ranks, kind = path.name.split("_")
        for name, make in mine.items():
            same = (ranks, kind == "ddp") == (str(world()), name == "ddp")
            turn = kind == name if ranks == str(world()) else number % len(mine) == list(mine).index(name)
            if QUICK and not turn:
                continue
            looker = Looker()
            model, made = run(make(), looker, path, seed=5)
            problem = equal(looker.picture, expected["picture"])
            if problem is None and same:
                problem = equal(picture(model, made.optimizers), expected["end"])
            losses = torch.tensor(model.mean_losses()), torch.tensor(expected["losses"][SAVED:])
            off = float((losses[0] - losses[1]).abs().max())
            problem = problem or (None if off <= 1e-3 else f"losses are off by {off:.1e}")
            if problem:
                return f"{path.name} loaded by {name}: {problem}"
    return None


@on_ranks(2, slow=(4, 1, 3, 2), after=test_saves_of_every_strategy_load_everywhere)
def test_bad_checkpoints_change_nothing(folder: Path) -> str | None:
    """Cut off, foreign, of other shapes, of another optimizer, or not there: an error that names the path."""
    good_file, good_folder = folder / "saved" / f"{world()}_file", folder / "saved" / f"{world()}_folder"
    place = folder / f"bad_{world()}"
    if dist.get_rank() == 0:
        make_bad(place, good_file, good_folder)
    dist.barrier()
    model, made = Net(adamw, steps=2), trainer()
    made.fit(model)
    before = picture(model, made.optimizers)
    for path in (*sorted(place.iterdir()), place / "missing"):
        kind = FileNotFoundError if path.name == "missing" else ValueError

        def load(path: Path = path) -> None:  # what fit(ckpt_path=...) calls
            made.strategy.load_model_state_dict(made.strategy.load_checkpoint(path))

        problem = raised(load, kind, str(path)) or equal(picture(model, made.optimizers), before)
        if problem:
            return f"{path.name}: {problem}"
    return None


def make_bad(place: Path, file: Path, folder: Path) -> None:
    place.mkdir()
    content = file.read_bytes()
    (place / "cut").write_bytes(content[: len(content) // 2])
    (place / "empty").write_bytes(b"")
    (place / "text").write_text("no checkpoint at all\n")
    torch.save({"weights": torch.ones(3)}, place / "foreign")
    saved = torch.load(file, weights_only=False)
    weight = saved["state_dict"]["small.weight"]
    torch.save({**saved, "state_dict": {**saved["state_dict"], "small.weight": weight[:4]}}, place / "shape")
    torch.save(
        {**saved, "state_dict": {k: v for k, v in saved["state_dict"].items() if k != "pair"}}, place / "lacking"
    )
    torch.save({k: v for k, v in saved.items() if k != "optimizer_states"}, place / "weights")
    states = saved["optimizer_states"][0]
    entries = {**states["state"], 0: {**states["state"][0], "exp_avg_codes": torch.zeros(3, 3, dtype=torch.uint8)}}
    torch.save({**saved, "optimizer_states": [{**states, "state": entries}]}, place / "codes")
    for name in ("without_marker", "short", "without_metadata", "empty_folder"):
        shutil.copytree(folder, place / name)
    (place / "without_marker" / "complete.json").unlink()
    part = next((place / "short").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    (place / "without_metadata" / ".metadata").unlink()
    shutil.rmtree(place / "empty_folder")
    (place / "empty_folder").mkdir()


@on_ranks(2, slow=(4, 1, 3, 2))
def test_saves_replace_and_recover(folder: Path) -> str | None:
    """File over folder, folder over file; leftovers are cleaned; what a dead save had put aside is found."""
    path = folder / f"replaced_{world()}" / "last"
    model = Net(adamw, steps=2)
    made = trainer()
    made.fit(model)
    expected = picture(model, made.optimizers)
    for distributed in (False, True, True, False):
        vars(made.strategy)["_save_distributed_checkpoint"] = distributed
        made.save_checkpoint(path)
        left = sorted(p.name for p in path.parent.iterdir())
        if left != ["last"] or path.is_dir() != distributed:
            return f"distributed={distributed}: {left}"
        dist.barrier()
        if dist.get_rank() == 0:  # died between two renames, and in another save
            path.rename(path.with_name("last.previous"))
            path.with_name("last.partial-dead").mkdir()
        dist.barrier()
        looker = Looker()
        trainer(callbacks=[looker], max_epochs=2).fit(Net(adamw, steps=2, seed=5), ckpt_path=path)
        problem = equal(looker.picture, expected)
        if problem:
            return f"distributed={distributed}: {problem}"
    return None


@on_ranks(2, slow=(4, 1, 3, 2), after=test_saves_of_every_strategy_load_everywhere)
def test_a_folder_becomes_a_file(folder: Path) -> str | None:
    """``consolidate`` gives what the single file has; plain torch loads it, weights_only too."""
    if dist.get_rank():
        return None
    source, target = folder / "saved" / f"{world()}_folder", folder / f"consolidated_{world()}"
    consolidate(source, target)
    file, made = (torch.load(p, weights_only=False) for p in (folder / "saved" / f"{world()}_file", target))
    if file.keys() != made.keys():
        return f"not in both: {sorted(file.keys() ^ made.keys())}"
    problem = equal({"": file["state_dict"]}, {"": made["state_dict"]})
    ours, theirs = ({str(k): v for k, v in x["optimizer_states"][0]["state"].items()} for x in (file, made))
    groups = [x["optimizer_states"][0]["param_groups"] for x in (file, made)]
    tied = made["state_dict"]["head.weight"].data_ptr() == made["state_dict"]["embedding.weight"].data_ptr()
    return problem or equal(ours, theirs) or (None if groups[0] == groups[1] and tied else f"tied: {tied}, {groups}")


@on_ranks(2, slow=(4, 1, 3, 2))
def test_a_file_may_be_written_asynchronously(folder: Path) -> str | None:
    path = folder / f"async_{world()}" / "last"
    model = Net(adamw, steps=2)
    made = trainer()
    made.fit(model)
    made.strategy.checkpoint_io = io = AsyncCheckpointIO()  # Lightning 2.5's saves nothing more once a run has ended
    made.save_checkpoint(path)
    io.teardown()
    dist.barrier()
    looker = Looker()
    trainer(callbacks=[looker], max_epochs=2).fit(Net(adamw, steps=2, seed=5), ckpt_path=path)
    return equal(looker.picture, picture(model, made.optimizers))


class Slow(AtomicCheckpointIO):
    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        super().save_checkpoint(*arguments, **options)


class Full(AtomicCheckpointIO):
    def __init__(self, after: float) -> None:
        self.after = after

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        time.sleep(self.after)
        raise OSError(errno.ENOSPC, "the disk is full")


def saving(io: Any, place: Path) -> L.Trainer:
    callbacks = [ModelCheckpoint(place, filename="one")]
    return trainer(plugins=[io], callbacks=callbacks, enable_checkpointing=True)


@on_ranks(2, slow=(4, 1, 3, 2))
def test_fit_ends_when_asynchronous_saves_have(folder: Path) -> str | None:
    """What ``fit`` has saved is there when it returns, and an error of the last save is raised by it, as under DDP."""
    place, model = folder / f"awaited_{world()}", Net(steps=2)
    made = saving(AsyncCheckpointIO(Slow()), place)
    made.fit(model)
    if made.is_global_zero and [path.name for path in place.iterdir()] != ["one.ckpt"]:
        return f"{list(place.iterdir())}"
    made.test(model, ckpt_path="best", verbose=False)
    made = saving(AsyncCheckpointIO(Full(after=0.5)), place)
    problem = raised(lambda: made.fit(Net(steps=2)), OSError, "the disk is full")
    return problem if made.is_global_zero else (None if problem == "no OSError" else problem)


@on_ranks(2, slow=(4, 1, 3, 2))
def test_no_rank_waits_for_one_that_could_not_save(folder: Path) -> str | None:
    made = saving(Full(after=0), folder / f"full_{world()}")
    kind = OSError if dist.get_rank() == 0 else RuntimeError
    return raised(lambda: made.fit(Net(steps=2)), kind, "the disk is full")


class Tuned(Fixed):
    @property
    def backbone(self) -> Any:
        return self.layers


@on_ranks(2, slow=(4, 1, 3, 2))
def test_groups_that_a_callback_added_are_loaded(folder: Path) -> str | None:
    """BackboneFinetuning adds a group in the second epoch; a run that is resumed in the third has it at once."""

    def fit(strategy: Any, epochs: int, path: Path | None = None) -> tuple[L.Trainer, Any, Any]:
        tuning, looker = BackboneFinetuning(1, verbose=False), Looker()
        made = trainer(strategy, max_epochs=epochs, callbacks=[tuning, looker], plugins=[AtomicCheckpointIO()])
        made.fit(Tuned(adamw, steps=2), ckpt_path=path)
        return made, looker.picture, tuning

    for name, make in strategies().items():
        path = folder / f"tuned_{world()}_{name}"
        made, _, _ = fit(make(), 2)
        made.save_checkpoint(path)
        expected, groups = picture(made.lightning_module, made.optimizers), made.optimizers[0].param_groups
        again, found, tuning = fit(make(), 3, path)
        lengths = [[len(g["params"]) for g in x] for x in (groups, again.optimizers[0].param_groups)]
        if lengths[0] != lengths[1] or len(lengths[0]) != 3 or tuning._restarting:
            return f"{name}: groups of {lengths[0]} and {lengths[1]}, restarting {tuning._restarting}"
        problem = equal(found, expected)
        if problem:
            return f"{name}: {problem}"
    return None


@pytest.mark.parametrize(
    "deaths", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["3", "50"]
)
def test_killed_saves_leave_a_checkpoint(deaths: int, tmp_path: Path) -> None:
    output = run_program("sharded_strategy_kill.py", tmp_path, deaths, timeout=850 if deaths > 3 else 250)
    assert output.count("killed") == deaths


def test_8_bit_states_are_not_loaded_into_torchs_optimizer() -> None:
    model = nn.Linear(64, 64)
    ours, theirs = optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    ours.step()
    with pytest.raises(
        ValueError, match=r"last\.ckpt holds 8-bit states, which torch.*AdamW cannot .*lowbit convert last"
    ):
        checkpoints.load_optimizers([theirs], {"optimizer_states": [ours.state_dict()]}, "last.ckpt")
    assert not theirs.state
    checkpoints.load_optimizers([theirs], {"optimizer_states": [ours.state_dict(bits=32)]}, "last.ckpt")
    assert theirs.state
