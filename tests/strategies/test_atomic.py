"""Saves that die, file systems that lack something, and the names of what is not whole yet."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lowbit_lightning.strategies import AtomicCheckpointIO, atomic, checkpoints, consolidate


class Died(BaseException):
    pass


def make(value: float) -> dict[str, Any]:
    entries = {"step": torch.tensor(value), "exp_avg": torch.full((5, 7), value)}
    return {
        "state_dict": {"a": torch.full((5, 7), value), "b": torch.full((3,), value)},
        "optimizer_states": [{"state": {0: entries}, "param_groups": [{"params": [0], "lr": value}]}],
        "global_step": value,
    }


def save(distributed: bool, value: float, path: Path) -> None:
    if distributed:
        checkpoints.save_folder(make(value), path, checkpoints.new_token(), True, lambda action: action())
    else:
        checkpoints.save_file(make(value), path)


def values_of(checkpoint: dict[str, Any]) -> set[float]:
    state = checkpoint["optimizer_states"][0]
    tensors = [*checkpoint["state_dict"].values(), *state["state"][0].values()]
    return {checkpoint["global_step"], state["param_groups"][0]["lr"], *(float(v) for x in tensors for v in x.unique())}


CHANGES = (
    *((os, "replace"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (Path, "rename")),
    *((Path, "unlink"), (shutil, "rmtree"), (torch, "save"), (atomic, "_exchange")),
)
"""What changes the disk."""


def dying_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the ``count``-th change fail, and all that come after it: as if the process had been killed there."""
    left = [count]

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise Died
            return original(*args, **kwargs)

        return function

    for owner, name in CHANGES:
        patch.setattr(owner, name, dying(getattr(owner, name)))


def deaths(
    new: bool, path: Path, patching: pytest.MonkeyPatch, name: str, prepare: Callable[[Path], None]
) -> Iterator[Any]:
    """Saves to ``name`` over what ``prepare`` makes, killed at the first change, the second and so on until one lives:
    ``(target, died)``."""
    died, count = True, 0
    while died:
        count += 1
        assert count < 200, "no save lives, whatever is left to it"
        target = path / str(count) / name
        prepare(target)
        died = False
        with patching.context() as patch:
            dying_at(patch, count)
            try:
                save(new, 2.0, target)
            except (Died, OSError):  # torch.distributed.checkpoint makes of any exception its own
                died = True
        yield target, died


def can_exchange(folder: Path) -> bool:
    (folder / "a").touch()
    (folder / "b").mkdir()
    return atomic._exchange(folder / "a", folder / "b")


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_save_may_die_before_any_change_to_the_disk(
    old: str, new: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single one: what loads, by its path and by Lightning's "last", is the old or the new checkpoint, and
    the next save cleans up."""
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    elif not can_exchange(tmp_path):
        pytest.skip("no renameat2 here")
    seen, count, missing = set(), 0, 0
    before = functools.partial(save, old == "folder", 1.0)
    for path, died in deaths(new == "folder", tmp_path, monkeypatch, "last.ckpt", before):
        count += 1
        values = values_of(AtomicCheckpointIO().load_checkpoint(path))
        assert len(values) == 1, f"step {count}: a mixture, {values}"
        assert values == {2.0} or died
        assert values_of(AtomicCheckpointIO().load_checkpoint(found_as_last(path.parent))) == values
        missing += not path.exists()
        seen |= values
        save(new == "folder", 3.0, path)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
        assert values_of(AtomicCheckpointIO().load_checkpoint(path)) == {3.0}
    assert count > 4
    assert seen == {1.0, 2.0}
    assert missing == (0 if exchanges or old == new == "file" else 1)


# -- names -------------------------------------------------------------------------------------------------------------


def found_as_last(folder: Path) -> str:
    """What Lightning takes for ``ckpt_path="last"``."""
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[ModelCheckpoint(folder)])
    found = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("name", ["hpc_ckpt_2.ckpt", "last.ckpt", "epoch=1-step=3.ckpt", "ckpt_7"])
def test_lightning_finds_nothing_that_is_not_whole(
    name: str, distributed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a glob, by the digits of a name, or by its start; whenever a first save dies."""
    versions = connector(tmp_path)._CheckpointConnector__max_ckpt_version_in_folder
    for path, _ in deaths(distributed, tmp_path, monkeypatch, name, lambda path: path.parent.mkdir()):
        left = [child for child in path.parent.iterdir() if child != path]
        assert not [child for child in left if path.stem in child.name or child.suffix == path.suffix != ""]
        if not path.exists():
            assert versions(path.parent, "ckpt_") is None
            assert not list(path.parent.glob("[a-z]*"))


def connector(folder: Path) -> Any:
    return L.Trainer(accelerator="cpu", logger=False, default_root_dir=folder)._checkpoint_connector


def test_a_requeued_slurm_job_finds_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(path: Path) -> None:
        save(True, 1.0, path.with_name("hpc_ckpt_1.ckpt"))

    for path, _ in deaths(True, tmp_path, monkeypatch, "hpc_ckpt_2.ckpt", before):
        found = connector(path.parent)._hpc_resume_path
        assert found == str(path if path.exists() else path.with_name("hpc_ckpt_1.ckpt"))
        assert values_of(AtomicCheckpointIO().load_checkpoint(found)) == {2.0 if path.exists() else 1.0}


def test_what_earlier_versions_had_put_aside_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(True, 1.0, path)
    path.rename(tmp_path / "last.ckpt.previous")
    (tmp_path / "last.ckpt.partial-dead").mkdir()
    assert values_of(AtomicCheckpointIO().load_checkpoint(path)) == {1.0}
    for value in (2.0, 3.0):
        save(True, value, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_saves_to_other_paths_are_left_alone(tmp_path: Path) -> None:
    under_way = atomic.partial(tmp_path / "a.ckpt", "token")
    under_way.mkdir()
    save(True, 1.0, tmp_path / "b.ckpt")
    save(False, 1.0, tmp_path / "a.ckpt.2")
    assert under_way.exists()
    save(True, 1.0, tmp_path / "a.ckpt")
    assert not under_way.exists()


# -- file systems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_file_system_that_cannot_sync_folders_is_warned_about_once(
    distributed: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk itself is raised."""
    fsync, path = os.fsync, tmp_path / "last"

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    atomic._warn_of_no_sync.cache_clear()
    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            save(distributed, 1.0, path)
        return
    with pytest.warns(UserWarning, match="can't sync a folder") as warned:
        for value in (1.0, 2.0):
            save(distributed, value, path)
    assert len(warned) == 1
    assert values_of(AtomicCheckpointIO().load_checkpoint(path)) == {2.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
@pytest.mark.parametrize("victim", ["file", "tensors", "rest", "marker"])
@pytest.mark.parametrize("size", [1, 10**6])
def test_a_full_disk_is_named(victim: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write itself fails, in torch's writers; what was there stays, and nothing lies beside it."""
    names = {"tensors": "__0_0.distcp", "rest": checkpoints.META, "marker": checkpoints.MARKER}
    path = tmp_path / "last.ckpt"
    save(victim != "file", 1.0, path)
    checkpoint = {**make(2.0), "big": torch.zeros(size)}
    checkpoint["state_dict"]["big"] = torch.zeros(size)
    if victim == "file":
        atomic.partial(path, "token").symlink_to("/dev/full")
    else:
        mkdir = Path.mkdir

        def with_a_full_file(folder: Path, *args: Any, **kwargs: Any) -> None:
            mkdir(folder, *args, **kwargs)
            if folder.name.endswith("token") and not (folder / names[victim]).is_symlink():
                (folder / names[victim]).symlink_to("/dev/full")

        monkeypatch.setattr(Path, "mkdir", with_a_full_file)
    monkeypatch.setattr(checkpoints, "new_token", lambda: "token")
    monkeypatch.setattr(atomic, "remove_leftovers", lambda path: None)
    with pytest.raises(OSError, match=rf"the disk is full.*{path.name}") as raised:
        if victim == "file":
            checkpoints.save_file(checkpoint, path)
        else:
            checkpoints.save_folder(checkpoint, path, "token", True, lambda action: action())
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert values_of(AtomicCheckpointIO().load_checkpoint(path)) == {1.0}


def test_torchs_own_writer_does_not_say_that_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.save(x, "path")``, as DeepSpeed calls it: a RuntimeError beside no space at all."""

    def write() -> None:
        with atomic.naming_a_full_disk(tmp_path / "a"):
            raise RuntimeError("basic_ios::clear: iostream error")

    with pytest.raises(RuntimeError, match="iostream"):
        write()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="the disk is full"):
        write()


# -- what is replaced --------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for distributed in (False, True):
        with pytest.raises(IsADirectoryError, match=r"runs is a folder, but not a checkpoint"):
            save(distributed, 1.0, kept.parent)
    assert kept.read_text() == "mine"


def test_a_save_that_fails_leaves_nothing_beside(tmp_path: Path) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise RuntimeError("no")

    bad = {**make(1.0), "x": Unsaveable()}
    with pytest.raises(RuntimeError, match="no"):
        checkpoints.save_file(bad, tmp_path / "file")
    with pytest.raises(RuntimeError, match="no"):
        checkpoints.save_folder(bad, tmp_path / "folder", "token", True, lambda action: action())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_is_replaced_by_a_folder(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    save(True, 1.0, tmp_path / "first")
    (tmp_path / "last").symlink_to(tmp_path / "first")
    save(True, 2.0, tmp_path / "last")
    assert values_of(checkpoints.load_folder(tmp_path / "last")) == {2.0}
    assert values_of(checkpoints.load_folder(tmp_path / "first")) == {1.0}
    assert {path.name for path in tmp_path.iterdir()} == {"first", "last"}


def test_consolidate_says_what_is_wrong(tmp_path: Path) -> None:
    save(True, 1.0, tmp_path / "folder")
    consolidate(tmp_path / "folder", tmp_path / "file")
    assert values_of(torch.load(tmp_path / "file")) == {1.0}
    with pytest.raises(ValueError, match="a folder, got"):
        consolidate(tmp_path / "file", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        consolidate(tmp_path / "nowhere", tmp_path / "other")
    (tmp_path / "folder" / "complete.json").write_text('{"version": 9, "files": {}}')
    with pytest.raises(ValueError, match=r"folder has version 9.*reads version 1"):
        consolidate(tmp_path / "folder", tmp_path / "other")
    assert not (tmp_path / "other").exists()
