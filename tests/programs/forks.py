"""Starts programs quickly: imports what all of them import, once, and forks a process for each that is asked for.

Reads a line of JSON a program: its path and arguments, environment, folder, and a file for what it prints. Writes the
process's id, and the exit status when it has ended. ``support/run_program.py`` is at the other end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from typing import Any

import lightning.pytorch  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401


def become(asked: dict[str, Any]) -> None:
    """The program, in a process group of its own, as if an interpreter had just started with it."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(asked["output"], os.O_WRONLY | os.O_APPEND)
    for there, here in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(there, here)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    gc.freeze()
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return become(json.loads(line))
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
