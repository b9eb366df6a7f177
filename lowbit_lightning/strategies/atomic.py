"""Saves that an interruption cannot damage: written beside their target, synced, and moved to its place in one step.

A file replaces a file by a rename. For a folder Linux exchanges two names in one call (``renameat2``). Where that is
missing there are two renames, and the old checkpoint has a name of its own between them: ``last.previous.ckpt``. So
at every moment the old or the new checkpoint loads.

A save in progress has a name that does not contain its target's (``.saving-...``): Lightning looks up checkpoints by
their names (``last*.ckpt``, the digits of ``hpc_ckpt_2.ckpt``), and must not find an incomplete one. The old checkpoint
that was put aside is complete, and is found like the checkpoint itself.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LITTLE = 2**20  # bytes: as good as nothing


# -- names -------------------------------------------------------------------------------------------------------------


def partial(path: Path, token: str) -> Path:
    """The path to which a save to ``path`` writes; ``token`` is new for each save."""
    return path.with_name(_prefix(path) + token)


def _prefix(path: Path) -> str:
    return f".saving-{hashlib.sha256(path.name.encode()).hexdigest()[:12]}-"


def previous(path: Path) -> Path:
    """The path of a checkpoint between two renames: ``last.previous.ckpt`` for ``last.ckpt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _earlier_previous(path: Path) -> Path:
    """That of saves by versions before this one."""
    return path.with_name(f"{path.name}.previous")


def locate(path: Path) -> Path:
    """The path, or the path of the checkpoint that a save had put aside when it died. Raises FileNotFoundError."""
    for found in (path, previous(path), _earlier_previous(path)):
        if found.exists():
            return found
    raise FileNotFoundError(f"no checkpoint at {path}")


# -- replacing ---------------------------------------------------------------------------------------------------------


def replace(new: Path, path: Path) -> None:
    """Replace whatever is at ``path`` by ``new``, and remove the old content; both are in one folder."""
    if not (path.is_dir() or (path.exists() and new.is_dir())):
        os.replace(new, path)
    elif not _exchange(new, path):
        remove(previous(path))
        path.rename(previous(path))
        os.replace(new, path)
    sync_folder(path.parent)
    if previous(path).exists():
        previous(path).rename(new)  # while it is removed, it is no checkpoint
    remove(new)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False if the kernel, file system or C library cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def remove_leftovers(path: Path) -> None:
    """Remove the leftovers of interrupted saves to ``path``."""
    for child in path.parent.iterdir():
        if child.name.startswith((_prefix(path), f"{path.name}.partial-")):  # the second: by earlier versions
            remove(child)
    if path.exists():
        remove(previous(path))
        remove(_earlier_previous(path))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- to disk -----------------------------------------------------------------------------------------------------------


def to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. If the file system cannot do this, one warning says so."""
    if os.name != "posix":  # a folder can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        _warn_of_no_sync(error.strerror)
    finally:
        os.close(descriptor)


@functools.cache
def _warn_of_no_sync(reason: str) -> None:
    """So do some of cifs, NFS and FUSE."""
    rank_zero_warn(
        f"the file system of the checkpoints can't sync a folder ({reason}): if the machine crashes right after a "
        "save, the checkpoint before it may be the one that is found"
    )


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raises OSError (ENOSPC) with the path for any error that a full disk causes."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if not (_says_full(error) or (isinstance(error, RuntimeError) and _is_full(path.parent))):
            raise
        what = "the disk is full, or a quota is used up: this checkpoint was not written; free space, or save elsewhere"
        raise OSError(errno.ENOSPC, what, str(path)) from error


def _says_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, CheckpointException):
            return any(_says_full(failure) for failure, _ in error.failures.values())
        error = error.__cause__ or error.__context__
    return False


def _is_full(folder: Path) -> bool:
    """torch's own writer raises a RuntimeError that does not say why."""
    return folder.is_dir() and shutil.disk_usage(folder).free < _LITTLE
