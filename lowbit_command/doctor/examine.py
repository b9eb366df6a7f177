"""Runs the probes beside each other, and judges what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lowbit_command.doctor import children, coverage
from lowbit_command.doctor.children import Died
from lowbit_command.doctor.finding import FAIL, OK, Finding, fail, warn

PROBES = ("system", "packages", "torch", "compiler", "gpu", "nvrtc", "cache", "limits", "environment")
"""In the order of their lines."""
SLOWEST_FIRST = ("torch", "compiler", "nvrtc")
EXPLAIN = ("torch", "compiler", "GPU driver", "NVRTC", "cache", "environment")
"""Subjects whose findings say why an op runs on the reference."""
Gather = Callable[[Sequence[str], float], Any]


@dataclass(frozen=True)
class Examination:
    """``facts`` by probe; ``devices``: the rows of the table of op x device, as ``coverage.results`` gives them."""

    findings: list[Finding]
    facts: dict[str, Any]
    devices: list[dict[str, Any]]


def examine(gather: Gather = children.result, probes: Sequence[str] = PROBES, ops: bool = True) -> Examination:
    """All probes' findings. ``gather(arguments, limit)`` observes: what a child tells, or ``Died``. ``ops``: also make
    the table of op x device."""
    modules = {name: import_module(f"lowbit_command.doctor.probes.{name}") for name in probes}
    order = sorted(probes, key=lambda name: name not in SLOWEST_FIRST)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        table = pool.submit(gather, ["coverage"], coverage.LIMIT) if ops else None
        asked = {name: pool.submit(gather, [f"probes.{name}"], modules[name].LIMIT) for name in order}
        facts = {name: asked[name].result() for name in probes}
    findings = [
        finding
        for name, found in facts.items()
        for finding in ([died(name, found)] if isinstance(found, Died) else modules[name].judge(found))
    ]
    devices = table.result() if table else []
    if isinstance(devices, Died):
        findings += [] if any(f.level == FAIL and f.subject == "torch" for f in findings) else [died("ops", devices)]
        devices = []
    if not any(f.level != OK and f.subject in EXPLAIN for f in findings):
        slow = [device for device in devices if device["why"]]
        findings += [warn("ops", f"{device['device']}: {device['why']}", "lowbit doctor --full") for device in slow]
    return Examination(findings, {k: vars(v) if isinstance(v, Died) else v for k, v in facts.items()}, devices)


def died(name: str, found: Died) -> Finding:
    """What it means that a probe gave no answer."""
    detail = f": {found.said}" if found.said else ""
    text = f"the probe {found.why}{detail}"
    if name == "gpu" and found.hung:
        return fail("GPU driver", f"{text}: the driver hangs", "sudo dmesg | grep -iE 'nvrm|xid' | tail")
    if name == "cache" and found.hung:
        command = 'export LOWBIT_LIGHTNING_CACHE="/var/tmp/lowbit_lightning-$(id -u)"'
        return fail("cache", f"{text}: the file system of the cache hangs", command)
    if name == "torch":
        return fail("torch", f"importing torch {found.why}{detail}", "pip install --force-reinstall torch")
    if name == "ops":
        return fail("ops", f"trying the ops {found.why}{detail}", "lowbit doctor --full")
    return fail(name, f"the probe {found.why}{detail}", f"python {children.PROGRAM} probes.{name}")
