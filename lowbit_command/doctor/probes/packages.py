"""Versions of packages, and whether they are those that this one needs."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok, warn

BARE = True
LIMIT = 10.0
OURS = "lowbit-lightning"
NEEDED = ("torch", "lightning", "torchmetrics", "omegaconf", "jsonargparse", "numpy", "safetensors")
SHOWN = (
    *NEEDED,
    *("cuda-core", "cuda-bindings", "deepspeed", "transformers", "accelerate", "peft", "bitsandbytes", "torchao"),
    *("pytorch-lightning", "triton", "matplotlib"),
)


def gather() -> dict[str, Any]:
    versions = {name: _version(name) for name in (OURS, *SHOWN)}
    return {"versions": versions, "requires": _requirements(), "unfit": _unfit(versions)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """What this package asks for, without extras; empty where it runs from a checkout."""
    try:
        return [line for line in metadata.requires(OURS) or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return []


def _unfit(versions: dict[str, str | None]) -> list[list[str]]:
    """[name, version or "", requirement] of each package that is missing or of a wrong version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return []
    found = []
    for line in _requirements():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate():
            continue
        version = versions.get(need.name) or _version(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            found.append([need.name, version or "", f"{need.name}{need.specifier}"])
    return found


def judge(facts: dict[str, Any]) -> list[Finding]:
    versions, findings = facts["versions"], []
    said = ", ".join(f"{name} {versions[name]}" for name in SHOWN if versions.get(name))
    missing = [name for name in NEEDED if not versions.get(name)]
    unfit = {name: (version, need) for name, version, need in facts["unfit"]}
    for name in missing:
        unfit.setdefault(name, ("", name))
    if unfit:
        wrong = ", ".join(f"{name} {v or 'is missing'} (needs {need})" for name, (v, need) in unfit.items())
        command = "pip install " + " ".join(f"'{need}'" for _, need in unfit.values())
        findings.append(fail("packages", wrong, command))
    else:
        findings.append(ok("packages", f"{OURS} {versions.get(OURS) or 'from a checkout'}, {said}"))
    pair = versions.get("cuda-bindings"), versions.get("cuda-core")
    if pair[0] and not pair[1]:
        findings.append(
            warn(
                "packages",
                "cuda-bindings is installed without cuda-core, which the GPU kernels need",
                "pip install 'cuda-core>=1.2,<2'",
            )
        )
    if versions.get("pytorch-lightning") and not versions.get("lightning"):
        text = "pytorch_lightning has its own copies of Lightning's classes, which this package does not extend"
        findings.append(warn("packages", text, "pip install lightning"))
    return findings
