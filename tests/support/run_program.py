"""Starting the programs in ``tests/programs``, and reading what their ranks found wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"


def surroundings() -> dict[str, str]:
    """The environment of a program: it finds the package and what tests share, and computes with one thread."""
    found = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}


def run(program: str | Path, *arguments: Any, timeout: float = 280, **environment: str) -> str:
    """What it prints. It has a process group of its own, which ends with it, and needs no installed package."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**surroundings(), **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-4000:]
    return output


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files that ranks wrote, by their names: ``ROUND.RANK``, or ``RANK`` alone."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def check(name: str, by_rank: Iterable[dict[str, Any]]) -> None:
    for rank, found in enumerate(by_rank):
        assert name in found, f"rank {rank} did not get there: {[v for v in found.values() if v]}"
        assert found[name] is None, f"rank {rank}: {found[name]}"
