"""``DeterministicResume``: a run that was stopped and resumed has bit-identical losses to an uninterrupted run.

Lightning saves weights, optimizers and counters, but neither the random generators nor how far the shuffled data has
been read: a run resumed in the middle of an epoch starts a new permutation and sees some samples twice. This callback
adds both.

How it works
    *Random numbers.* The states of the generators of torch (CPU and the run's CUDA device), numpy and Python after
    each training batch are put back when the next one is fetched. So anything that runs in between (validation,
    logging, other callbacks) does not change the randomness of training. A checkpoint holds these states for each rank.

    *Data.* Each training loader is given a subclass of its own class that creates its iterator at the first fetch,
    notes the states of the generators there, and counts batches. To resume, these states are put back, the loader
    draws the same worker seed and the same permutation again, and its sampler's first n batches of *indices* are
    passed over without loading them.

    *Epochs.* In some places Lightning resumes in the wrong epoch, most often under ``max_steps``. The counts that it
    reads from the checkpoint are corrected first (``_mend_counts``).

Requirements
    ``torch.utils.data.DataLoader`` of known length over a map-style dataset, whose sampler draws from torch's, numpy's
    or Python's global generator when its iteration starts (all of torch's do), from a ``torch.Generator`` of its own,
    or is a ``DistributedSampler``. Lightning itself saves loaders with ``state_dict`` and ``load_state_dict``; other
    loaders are refused. The same world size and loaders when resuming.

Limitations
    - Worker processes draw augmentations from generators of their own, which no checkpoint sees. With
      ``replay_workers=True`` the batches already used are loaded again and dropped, which restores these generators.
    - ``persistent_workers=True`` is refused: such workers keep their generators from one epoch to the next.
    - A checkpoint inside a window of accumulated gradients does not hold these gradients; the callback warns when it is
      saved.
    - What a hook draws between the last batch and the next fetch is drawn again after a resume, or never.
    - A dataset or model that keeps its own generators must save them itself.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import loaders, random_states
from lowbit_lightning.callbacks.random_states import State

KEY = "lowbit_lightning.DeterministicResume"
VERSION = 1


class DeterministicResume(Callback):
    """Keeps random states and the position in the data in checkpoints, for exact resumption; see the module.

    Args:
        replay_workers: when resuming in the middle of an epoch with ``num_workers > 0``, load the batches already
            used again and drop them, so that workers' own random numbers continue too. Costs loading them.

    Raises (when training starts):
        TypeError, ValueError: a training loader that can't be resumed, and what to change; or a checkpoint of other
        loaders.
    """

    def __init__(self, replay_workers: bool = False) -> None:
        self.replay_workers = replay_workers
        self._readers: list[_Reader] = []
        self._between: State | None = None  # the generators after the last batch, until the next one is fetched
        self._at_fetch: State | None = None
        self._loaded: State | None = None
        self._device = torch.device("cpu")

    # -- saving and loading ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: State) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        unfinished = progress.ready - progress.processed  # saved inside a step: that batch will be fetched again
        readers = _readers(trainer) or self._readers
        _warn_of_lost_gradients(trainer, progress.processed)
        between = self._at_fetch if unfinished else self._between
        mine = {
            "rng": random_states.get(self._device) if between is None else between,
            "loaders": [reader.state(unfinished) for reader in readers],
        }
        ranks = [mine]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, mine)
        checkpoint[KEY] = {"version": VERSION, "ranks": ranks}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: State) -> None:
        self._loaded = checkpoint.get(KEY, {})
        if "loops" in checkpoint:
            _mend_counts(checkpoint["loops"]["fit_loop"], by_steps=trainer.max_steps != -1)

    # -- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._loaded = self._between = self._at_fetch = None
        self._device = trainer.strategy.root_device
        original = trainer.strategy.process_dataloader

        def process_dataloader(dataloader: Any) -> Any:
            dataloader = original(dataloader)
            if trainer.training and not loaders.is_stateful(dataloader):
                loaders.check(dataloader)
                if self.replay_workers and dataloader.num_workers == 0:
                    rank_zero_warn("DeterministicResume(replay_workers=True) does nothing where num_workers=0")
                _Reader(self, dataloader, functools.partial(_position, trainer)).install()
            return dataloader

        # The one place between Lightning's own changes to a loader and its first iter().
        trainer.strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        if not loaded:
            rank_zero_warn("the checkpoint was saved without DeterministicResume: this run resumes, but not exactly")
            return
        if loaded["version"] != VERSION:
            raise ValueError(f"DeterministicResume knows version {VERSION} of its state, not {loaded['version']!r}")
        if len(loaded["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was saved by {len(loaded['ranks'])} ranks and is resumed by {trainer.world_size}: "
                "random numbers and the order of the data will differ"
            )
            return
        mine = loaded["ranks"][trainer.global_rank]
        readers = _readers(trainer)
        if len(readers) != len(mine["loaders"]):
            raise ValueError(f"the checkpoint has {len(mine['loaders'])} training loaders, this run {len(readers)}")
        self._between = mine["rng"]
        for reader, state in zip(readers, mine["loaders"], strict=True):
            reader.load(state)
        # Lightning warns that the loaders can't be resumed, having looked for state_dict on them.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._continue()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between = random_states.get(self._device)

    def before_fetch(self) -> None:
        """Called by the loaders: randomness continues where the last batch left it."""
        self._at_fetch = self._between or random_states.get(self._device)
        self._continue()

    def _continue(self) -> None:
        if self._between is not None:
            random_states.put_back(self._between, self._device)
            self._between = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release(trainer)

    def _release(self, trainer: L.Trainer) -> None:
        self._readers = _readers(trainer) or self._readers  # trainer.save_checkpoint may still come
        for reader in self._readers:
            reader.uninstall()
        vars(trainer.strategy).pop("process_dataloader", None)


# -- a loader that can be resumed ------------------------------------------------------------------------------------


class _Reader:
    """How far one loader has been read, and the states of the generators from which its order can be drawn again."""

    def __init__(self, owner: DeterministicResume, loader: DataLoader, position: Callable[[], int]) -> None:
        self._owner, self._loader, self._position = owner, loader, position
        self._class: Any = type(loader)
        self._batches = len(loader)
        self._generators = loaders.generators(loader)
        self._read = 0
        self._started: State | None = None  # when the iterator was created: decides the workers' seed
        self._drawn: State | None = None  # when the sampler drew its first batch: decides the permutation
        self._saved: State | None = None  # from a checkpoint, until the first fetch
        self._skip: int | None = None

    def install(self) -> None:
        self._loader._reader = self  # type: ignore[attr-defined]
        self._loader.__class__ = _resumable(self._class)

    def uninstall(self) -> None:
        vars(self._loader).pop("_reader", None)
        self._loader.__class__ = self._class

    def state(self, unfinished: int) -> State:
        generators = [g.get_state() for g in self._generators]
        places = {"read": self._read - unfinished, "started": self._started, "drawn": self._drawn}
        return {"batches": self._batches, "generators": generators, **places}

    def load(self, state: State) -> None:
        for name, mine in (("batches", self._batches), ("generators", len(self._generators))):
            saved = state[name] if name == "batches" else len(state[name])
            if saved != mine:
                raise ValueError(
                    f"the checkpoint's training loader has {saved} {name}, this run's {mine}; resume with the same "
                    "dataset, batch size and sampler, or without DeterministicResume"
                )
        self._saved = state

    def batches(self, create: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """One pass. A generator, so that nothing is drawn before the first batch is asked for."""
        self._owner.before_fetch()
        saved, self._saved = self._saved, None
        if saved is not None:
            self._set_generators(saved["generators"])
        if saved is None or self._position() == 0:
            self._read, self._started = 0, self._random_state()
            iterator = create()
        else:
            iterator = self._recreate(create, saved)
        for batch in iterator:
            self._read += 1
            yield batch
            self._owner.before_fetch()

    def _recreate(self, create: Callable[[], Iterator[Any]], saved: State) -> Iterator[Any]:
        """The iterator of a pass that began before the checkpoint, after the batches it has read."""
        self._read, self._started, self._drawn = saved["read"], saved["started"], saved["drawn"]
        replay = self._owner.replay_workers and self._loader.num_workers > 0
        now = random_states.get(self._owner._device)
        self._set_random_state(saved["started"])
        self._skip = 0 if replay else self._read
        iterator = create()
        for _ in range(self._read if replay else 0):
            next(iterator)
        random_states.put_back(now, self._owner._device)
        return iterator

    def indices(self, sampler: Any) -> Iterator[Any]:
        """The sampler's batches of indices. Also a generator: workers or the first fetch ask for the first."""
        skip, self._skip = self._skip, None
        if skip is None:
            self._drawn = self._random_state()
            yield from sampler
            return
        now = random_states.get(self._owner._device)
        self._set_random_state(self._drawn)
        rest = iter(sampler)
        for _ in range(skip):
            next(rest)
        first = next(rest, None)
        random_states.put_back(now, self._owner._device)
        if first is not None:
            yield first
            yield from rest

    def _random_state(self) -> State:
        return {**random_states.get(self._owner._device), "generators": [g.get_state() for g in self._generators]}

    def _set_random_state(self, state: State | None) -> None:
        assert state is not None
        random_states.put_back(state, self._owner._device)
        self._set_generators(state["generators"])

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class _Indices:
    """A sampler as its reader gives it out."""

    def __init__(self, sampler: Any, reader: _Reader) -> None:
        self._sampler, self._reader = sampler, reader

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        return self._reader.indices(self._sampler)


@functools.cache
def _resumable(cls: Any) -> Any:
    class Resumable(cls):
        _reader: _Reader

        @property
        def _index_sampler(self) -> Any:
            return _Indices(super()._index_sampler, self._reader)

        def __iter__(self) -> Any:
            return self._reader.batches(super().__iter__)

    Resumable.__name__ = f"Resumable{cls.__name__}"
    return Resumable


def _readers(trainer: L.Trainer) -> list[_Reader]:
    return [leaf._reader for leaf in tree_leaves(trainer.train_dataloader) if hasattr(leaf, "_reader")]


def _position(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _mend_counts(loops: State, by_steps: bool) -> None:
    """Change Lightning's counts where it would not resume in the right epoch.

    It counts an epoch that ``max_steps`` ended as a whole one, and would skip the rest of it. Saved when an epoch
    begins, it would skip that one. And where the resumed run has ``max_steps`` (``by_steps``), it runs one without
    batches after one that is over. So the counts become those of a checkpoint saved inside the epoch, or at the last
    batch of the one before.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    both, now, whole = (epochs["current"], epochs["total"]), epochs["current"], batches["is_last_batch"]
    if 0 < now["started"] == now["processed"] == now["ready"] - 1:
        for count in both:
            count["ready"] -= 1
    is_over = 0 < now["ready"] == now["started"] == now["processed"]
    if not is_over or (whole and not by_steps):
        return
    for count in both:
        count["processed"] -= 1
        count["completed"] = min(count["completed"], count["processed"])
    if whole:
        for count in (batches["current"], batches["total"]):
            count["completed"] = count["processed"] - 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the loggers' step: Lightning adds one then


def _warn_of_lost_gradients(trainer: L.Trainer, processed: int) -> None:
    window = trainer.accumulate_grad_batches
    if trainer.training and 0 < processed < trainer.num_training_batches and processed % window:
        rank_zero_warn(
            f"checkpoint after batch {processed} of the epoch, inside a window of {window} accumulated batches: their "
            "gradients are not saved, so a resumed run differs; save after an optimizer step"
        )
