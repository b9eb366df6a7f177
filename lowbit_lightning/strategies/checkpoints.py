"""Checkpoints of sharded training: one file that every strategy reads, or a folder to which each rank writes its part.

How it works
    One file
        What Lightning saves on a single device: whole tensors, optimizer states by the parameter's number. Each rank
        maps the file and takes its rows.
    A folder
        ``torch.distributed.checkpoint`` for the tensors, under flat keys (``state_dict.NAME``,
        ``optimizer_0.state.3.exp_avg_codes``); ``meta.pt`` for all the rest; ``complete.json``, the marker, with the
        size of each file.

``atomic.py`` says how a save replaces the previous checkpoint.
"""

from __future__ import annotations

import inspect
import json
import pickle
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowbit_lightning.convert.lowbit import quantised_state
from lowbit_lightning.optim import LowBitOptimizer
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import codes_name
from lowbit_lightning.strategies import atomic, flat, metadata

META, MARKER, VERSION = "meta.pt", "complete.json", 1  # meta.pt is also how Lightning knows a folder of shards

State = dict[str, Any]
Together = Callable[[Callable[[], Any]], Any]
"""Calls an action; raises on all ranks where it raises on one."""

# Lightning 2.5 has no such argument, and loads everything.
_CHOOSES_WEIGHTS = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's CheckpointIO. An interruption cannot damage its saves, and it can read folders of shards.

    For any strategy: ``Trainer(plugins=[AtomicCheckpointIO()])`` lets DDP and single devices read what
    ``ShardedStrategy(save_distributed_checkpoint=True)`` saved. Remote paths (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: State, path: _PATH, storage_options: Any | None = None) -> None:
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_file(checkpoint, Path(path))

    def load_checkpoint(  # type: ignore[override]  # as TorchCheckpointIO's
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> State:
        if is_remote(path):
            chosen = {"weights_only": weights_only} if _CHOOSES_WEIGHTS else {}
            return super().load_checkpoint(path, map_location, **chosen)
        found = atomic.locate(Path(path))
        return load_folder(found, weights_only) if found.is_dir() else load_file(found, weights_only)


def is_remote(path: _PATH) -> bool:
    return "://" in str(path)


def consolidate(folder: _PATH, file: _PATH, weights_only: bool | None = None) -> None:
    """Convert a folder of shards into one file, which every strategy and plain torch can load.

    Runs in a single process, without a process group; needs room for the whole checkpoint in memory.

    Args:
        folder, file: paths.
        weights_only: as in ``torch.load``; None means True. False unpickles objects of any class: choose it for
            checkpoints that you trust.

    Raises:
        FileNotFoundError, ValueError: if ``folder`` is missing, incomplete or not a checkpoint.
        pickle.UnpicklingError: for objects of classes that ``weights_only`` does not allow.
    """
    found = atomic.locate(Path(folder))
    if not found.is_dir():
        raise ValueError(f"folder must be a distributed checkpoint, a folder, got {found}, which is a file")
    save_file(load_folder(found, weights_only is not False), Path(file))


# -- saving ------------------------------------------------------------------------------------------------------------


def save_file(checkpoint: State, path: Path) -> None:
    """Write one file; called by one rank. Raises OSError (ENOSPC) if the disk is full."""
    partial = atomic.partial(path, new_token())
    _prepare(path)
    try:
        with atomic.naming_a_full_disk(path), open(partial, "wb") as file:
            torch.save(checkpoint, file)
            atomic.to_disk(file)
        atomic.replace(partial, path)
    except BaseException:
        atomic.remove(partial)
        raise


def save_folder(checkpoint: State, path: Path, token: str, first: bool, together: Together) -> None:
    """Write a folder; every rank calls it with the same ``path`` and ``token``, and one as ``first``.

    ``checkpoint``: as Lightning has it, with DTensors of which each rank holds its part. Raises OSError (ENOSPC) if the
    disk is full.
    """
    partial = atomic.partial(path, token)
    tensors, rest = flat.split(checkpoint)

    def begin() -> None:
        _prepare(path)
        partial.mkdir()

    def write() -> None:
        try:
            with _quiet(), atomic.naming_a_full_disk(path):
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=not _distributed())
        except CheckpointException as error:
            raise OSError(f"the checkpoint {path} could not be written, and what was there stays: {error}") from error

    def finish() -> None:
        with atomic.naming_a_full_disk(path):
            with open(partial / META, "wb") as file:
                torch.save(rest, file)
                atomic.to_disk(file)
            sizes = {child.name: child.stat().st_size for child in sorted(partial.iterdir())}
            with open(partial / MARKER, "w") as text:
                json.dump({"version": VERSION, "files": sizes}, text)
                atomic.to_disk(text)
        atomic.sync_folder(partial)
        atomic.replace(partial, path)

    together(begin if first else _nothing)
    try:
        together(write)
        together(finish if first else _nothing)
    except BaseException:
        if first:
            atomic.remove(partial)
        raise


def _nothing() -> None:
    pass


def _prepare(path: Path) -> None:
    """Raises IsADirectoryError if the folder is not a checkpoint, because a save would replace it."""
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in (META, MARKER)):
        raise IsADirectoryError(f"{path} is a folder, but not a checkpoint: a save would replace it; give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(path)


def new_token() -> str:
    return uuid.uuid4().hex[:12]


# -- loading -----------------------------------------------------------------------------------------------------------


def load_file(path: Path, weights_only: bool | None = None, mmap: bool = False) -> State:
    """Lightning's checkpoint; ``mmap``: its tensors are read when they are used. Raises ValueError if the file is not a
    checkpoint."""
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        checkpoint = torch.load(path, mmap=mmap, map_location="cpu", weights_only=_weights_only(weights_only))
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or an incomplete one: {error}") from error
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) and zipfile.is_zipfile(path):
            raise  # torch says what is in it and what to do
        raise ValueError(f"{path} is not a checkpoint, or an incomplete one: {error}") from error
    return _checked(checkpoint, path)


def _weights_only(asked: bool | None) -> bool | None:
    return asked if _CHOOSES_WEIGHTS or asked is not None else False


def load_folder(
    path: Path,
    weights_only: bool | None = None,
    model: nn.Module | None = None,
    optimizers: list[Optimizer] | None = None,
    together: Together = lambda action: action(),
) -> State:
    """Lightning's checkpoint from a folder: each tensor placed as the parameter of ``model`` it belongs to, or whole.

    With a model every rank calls it; ``together(action)`` raises on all ranks if the action raises on one. Raises
    ValueError if the folder is not a checkpoint.
    """
    rest, index = together(lambda: _open_folder(path, weights_only))
    tensors = dict(flat.room(index, model, optimizers or []))
    return flat.join(together(lambda: _read_tensors(path, index, tensors, no_dist=model is None)), rest)


def _open_folder(path: Path, weights_only: bool | None = None) -> tuple[State, Metadata]:
    """Everything except the tensors, and the tensors' metadata; not a collective. Raises ValueError."""
    try:
        marker = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint of lowbit_sharded: it has no readable {MARKER}; checkpoints of other "
            "strategies become a file by `python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        ) from error
    if marker.get("version") != VERSION:
        raise ValueError(f"{path} has version {marker.get('version')!r}; this library reads version {VERSION}")
    for name, size in marker["files"].items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            raise ValueError(f"{path} is damaged: {name} should have {size} bytes and has {found}")
    try:
        rest = torch.load(path / META, map_location="cpu", weights_only=_weights_only(weights_only))
        return _checked(rest, path), metadata.read(path)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_tensors(path: Path, index: Metadata, tensors: dict[str, Tensor], no_dist: bool) -> dict[str, Tensor]:
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=metadata.Reader(path, index), no_dist=no_dist or not _distributed())
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return tensors


def _checked(checkpoint: Any, path: Path) -> State:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        what = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no state_dict; it holds {what}")
    return checkpoint


# -- putting in place --------------------------------------------------------------------------------------------------


def fitted(model: nn.Module, saved: Mapping[str, Any], strict: bool, source: _PATH) -> State:
    """Saved weights, placed as the model's; for its low-bit layers quantised. Raises a ValueError that names everything
    that does not fit."""
    own, saved = model.state_dict(), quantised_state(model, saved)
    problems = []
    if strict:
        problems += [f"missing {name}" for name in own.keys() - saved.keys()]
        problems += [f"unknown {name}" for name in saved.keys() - own.keys()]
    for name in own.keys() & saved.keys():
        mine, theirs = own[name], saved[name]
        if isinstance(mine, Tensor) and tuple(mine.shape) != tuple(getattr(theirs, "shape", ())):
            problems.append(f"{name} is {tuple(getattr(theirs, 'shape', ()))}, the model's {tuple(mine.shape)}")
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(sorted(problems))}")
    return {name: _placed_as(own.get(name), value) for name, value in saved.items()}


def load_optimizers(optimizers: list[Optimizer], checkpoint: Mapping[str, Any], source: _PATH) -> None:
    """Raises ValueError if the saved states of an optimizer do not fit; the optimizers before it are loaded then."""
    saved = checkpoint.get("optimizer_states")
    if saved is None or len(saved) != len(optimizers):
        what = "no optimizer states: it holds weights alone" if saved is None else f"{len(saved)} optimizers"
        raise ValueError(f"{source} has {what}; this run has {len(optimizers)} optimizers")
    for optimizer, theirs in zip(optimizers, saved, strict=True):
        _check_bits(optimizer, theirs, source)
        ids = [key for group in theirs["param_groups"] for key in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        owners = dict(zip(ids, params, strict=False))
        paged = {p for group in optimizer.param_groups if group.get("paged") for p in group["params"]}
        state = {  # paged ones are placed one after the other, as they are loaded
            key: entries
            if owners.get(key) in paged
            else {name: _placed_as(owners.get(key), value) for name, value in entries.items()}
            for key, entries in theirs["state"].items()
        }
        try:
            optimizer.load_state_dict({**theirs, "state": state})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{source} does not fit {type(optimizer).__name__}: {error}") from error


def _check_bits(optimizer: Optimizer, saved: Mapping[str, Any], source: _PATH) -> None:
    """torch.optim would accept 8-bit states, and fail in the step because its own states are missing."""
    coded = any(name.endswith(codes_name("")) for entries in saved["state"].values() for name in entries)
    if coded and not isinstance(optimizer, LowBitOptimizer):
        raise ValueError(
            f"{source} holds 8-bit states, which {type(optimizer).__module__}.{type(optimizer).__name__} cannot read: "
            f"leave optimizer_bits=8, or convert the checkpoint with `lowbit convert {source} --bits 32`"
        )


def _placed_as(owner: Any, value: Any) -> Any:
    """A saved tensor of the owner's shape as a DTensor, where the owner is one; others in memory of their own."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if isinstance(owner, DTensor) and value.shape == owner.shape and flat.is_cut_by_rows(owner):
        part = shards.part_of(owner, value).to(owner.to_local().device)
        return shards.leave(owner, part, owner.shape)
    return value if isinstance(owner, DTensor) else value.clone()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that it assumes a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
