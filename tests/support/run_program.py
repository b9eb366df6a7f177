"""Starting the programs in ``tests/programs``, and reading what their ranks found wrong.

A process that imports torch and Lightning computes for seconds before it begins. So one process
(``programs/forks.py``) imports them once, and becomes each program in a fork.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"


def surroundings() -> dict[str, str]:
    """The environment of a program: it finds the package and what tests share, and computes with one thread."""
    found = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}


@functools.cache
def _forks() -> Any:
    """It ends when this process does."""
    server = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env=surroundings(),
    )
    atexit.register(server.communicate)
    return server


def status_of(program: str | Path, *arguments: Any, timeout: float = 280, **environment: str) -> tuple[int, str]:
    """Exit status (minus the signal that ended it) and what it prints, of a process with a group of its own, which
    ends with it. The variables are set before the program begins, but torch is imported by then."""
    command = [str(PROGRAMS / program), *map(str, arguments)]
    server = _forks()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        asked = {"command": command, "environment": {**surroundings(), **environment}}
        asked |= {"folder": os.getcwd(), "output": output.name}
        server.stdin.write(json.dumps(asked).encode() + b"\n")
        process = int(server.stdout.readline())
        ended = False
        try:
            ended = bool(select.select([server.stdout], [], [], timeout)[0])
            if not ended:
                raise subprocess.TimeoutExpired(command, timeout)
        finally:
            if not ended:
                os.killpg(process, signal.SIGKILL)
            status = int(server.stdout.readline())
        return status, output.read()


def run(program: str | Path, *arguments: Any, timeout: float = 280, **environment: str) -> str:
    """What a program prints that succeeds."""
    status, output = status_of(program, *arguments, timeout=timeout, **environment)
    assert status == 0, output[-4000:]
    return output


def run_afresh(program: str | Path, *arguments: Any, timeout: float = 280, **environment: str) -> str:
    """The same in a new interpreter, for a program whose memory is counted, or that tells malloc how to work."""
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**surroundings(), **environment},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files that ranks wrote, by their names: ``ROUND.RANK``, or ``RANK`` alone."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def check(name: str, by_rank: Iterable[dict[str, Any]]) -> None:
    for rank, found in enumerate(by_rank):
        assert name in found, f"rank {rank} did not get there: {[v for v in found.values() if v]}"
        assert found[name] is None, f"rank {rank}: {found[name]}"
