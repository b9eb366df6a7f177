"""Where compiled kernels are kept between runs, and what makes them safe to load.

An entry is one file: the bytes, then their SHA-256. (The dynamic loader and the CUDA driver both ignore what follows
an ELF image, so a host library is loaded from the entry itself.) It is written under a temporary name and renamed, so
that any number of processes may start at once: each compiles at worst once, and none ever reads half a file.
An entry whose checksum is wrong is a miss, and the next write replaces it.

What lies here gets executed. So a directory that another user owns, or that others may write, is refused. A cache that
is refused or cannot be written costs a compilation per process: entries go to a private temporary directory that is
removed at exit, and one warning says why.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

ENVIRONMENT_VARIABLE = "LOWBIT_LIGHTNING_CACHE"
_CHECKSUM_BYTES = hashlib.sha256().digest_size

_judged: dict[Path, str] = {}  # directory -> why it is refused, "" when it is trusted
_warned: set[str] = set()
_private: tuple[int, Path] | None = None  # the process that made it, and where


def find(name: str) -> Path | None:
    """The entry called ``name``, or None: never written, corrupt, or in a directory that is not trusted."""
    candidates = [directory(), _private[1] if _private else None]
    for place in candidates:
        if place is not None and _intact(place / name):
            return place / name
    return None


def body(entry: Path) -> bytes:
    """The bytes that were stored, without the checksum."""
    return entry.read_bytes()[:-_CHECKSUM_BYTES]


def store(name: str, content: bytes) -> Path:
    """Write an entry and return its path; where the cache cannot be written, a private temporary one."""
    place = directory()
    if place is not None:
        try:
            return _write(place, name, content)
        except OSError as error:
            _warn(f"the kernel cache {str(place)!r} cannot be written ({error.strerror})")
    return _write(_private_directory(), name, content)


def directory() -> Path | None:
    """The cache directory, created with mode 0700; None where there is none to be trusted (a warning said why).

    It is $LOWBIT_LIGHTNING_CACHE, else $XDG_CACHE_HOME/lowbit_lightning, else ~/.cache/lowbit_lightning.
    """
    place = _wanted()
    if place is None:
        _warn("there is no home directory for the kernel cache")
        return None
    if place not in _judged:
        _judged[place] = _why_refused(place)
    if _judged[place]:
        _warn(_judged[place])
        return None
    return place


def _wanted() -> Path | None:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is ignored
        base = os.path.expanduser("~/.cache")
    return Path(base, "lowbit_lightning") if os.path.isabs(base) else None


def _why_refused(place: Path) -> str:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = place.stat()
    except OSError as error:
        return f"the kernel cache {str(place)!r} cannot be created ({error.strerror})"
    user = _user()
    if user is not None and info.st_uid != user:
        return f"the kernel cache {str(place)!r} is refused: it belongs to user {info.st_uid}, this is user {user}"
    if user is not None and stat.S_IMODE(info.st_mode) & 0o022:
        return (
            f"the kernel cache {str(place)!r} is refused: mode {stat.S_IMODE(info.st_mode):04o} lets others write it"
            " (chmod 700 makes it usable)"
        )
    return ""


def _user() -> int | None:
    return os.geteuid() if hasattr(os, "geteuid") else None  # Windows: the profile directory's own access list rules


def _intact(entry: Path) -> bool:
    try:
        content = entry.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() == content[-_CHECKSUM_BYTES:]


def _write(place: Path, name: str, content: bytes) -> Path:
    handle, temporary = tempfile.mkstemp(dir=place, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(temporary, place / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return place / name


def _private_directory() -> Path:
    global _private
    # A forked child makes its own: its parent may exit, and remove the directory, first.
    if _private is None or _private[0] != os.getpid():
        _private = os.getpid(), Path(tempfile.mkdtemp(prefix="lowbit_lightning-"))  # mkdtemp: mode 0700
        atexit.register(_remove, *_private)
    return _private[1]


def _remove(owner: int, place: Path) -> None:
    if owner == os.getpid():
        shutil.rmtree(place, ignore_errors=True)


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{reason}; kernels are compiled again by every process. Set {ENVIRONMENT_VARIABLE} to a directory that"
            " you own and that only you can write.",
            RuntimeWarning,
            stacklevel=4,
        )
