"""Runs ``child.py``, with a time limit: what hangs, crashes or exits early is told, not suffered."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_command.doctor.child import MARK

PROGRAM = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Died:
    """A child that gave no answer. ``why``: ``"crashed (SIGSEGV)"``; ``said``: the end of its stderr."""

    why: str
    said: str = ""
    hung: bool = False


def results(arguments: Sequence[str], limit: float) -> Iterator[Any]:
    """The values that a child tells, each within ``limit`` seconds of the one before; a last ``Died`` if it failed."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=os.name == "posix",  # a compiler that it started ends with it
    )
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: said.append(line or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        deadline = time.monotonic() + limit
        while True:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                break
            _, mark, told = line.partition(MARK)
            if mark:
                yield json.loads(told)
                deadline = time.monotonic() + limit
        status = process.wait(timeout=max(0.1, deadline - time.monotonic()))
        readers[1].join(1)
        if status:
            yield Died(_ended(status), _tail(said))
    except (queue.Empty, subprocess.TimeoutExpired):
        yield Died(f"gave no answer in {limit:.0f} s", _tail(said), hung=True)
    finally:
        _end(process)


def result(arguments: Sequence[str], limit: float) -> Any:
    """The one value that a child tells, or ``Died``."""
    found: Any = Died("told nothing")
    for value in results(arguments, limit):
        found = value
    return found


def _read(stream: Any, put: Any) -> None:
    with stream:
        for line in stream:
            put(line)
    put(None)


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"crashed ({signal.Signals(-status).name})"
    except ValueError:
        return f"crashed (signal {-status})"


def _tail(said: list[str]) -> str:
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1][:300] if lines else ""


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    # One in a system call that does not end, such as a hung driver's, can only be left behind.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)
