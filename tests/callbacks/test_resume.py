"""DeterministicResume: a run stopped and resumed has the losses of one that ran through, to the bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from lowbit_lightning import optim
from lowbit_lightning.callbacks import DeterministicResume
from lowbit_lightning.callbacks.resume import KEY
from lowbit_lightning.precision import Int8MixedPrecision

SAMPLES, BATCH, EPOCHS = 36, 4, 3  # 9 batches an epoch


class Noisy(Dataset):
    """Augments with all three global generators, in whichever process loads."""

    def __init__(self, noise: bool = True, samples: int = SAMPLES) -> None:
        self.x = torch.randn(samples, 64, generator=torch.Generator().manual_seed(1))
        self.noise = noise
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        self.loaded.append(index)
        if not self.noise:
            return self.x[index]
        return self.x[index] + 0.1 * torch.randn(64) + 0.1 * np.random.rand() + 0.1 * random.random()


class Model(L.LightningModule):
    def __init__(self, loader: Any, validate: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.net = nn.Sequential(self.first, nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))
        self.loader, self.validate = loader, validate
        self.losses: list[tuple[int, int, float]] = []

    def train_dataloader(self) -> Any:
        return self.loader() if callable(self.loader) else self.loader

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(samples=8), BATCH) if self.validate else []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat(list(batch.values())) if isinstance(batch, dict) else batch
        decay = np.random.rand() + random.random()
        loss = self.net(x).square().mean() + decay * self.first.weight.square().mean()
        self.losses.append((self.current_epoch, batch_idx, loss.item()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(self.parameters(), lr=1e-2, min_size=1024)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class StopAt(L.Callback):
    """What a kill is: training ends in the middle, after whatever was saved before."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            raise KeyboardInterrupt


def loader(**settings: Any) -> DataLoader:
    return DataLoader(Noisy(), BATCH, **{"shuffle": True, **settings})


def trainer(tmp_path: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "default_root_dir": tmp_path,
        "plugins": Int8MixedPrecision(autocast="off"),
    }
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        defaults["enable_checkpointing"] = False
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def compare(
    tmp_path: Path, make: Any, save: dict[str, Any], stop: tuple[int, int], resume: DeterministicResume, **settings: Any
) -> tuple[Model, Model]:
    """Run through; run again, die at ``stop``, resume in a "new process" (other seeds); compare each batch's loss."""
    seeded(0)
    through = Model(make)
    trainer(tmp_path, DeterministicResume(), **settings).fit(through)

    seeded(0)
    stopped = Model(make)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, **save)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, DeterministicResume(), StopAt(*stop), checkpoint, **settings).fit(stopped)
    last = max((tmp_path / "ckpt").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)

    seeded(1234)
    resumed = Model(make)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # ModelCheckpoint isn't needed
    trainer(tmp_path, resume, **settings).fit(resumed, ckpt_path=last)
    assert resumed.losses, "nothing was trained after the checkpoint"
    assert stopped.losses == through.losses[: len(stopped.losses)]
    assert resumed.losses == through.losses[-len(resumed.losses) :]
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert "exp_avg_codes" in torch.load(last, weights_only=True)["optimizer_states"][0]["state"][0]
    return through, resumed


SAVES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "mid-epoch": ({"every_n_train_steps": 4}, (1, 6)),
    "at the last batch": ({"every_n_train_steps": 9}, (1, 4)),
    "after a validation inside the epoch": ({"monitor": "val", "save_on_train_epoch_end": False}, (1, 6)),
    "at the epoch's end": ({"save_on_train_epoch_end": True}, (1, 4)),
    "right after the first batch": ({"every_n_train_steps": 1}, (0, 1)),
}


BY_STEPS = {"max_epochs": -1, "max_steps": 27}


@pytest.mark.parametrize(
    ("save", "limit"), [*((save, {}) for save in SAVES), ("mid-epoch", BY_STEPS), ("at the epoch's end", BY_STEPS)]
)
def test_losses_to_the_bit(tmp_path: Path, save: str, limit: dict[str, Any]) -> None:
    arguments, stop = SAVES[save]
    through, resumed = compare(tmp_path, loader, arguments, stop, DeterministicResume(), val_check_interval=3, **limit)
    assert len(set(through.losses)) == 27
    assert 0 < len(resumed.losses) <= 27


def test_without_the_callback_the_losses_differ(tmp_path: Path) -> None:
    """That the comparison can fail, and what it is that the callback adds."""
    seeded(0)
    through = Model(loader)
    trainer(tmp_path).fit(through)
    seeded(0)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    with pytest.raises(SystemExit):
        trainer(tmp_path, StopAt(0, 5), checkpoint).fit(Model(loader))
    resumed = Model(loader)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        trainer(tmp_path).fit(resumed, ckpt_path=checkpoint.best_model_path)
    assert resumed.losses != through.losses[-len(resumed.losses) :]


def test_an_epochs_end_needs_no_callback_where_nothing_is_random(tmp_path: Path) -> None:
    def make() -> DataLoader:
        return DataLoader(Noisy(noise=False), BATCH)

    class Plain(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net.eval()  # no dropout
            loss = self.net(batch).square().mean()
            self.losses.append((self.current_epoch, batch_idx, loss.item()))
            return loss

    seeded(0)
    through = Plain(make)
    trainer(tmp_path).fit(through)
    seeded(0)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt")
    trainer(tmp_path, checkpoint, max_epochs=1).fit(Plain(make))
    seeded(1)
    resumed = Plain(make)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    trainer(tmp_path).fit(resumed, ckpt_path=checkpoint.best_model_path)
    assert resumed.losses == through.losses[9:]


def test_batches_already_used_are_not_loaded_again(tmp_path: Path) -> None:
    made: list[DataLoader] = []

    def make() -> DataLoader:
        made.append(loader())
        return made[-1]

    _, resumed = compare(tmp_path, make, {"every_n_train_steps": 7}, (0, 8), DeterministicResume(), max_epochs=1)
    assert len(resumed.losses) == 2
    assert len(made[-1].dataset.loaded) == 2 * BATCH  # type: ignore[attr-defined]
    assert sorted(made[0].dataset.loaded) == list(range(SAMPLES))  # type: ignore[attr-defined]


@pytest.mark.parametrize("every", [2, 6])
def test_workers(tmp_path: Path, every: int) -> None:
    def make() -> DataLoader:
        return DataLoader(Noisy(noise=False), BATCH, shuffle=True, num_workers=2)

    arguments = {"every_n_train_steps": every}
    compare(tmp_path, make, arguments, (1, 4), DeterministicResume(), max_epochs=2)


def test_workers_with_random_augmentations_are_replayed(tmp_path: Path) -> None:
    def make() -> DataLoader:
        return loader(num_workers=2)

    resume = DeterministicResume(replay_workers=True)
    compare(tmp_path, make, {"every_n_train_steps": 5}, (0, 7), resume, max_epochs=2)


def test_gradient_accumulation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    compare(tmp_path, loader, {"every_n_train_steps": 3}, (1, 4), DeterministicResume(), **settings)


def test_a_checkpoint_inside_an_accumulation_window_warns(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop.batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    with pytest.warns(UserWarning, match="inside a window of 2 accumulated batches"):
        trainer(tmp_path, DeterministicResume(), Save(), accumulate_grad_batches=2, max_epochs=1).fit(Model(loader))


def own_generator(in_loader: bool) -> DataLoader:
    data, generator = Noisy(), torch.Generator().manual_seed(5)
    if in_loader:
        return DataLoader(data, BATCH, shuffle=True, generator=generator)
    sampler = RandomSampler(data, replacement=True, num_samples=SAMPLES, generator=generator)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, BATCH, drop_last=True))


@pytest.mark.parametrize("in_loader", [True, False])
@pytest.mark.parametrize("every", [5, 9])
def test_generators_of_the_loaders_own(tmp_path: Path, in_loader: bool, every: int) -> None:
    def make() -> DataLoader:
        return own_generator(in_loader)

    compare(tmp_path, make, {"every_n_train_steps": every}, (1, 7), DeterministicResume(), max_epochs=2)


def test_several_loaders_of_different_lengths(tmp_path: Path) -> None:
    def make() -> dict[str, DataLoader]:
        return {"long": loader(), "short": DataLoader(Noisy(samples=12), BATCH, shuffle=True)}

    compare(tmp_path, make, {"every_n_train_steps": 4}, (1, 6), DeterministicResume())


def distributed() -> DataLoader:
    """Shuffled by the epoch's number, as under DDP."""
    data = Noisy()
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, num_replicas=1, rank=0))


LIMITS: list[dict[str, int]] = [
    {"max_epochs": -1, "max_steps": 27},
    {"max_epochs": 3, "max_steps": 27},
    {"max_epochs": 3},
]


@pytest.mark.parametrize("limits", LIMITS, ids=["max_steps", "both", "max_epochs"])
@pytest.mark.parametrize("steps", [14, 18], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("save", ["at a step", "at the epoch's end", "after fit"])
def test_stopped_by_max_steps(tmp_path: Path, limits: dict[str, int], steps: int, save: str) -> None:
    """Without the callback Lightning skips the rest of the epoch, a whole epoch, or the number of one."""
    seeded(0)
    through = Model(distributed)
    trainer(tmp_path, DeterministicResume(), **limits).fit(through)
    seeded(0)
    when: Any = {"every_n_train_steps": steps} if save == "at a step" else {"save_on_train_epoch_end": True}
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", **when)
    first = trainer(tmp_path, DeterministicResume(), checkpoint, **{**limits, "max_steps": steps})
    first.fit(Model(distributed))
    last = tmp_path / "late.ckpt" if save == "after fit" else checkpoint.best_model_path
    if save == "after fit":
        first.save_checkpoint(last)
    seeded(1)
    resumed = Model(distributed)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    second = trainer(tmp_path, DeterministicResume(), **limits)
    second.fit(resumed, ckpt_path=last)
    assert resumed.losses == through.losses[steps:]  # with their epochs and batches
    assert second.global_step == second.fit_loop.epoch_loop._batches_that_stepped == 27


@pytest.mark.parametrize("limits", LIMITS, ids=["max_steps", "both", "max_epochs"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_saved_before_an_epoch(tmp_path: Path, limits: dict[str, int], epoch: int) -> None:
    class Save(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "start.ckpt")

    seeded(0)
    through = Model(distributed)
    trainer(tmp_path, DeterministicResume(), Save(), **limits).fit(through)
    seeded(1)
    resumed = Model(distributed)
    trainer(tmp_path, DeterministicResume(), **limits).fit(resumed, ckpt_path=tmp_path / "start.ckpt")
    assert resumed.losses == through.losses[9 * epoch :]


def test_saved_inside_a_step(tmp_path: Path) -> None:
    """An exception's checkpoint: the batch in progress is fetched again, with the random numbers it had."""

    class Save(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")
                raise KeyboardInterrupt

    seeded(0)
    through = Model(loader)
    trainer(tmp_path, DeterministicResume(), max_epochs=1).fit(through)
    seeded(0)
    with pytest.raises(SystemExit):
        trainer(tmp_path, DeterministicResume(), Save(), max_epochs=1).fit(Model(loader))
    seeded(1)
    resumed = Model(loader)
    trainer(tmp_path, DeterministicResume(), max_epochs=1).fit(resumed, ckpt_path=tmp_path / "inside.ckpt")
    assert resumed.losses == through.losses[4:]


def test_checkpoint_is_readable_with_weights_only(tmp_path: Path) -> None:
    run = trainer(tmp_path, DeterministicResume(), max_epochs=1)
    run.fit(Model(loader))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(checkpoint[KEY]["ranks"]) == 1


def test_a_loader_given_to_fit_is_given_back_unchanged(tmp_path: Path) -> None:
    mine = loader()
    trainer(tmp_path, DeterministicResume(), max_epochs=1, max_steps=1).fit(Model(None), mine)
    assert type(mine) is DataLoader
    assert not hasattr(mine, "_reader")
    with pytest.raises(SystemExit):
        trainer(tmp_path, DeterministicResume(), StopAt(0, 1)).fit(Model(None), mine)
    assert type(mine) is DataLoader


# -- what can't work -------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(8, 64)


class OwnNumpy(RandomSampler):
    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.rng = np.random.default_rng(0)


class Endless(torch.utils.data.Sampler):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


REFUSED = {
    "Stream is an IterableDataset": lambda: DataLoader(Stream(), BATCH),
    "not a torch.utils.data.DataLoader": lambda: [torch.randn(4, 64)] * 3,
    "set persistent_workers=False": lambda: loader(num_workers=1, persistent_workers=True),
    "OwnNumpy.rng is a Generator": lambda: loader(shuffle=False, sampler=OwnNumpy(Noisy())),
    "its length is unknown": lambda: loader(shuffle=False, sampler=Endless()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_resumed_is_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, DeterministicResume(), max_epochs=1).fit(Model(None), REFUSED[message]())


class Stateful(DataLoader):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_stateful_loaders_are_left_to_lightning(tmp_path: Path) -> None:
    mine = Stateful(Stream(), BATCH)
    run = trainer(tmp_path, DeterministicResume(), max_epochs=1)
    run.fit(Model(None), mine)
    assert type(mine) is Stateful
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]["ranks"][0]["loaders"] == []


def test_replaying_workers_that_are_not_there_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="does nothing where num_workers=0"):
        trainer(tmp_path, DeterministicResume(replay_workers=True), max_epochs=1).fit(Model(loader))


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, DeterministicResume(), max_epochs=1)
    run.fit(Model(loader))
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = DataLoader(Noisy(), 2, shuffle=True)
    with pytest.raises(ValueError, match="has 9 batches, this run's 18"):
        trainer(tmp_path, DeterministicResume()).fit(Model(None), other, ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_without_the_state_warns(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Model(loader))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="saved without DeterministicResume"):
        trainer(tmp_path, DeterministicResume(), max_epochs=2).fit(Model(loader), ckpt_path=tmp_path / "a.ckpt")
