"""Where compiled kernels are kept between runs, and what makes them safe to load.

An entry is one file: the bytes, then the SHA-256 of its name and the bytes. (The dynamic loader and the CUDA driver
ignore what follows an ELF image, so a host library is loaded from the entry itself.) It is written under a temporary
name and renamed. So any number of processes may start at once: each compiles a kernel at most once, and none ever reads
half a file. An entry with a wrong checksum is ignored, and the next write replaces it.

Entries are executed. So the cache refuses a directory that belongs to another user or that others may write. It refuses
such an entry too, because it may have been planted before the directory was repaired. Owner and mode are read from the
opened file.

If the cache is refused, cannot be written or is mounted noexec, kernels go to a private directory for temporary files,
which is removed at exit. If no such directory can be used, they go into memory (on Linux). A warning gives the reason.
If nothing works, ``library`` raises NoPlace, and the ops run on the reference.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from lowbit_lightning.kernels.compile.errors import NoPlace

ENVIRONMENT_VARIABLE = "LOWBIT_LIGHTNING_CACHE"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_REMEDY = (
    f"Set {ENVIRONMENT_VARIABLE} to a directory that you own, that only you can write and that is not mounted noexec,"
    " and TMPDIR to a directory that you can write."
)

_private: dict[tuple[int, Path], Path] = {}  # (process that made it, place for temporary files) -> directory
_warned = False


def library(name: str, make: Callable[[], bytes]) -> ctypes.CDLL:
    """The host library called ``name``: loaded from the cache, or else made, stored and loaded.

    Raises:
        NoPlace: if it can be stored nowhere, or executed from nowhere.
    """
    reasons: list[str] = []
    for place in _places(reasons, new=False):
        content = content_of(place, name, reasons)
        if content is not None:  # it may be for another system image: then it does not load, and is made again
            loaded = _load(place / name, reasons if _noexec(place) else []) or _load_from_memory(content)
            if loaded is not None:
                _warn(reasons)
                return loaded
    content = make()
    for place in _places(reasons):
        entry = _write(place, name, content, reasons)
        loaded = None if entry is None else _load(entry, reasons)
        if loaded is not None:
            _warn(reasons)
            return loaded
    loaded = _load_from_memory(content)
    if loaded is None:
        raise no_place(reasons)
    _warn(reasons)
    return loaded


def find(name: str) -> Path | None:
    """The entry called ``name``, or None if it was never written, is corrupt, or is refused."""
    reasons: list[str] = []
    for place in _places(reasons, new=False):
        if content_of(place, name, reasons) is not None:
            return place / name
    _warn(reasons)
    return None


def body(entry: Path) -> bytes:
    """The bytes that were stored, without the checksum."""
    return entry.read_bytes()[:-_CHECKSUM_BYTES]


def store(name: str, content: bytes) -> Path | None:
    """Write an entry and return its path. If the cache cannot be written, it is a private temporary one, or None."""
    reasons: list[str] = []
    entries = (_write(place, name, content, reasons) for place in _places(reasons))
    entry = next((entry for entry in entries if entry is not None), None)
    _warn(reasons)
    return entry


def directory() -> Path | None:
    """The cache directory, created with mode 0700, or None if it is refused or cannot be created.

    It is $LOWBIT_LIGHTNING_CACHE, else $XDG_CACHE_HOME/lowbit_lightning, else ~/.cache/lowbit_lightning.
    """
    place = wanted()
    return None if place is None or _why_refused(place) else place


def temporary_places() -> list[Path]:
    """Directories for temporary files, best first: $TMPDIR or Python's choice, then other usual ones."""
    named = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/var/tmp"]
    with contextlib.suppress(OSError):  # there is none that can be written
        named.insert(0, tempfile.gettempdir())
    return [Path(place) for place in dict.fromkeys(named) if os.path.isabs(place) and os.path.isdir(place)]


def no_place(reasons: list[str]) -> NoPlace:
    return NoPlace(f"compiled kernels can be kept nowhere: {'; '.join(reasons)}. {_REMEDY}")


# -- places ----------------------------------------------------------------------------------------------------------


def _places(reasons: list[str], new: bool = True) -> Iterator[Path]:
    """The directories that may hold entries, best first. If the cache is not among them, ``reasons`` gets the reason.
    ``new``: create private directories that do not exist yet."""
    place = wanted()
    refused = "there is no home directory for the kernel cache" if place is None else _why_refused(place)
    if place is not None and not refused:
        yield place
    elif refused not in reasons:
        reasons.append(refused)
    for parent in temporary_places():
        private = _private.get((os.getpid(), parent))  # a forked child makes its own: its parent may exit first
        if private is not None and not _why_refused(private, create=False):
            yield private
        elif new:
            with contextlib.suppress(OSError):
                made = _private[os.getpid(), parent] = Path(tempfile.mkdtemp(prefix="lowbit_lightning-", dir=parent))
                atexit.register(_remove, os.getpid(), made)
                yield made


def wanted() -> Path | None:
    """The directory that the environment names for the cache, whether or not it can be used."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is ignored
        base = os.path.expanduser("~/.cache")
    return Path(base, "lowbit_lightning") if os.path.isabs(base) else None


def _why_refused(place: Path, create: bool = True) -> str:
    """The reason why a directory is refused, or ""."""
    try:
        if create:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = place.stat()
    except OSError as error:
        return f"the kernel cache {str(place)!r} cannot be created ({error.strerror})"
    foreign = _why_foreign(info)
    return foreign and (
        f"the kernel cache {str(place)!r} is refused: {foreign}. Delete it: what others have left there would be"
        " executed (changing its mode does not make it safe)"
    )


def _why_foreign(info: os.stat_result) -> str:
    """The reason why another user may have written something of this owner and mode, or ""."""
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the profile directory's own access list rules
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}, this is user {os.geteuid()}"
    mode = stat.S_IMODE(info.st_mode)
    return f"mode {mode:04o} lets others write it" if mode & 0o022 else ""


def _noexec(place: Path) -> bool:
    return hasattr(os, "ST_NOEXEC") and bool(os.statvfs(place).f_flag & os.ST_NOEXEC)


def _remove(owner: int, place: Path) -> None:
    if owner == os.getpid():
        shutil.rmtree(place, ignore_errors=True)


# -- entries ---------------------------------------------------------------------------------------------------------


def content_of(place: Path, name: str, reasons: list[str]) -> bytes | None:
    """The bytes of an intact entry; None if there is none, or if it is refused (``reasons`` gets the reason)."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would have us wait
    try:
        with open(os.open(place / name, flags), "rb") as file:
            info = os.fstat(file.fileno())
            foreign = _why_foreign(info)
            if foreign:
                reasons.append(
                    f"the kernel {str(place / name)!r} is refused: {foreign}. Delete the whole directory: what others"
                    " have left there would be executed"
                )
            if foreign or not stat.S_ISREG(info.st_mode):
                return None
            content = file.read()
    except OSError:
        return None
    content, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    return content if _checksum(name, content) == checksum else None


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()  # a renamed entry is not intact


def _write(place: Path, name: str, content: bytes, reasons: list[str]) -> Path | None:
    """The entry's path; None if it cannot be written (``reasons`` gets the reason)."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=place, prefix=".writing-")
        with os.fdopen(handle, "wb") as file:
            file.write(content + _checksum(name, content))
        os.replace(temporary, place / name)
        return place / name
    except OSError as error:
        reasons.append(f"the kernel cache {str(place)!r} cannot be written ({error.strerror})")
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return None


def _load(entry: Path, reasons: list[str]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(entry))
    except OSError as error:
        reasons.append(f"a kernel in {str(entry.parent)!r} cannot be executed ({error})")
    return None


def _load_from_memory(content: bytes) -> ctypes.CDLL | None:
    """The library, from a file in memory, which no mount's noexec applies to."""
    if not hasattr(os, "memfd_create"):
        return None
    # It stays open: the loader would take another file with the same number for this one.
    handle = os.memfd_create("lowbit_lightning")
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        loaded = ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        return None
    return loaded


def _warn(reasons: list[str]) -> None:
    global _warned
    if reasons and not _warned:
        _warned = True
        warnings.warn(
            f"{'; '.join(reasons)}. Kernels that cannot be kept are compiled again by every process. {_REMEDY}",
            RuntimeWarning,
            stacklevel=4,
        )
