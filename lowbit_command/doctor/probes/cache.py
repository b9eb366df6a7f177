"""The cache of compiled kernels: whose it is, who may write it, whether what lies there can be run and is intact."""

from __future__ import annotations

import mmap
import os
import re
import shlex
import stat
import tempfile
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, counted, fail, ok, warn
from lowbit_command.doctor.read import mount_of, noexec
from lowbit_command.units import amount

BARE = True
LIMIT = 20.0
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "gpfs", "ceph", "beegfs")
_ENTRY = re.compile(r"[0-9a-f]{32}\.(so|cubin)")
_MOST_CHECKED = 500  # entries whose checksum is verified


def gather() -> dict[str, Any]:
    from lowbit_lightning.kernels.compile import cache

    wanted = cache.wanted()
    places = [str(place) for place in cache.temporary_places()]
    facts: dict[str, Any] = {
        "place": None if wanted is None else str(wanted),
        "named": bool(os.environ.get(cache.ENVIRONMENT_VARIABLE)),
        "home": os.environ.get("HOME", ""),
        "user": os.geteuid() if hasattr(os, "geteuid") else None,
        "exists": False,
        "others": [place for place in places if _writable(Path(place))],
        "runnable_others": [place for place in places if _writable(Path(place)) and not noexec(place)],
        "memory": hasattr(os, "memfd_create"),
    }
    if wanted is None:
        return facts
    try:
        info = wanted.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return facts | {"error": "" if missing else error.strerror, "creatable": missing and _creatable(wanted)}
    facts |= {"exists": True, "directory": stat.S_ISDIR(info.st_mode), "owner": info.st_uid}
    facts |= {"mode": stat.S_IMODE(info.st_mode), "writable": _writable(wanted), "noexec": not _runs(wanted)}
    facts |= {"mount": list(mount_of(wanted))}
    return facts | _entries(wanted, cache)


def _writable(place: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _creatable(place: Path) -> bool:
    parent = next((p for p in place.parents if p.exists()), None)
    return parent is not None and _writable(parent)


def _runs(place: Path) -> bool:
    """Whether the loader could map a library of this folder; tried, where the folder can be written."""
    if noexec(place):
        return False
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * mmap.PAGESIZE)
            file.flush()
            if hasattr(mmap, "PROT_EXEC"):
                mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except PermissionError:
        return False
    except OSError:
        return True  # it cannot be written: another finding
    return True


def _entries(place: Path, cache: Any) -> dict[str, Any]:
    found = {"entries": 0, "bytes": 0, "corrupt": 0, "foreign": 0, "checked": 0}
    try:
        names = [entry for entry in os.scandir(place) if _ENTRY.fullmatch(entry.name)]
    except OSError:
        return found
    for entry in names:
        try:
            info = entry.stat()
        except OSError:
            continue
        found["entries"] += 1
        found["bytes"] += info.st_size
        reasons: list[str] = []
        if found["checked"] < _MOST_CHECKED and hasattr(os, "geteuid"):
            found["checked"] += 1
            if cache.content_of(place, entry.name, reasons) is None:
                found["foreign" if reasons else "corrupt"] += 1
    return found


def judge(facts: dict[str, Any]) -> list[Finding]:
    place = facts["place"]
    if place is None:
        text = f"there is no home directory (HOME={facts['home']!r}) for the kernel cache: {_costs(facts)}"
        return [_level(facts)("cache", text, _elsewhere(facts))]
    if not facts["exists"]:
        return [_missing(facts)]
    if not facts["directory"]:
        return [fail("cache", f"{place} is no directory: {_costs(facts)}", f"rm {shlex.quote(place)}")]
    return [_refused(facts) or _useless(facts) or _suspect(facts) or _good(facts)]


def _missing(facts: dict[str, Any]) -> Finding:
    place = facts["place"]
    if facts["creatable"]:
        return ok("cache", f"{place} will be created by the first kernel")
    why = f" ({facts['error']})" if facts["error"] else ""
    return _level(facts)("cache", f"{place} cannot be created{why}: {_costs(facts)}", _elsewhere(facts))


def _refused(facts: dict[str, Any]) -> Finding | None:
    """What others may have written is not run."""
    place, user, owner, mode = facts["place"], facts["user"], facts["owner"], facts["mode"]
    if user is None:
        return None
    if owner != user:
        text = f"{place} is refused: it belongs to user {owner}, this is user {user}, and what lies there would be run"
        return fail("cache", f"{text}. {_costs(facts).capitalize()}", _elsewhere(facts))
    if mode & 0o022:
        text = f"{place} is refused: mode {mode:04o} lets others write it, and what lies there would be run"
        return fail(
            "cache", f"{text}. {_costs(facts).capitalize()}", f"{_emptied(place)} && chmod 700 {shlex.quote(place)}"
        )
    if facts["foreign"]:
        text = f"{place} holds {counted(facts['foreign'], 'kernel')} that another user wrote or may write; refused"
        return fail("cache", text, _emptied(place))
    return None


def _useless(facts: dict[str, Any]) -> Finding | None:
    place = facts["place"]
    if not facts["writable"]:
        return _level(facts)("cache", f"{place} cannot be written: {_costs(facts)}", _elsewhere(facts))
    if facts["noexec"]:
        point = facts["mount"][0]
        text = f"{place} lies on a file system mounted noexec ({point}), so kernels cannot be loaded from it: "
        return _level(facts)("cache", text + _costs(facts), _elsewhere(facts))
    return None


def _suspect(facts: dict[str, Any]) -> Finding | None:
    place, kind = facts["place"], facts["mount"][1]
    if facts["corrupt"]:
        held = counted(facts["corrupt"], "damaged or outdated kernel")
        text = f"{place} holds {held}; each is compiled again when it is needed"
        return warn("cache", text, _emptied(place))
    if kind in NETWORK:
        text = f"{place} lies on a network file system ({kind}): slow to start, and a hang of the server hangs the run"
        return warn("cache", text, _elsewhere(facts))
    return None


def _good(facts: dict[str, Any]) -> Finding:
    held = f"{counted(facts['entries'], 'kernel')}, {amount(facts['bytes'])}" if facts["entries"] else "empty"
    return ok("cache", f"{facts['place']} ({held}, mode {facts['mode']:04o})")


def _costs(facts: dict[str, Any]) -> str:
    """What it costs that the cache cannot be used."""
    if facts["runnable_others"] or (facts["others"] and facts["memory"]):
        return "every process compiles its kernels again"
    return "kernels can be kept nowhere, and the ops run on the slow reference"


def _level(facts: dict[str, Any]) -> Any:
    return warn if _costs(facts).startswith("every process") else fail


def _elsewhere(facts: dict[str, Any]) -> str:
    """A place of the user's own. Where the variable names a bad one, the default may do."""
    if facts["named"] and facts["home"] not in ("", "/"):
        return "unset LOWBIT_LIGHTNING_CACHE"
    place = next((p for p in facts["runnable_others"] if p != "/dev/shm"), "/dev/shm")
    return f"mkdir -m 700 -p {place}/lowbit-$(id -u) && export LOWBIT_LIGHTNING_CACHE={place}/lowbit-$(id -u)"


def _emptied(place: str) -> str:
    """It deletes kernels only: the folder may be one that holds other things."""
    return f"find {shlex.quote(place)} -maxdepth 1 -type f \\( -name '*.so' -o -name '*.cubin' \\) -delete"
