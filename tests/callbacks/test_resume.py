"""DeterministicResume: a run stopped and resumed has the losses of one that ran through, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.resumed_runs import (
    BATCH,
    SAMPLES,
    At,
    Model,
    Noisy,
    compare,
    fit,
    loader,
    resumed,
    saving,
    stop_at,
    through,
    trainer,
)
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from lowbit_lightning.callbacks import DeterministicResume
from lowbit_lightning.callbacks.resume import KEY

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # ModelCheckpoint isn't needed


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
    settings = {"val_check_interval": 3, **limit}
    found = compare(tmp_path, loader, *SAVES[save], **settings)
    assert 0 < len(found.losses) <= 27
    assert len(set(through(loader, tuple(settings.items())).losses)) == 27


def test_without_the_callback_the_losses_differ(tmp_path: Path) -> None:
    """That the comparison can fail, and what it is that the callback adds."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    with pytest.raises(SystemExit):
        fit(loader, stop_at(0, 5), checkpoint, resumes=False)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        found, _ = fit(loader, ckpt_path=checkpoint.best_model_path, resumes=False)
    expected = through(loader, (("resumes", False),)).losses
    assert found.losses != expected[-len(found.losses) :]


class Plain(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.eval()  # no dropout
        loss = self.net(batch).square().mean()
        self.losses.append((self.current_epoch, batch_idx, loss.item()))
        return loss


def test_an_epochs_end_needs_no_callback_where_nothing_is_random(tmp_path: Path) -> None:
    def model() -> Model:
        torch.manual_seed(0)
        return Plain(DataLoader(Noisy(noise=False), BATCH))

    expected, _ = fit(model(), resumes=False)
    checkpoint = ModelCheckpoint(tmp_path)
    fit(model(), checkpoint, max_epochs=1, resumes=False)
    found, _ = fit(model(), seed=1, ckpt_path=checkpoint.best_model_path, resumes=False)
    assert found.losses == expected.losses[9:]


def test_batches_already_used_are_not_loaded_again(tmp_path: Path) -> None:
    made: list[DataLoader] = []

    def make() -> DataLoader:
        made.append(loader())
        return made[-1]

    found = compare(tmp_path, make, {"every_n_train_steps": 7}, (0, 8), max_epochs=1)
    assert len(found.losses) == 2
    loaded: list[list[int]] = [each.dataset.loaded for each in made]  # type: ignore[attr-defined]
    assert sorted(map(len, loaded))[0] == 2 * BATCH
    assert max(map(sorted, loaded), key=len) == list(range(SAMPLES))


def test_workers(tmp_path: Path) -> None:
    make = partial(DataLoader, Noisy(noise=False), BATCH, shuffle=True, num_workers=2)
    compare(tmp_path / "within an epoch", make, {"every_n_train_steps": 2}, (1, 4), max_epochs=2)
    compare(tmp_path / "before the last batches", make, {"every_n_train_steps": 6}, (1, 4), max_epochs=2)


def test_workers_with_random_augmentations_are_replayed(tmp_path: Path) -> None:
    resume = DeterministicResume(replay_workers=True)
    compare(tmp_path, partial(loader, num_workers=2), {"every_n_train_steps": 5}, (0, 7), resume, max_epochs=2)


def test_gradient_accumulation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    compare(tmp_path, loader, {"every_n_train_steps": 3}, (1, 4), **settings)


def test_a_checkpoint_inside_an_accumulation_window_warns(tmp_path: Path) -> None:
    save = At("on_train_batch_end", (0, 2), saving(tmp_path / "inside.ckpt"))
    with pytest.warns(UserWarning, match="inside a window of 2 accumulated batches"):
        fit(loader, save, accumulate_grad_batches=2, max_epochs=1)


def own_generator(in_loader: bool) -> DataLoader:
    data, generator = Noisy(), torch.Generator().manual_seed(5)
    if in_loader:
        return DataLoader(data, BATCH, shuffle=True, generator=generator)
    sampler = RandomSampler(data, replacement=True, num_samples=SAMPLES, generator=generator)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, BATCH, drop_last=True))


@pytest.mark.parametrize("in_loader", [True, False])
def test_generators_of_the_loaders_own(tmp_path: Path, in_loader: bool) -> None:
    make = partial(own_generator, in_loader)
    for every in (5, 9):
        compare(tmp_path / str(every), make, {"every_n_train_steps": every}, (1, 7), max_epochs=2)


def test_several_loaders_of_different_lengths(tmp_path: Path) -> None:
    def make() -> dict[str, DataLoader]:
        return {"long": loader(), "short": DataLoader(Noisy(samples=12), BATCH, shuffle=True)}

    compare(tmp_path, make, {"every_n_train_steps": 4}, (1, 6))


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
def test_stopped_by_max_steps(tmp_path: Path, limits: dict[str, int], steps: int) -> None:
    """Without the callback Lightning skips the rest of the epoch, a whole epoch, or the number of one."""
    at_a_step = ModelCheckpoint(tmp_path / "at a step", every_n_train_steps=steps)
    at_the_end = ModelCheckpoint(tmp_path / "at the epoch's end", save_on_train_epoch_end=True)
    _, first = fit(distributed, at_a_step, at_the_end, **{**limits, "max_steps": steps})
    first.save_checkpoint(tmp_path / "after fit.ckpt")
    for path in (at_a_step.best_model_path, at_the_end.best_model_path, tmp_path / "after fit.ckpt"):
        found = resumed(distributed, path, **limits)
        assert len(found.losses) == 27 - steps, path
        assert found.trainer.global_step == found.trainer.fit_loop.epoch_loop._batches_that_stepped == 27


@pytest.mark.parametrize("limits", LIMITS, ids=["max_steps", "both", "max_epochs"])
def test_saved_before_an_epoch(tmp_path: Path, limits: dict[str, int]) -> None:
    saves = [At("on_train_epoch_start", (epoch,), saving(tmp_path / f"{epoch}.ckpt")) for epoch in (0, 1)]
    fit(distributed, *saves, **limits)
    for epoch in (0, 1):
        assert len(resumed(distributed, tmp_path / f"{epoch}.ckpt", **limits).losses) == 27 - 9 * epoch


def test_saved_inside_a_step(tmp_path: Path) -> None:
    """An exception's checkpoint: the batch in progress is fetched again, with the random numbers it had."""

    def act(trainer: L.Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(loader, At("on_before_backward", (0, 4), act), max_epochs=1)
    assert len(resumed(loader, tmp_path / "inside.ckpt", max_epochs=1).losses) == 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an epoch."""
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    fit(loader, max_epochs=1)[1].save_checkpoint(path)
    return path


def test_checkpoint_is_readable_with_weights_only(saved: Path) -> None:
    assert len(torch.load(saved, weights_only=True)[KEY]["ranks"]) == 1


def test_a_loader_given_to_fit_is_given_back_unchanged() -> None:
    mine = loader()
    trainer(max_epochs=1, max_steps=1).fit(Model(None), mine)
    assert type(mine) is DataLoader
    assert not hasattr(mine, "_reader")
    with pytest.raises(SystemExit):
        trainer(stop_at(0, 1)).fit(Model(None), mine)
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
def test_what_cannot_be_resumed_is_refused(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(max_epochs=1).fit(Model(None), REFUSED[message]())


class Stateful(DataLoader):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_stateful_loaders_are_left_to_lightning(tmp_path: Path) -> None:
    mine = Stateful(Stream(), BATCH)
    _, run = fit(mine, max_epochs=1)
    assert type(mine) is Stateful
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]["ranks"][0]["loaders"] == []


def test_replaying_workers_that_are_not_there_warns() -> None:
    with pytest.warns(UserWarning, match="does nothing where num_workers=0"):
        fit(loader, DeterministicResume(replay_workers=True), max_epochs=1)


def test_resuming_with_other_data_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="has 9 batches, this run's 18"):
        fit(DataLoader(Noisy(), 2, shuffle=True), ckpt_path=saved)


def test_a_checkpoint_without_the_state_warns(tmp_path: Path) -> None:
    _, run = fit(loader, max_epochs=1, resumes=False)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="saved without DeterministicResume"):
        fit(loader, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
