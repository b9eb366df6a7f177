"""Builds of the CPU backend for other processors than this one."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest


def require(build: str, features: set[str]) -> None:
    """Skip the test unless this is an x86 processor with the features (as in /proc/cpuinfo) that the build needs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{build} is a build for x86; this is {platform.machine()}")
    lacking = features - set(Path("/proc/cpuinfo").read_text().split())
    if lacking:
        pytest.skip(f"this processor cannot run the build for {build}: it lacks {sorted(lacking)}")
