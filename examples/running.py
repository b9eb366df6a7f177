"""What the examples share: a quiet Lightning, the peak of memory, where results go, and the exit status."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def quiet() -> None:
    """Leaves out what Lightning says of every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6.6 with torch 2.13


class Peak:
    """The most memory that is held from now on: by this process (Linux), or on the GPU.

    ``ru_maxrss`` would not do: it begins with what the program held that started this one.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def bytes(self) -> int | None:
        """None where the system doesn't tell."""
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def save(folder: Path, args: argparse.Namespace, report: str, name: str, **results: Any) -> None:
    """``report`` as a file of that name, and results.json with the arguments of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(report)
    settings = {key: str(value) for key, value in vars(args).items()}
    (folder / "results.json").write_text(json.dumps({"settings": settings, **results}, indent=1))


def status(failures: Sequence[str]) -> int:
    """The exit status of a program: 1 with failures, which are printed."""
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
