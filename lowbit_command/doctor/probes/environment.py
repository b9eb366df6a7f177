"""This package's environment variables, and the folder of page files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn
from lowbit_command.doctor.read import free, mount_of
from lowbit_command.units import amount

BARE = True
LIMIT = 10.0
PREFIX = "LOWBIT_LIGHTNING_"
KNOWN = ("BACKEND", "CACHE", "PAGES")
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


def gather() -> dict[str, Any]:
    from lowbit_lightning import kernels as package

    kernels = Path(package.__path__[0])
    pages = os.environ.get(f"{PREFIX}PAGES", "")
    return {
        "set": {name.removeprefix(PREFIX): value for name, value in os.environ.items() if name.startswith(PREFIX)},
        "backends": sorted(path.parent.name for path in kernels.glob("*/blockwise.py")),
        "pages_exist": os.path.isdir(pages) if pages else None,
        "pages_writable": os.access(pages, os.W_OK) if pages else None,
        "pages_kind": mount_of(pages)[1] if pages else "",
        "pages_free": free(pages)[0] if pages else 0,
    }


def judge(facts: dict[str, Any]) -> list[Finding]:
    told = facts["set"]
    unknown = sorted(set(told) - set(KNOWN))
    found = [
        warn("environment", f"{PREFIX}{name} is set, but nothing reads it", f"unset {PREFIX}{name}") for name in unknown
    ]
    found += _backend(told.get("BACKEND", ""), facts["backends"])
    if told.get("PAGES"):
        found.append(_pages(told["PAGES"], facts))
    if found and any(finding.level != "OK" for finding in found):
        return found
    said = ", ".join(f"{PREFIX}{name}={told[name]}" for name in KNOWN if told.get(name))
    return [ok("environment", said or f"none of {', '.join(PREFIX + name for name in KNOWN)} is set")]


def _backend(asked: str, backends: list[str]) -> list[Finding]:
    if not asked:
        return []
    if asked not in backends:
        text = f"{PREFIX}BACKEND={asked!r} is not one of {', '.join(backends)}: every op raises an error"
        return [fail("environment", text, f"unset {PREFIX}BACKEND")]
    costs = "every op runs on the slow plain-torch reference" if asked == "reference" else f"every op runs on {asked}"
    return [warn("environment", f"{PREFIX}BACKEND={asked}: {costs}", f"unset {PREFIX}BACKEND")]


def _pages(folder: str, facts: dict[str, Any]) -> Finding:
    name = f"{PREFIX}PAGES={folder}"
    command = f'export {PREFIX}PAGES="$(mktemp -d -p /var/tmp)"'
    if not facts["pages_exist"]:
        return fail("environment", f'{name} does not exist: paged="disk" fails', f"mkdir -p {folder}")
    if not facts["pages_writable"]:
        return fail("environment", f'{name} cannot be written: paged="disk" fails', command)
    if facts["pages_kind"] in _IN_MEMORY:
        return fail("environment", f'{name} lies in memory ({facts["pages_kind"]}): paged="disk" refuses it', command)
    return ok("environment", f"{name}, {amount(facts['pages_free'])} free")
