"""The program of a child process: ``python child.py PROBE`` prints a probe's facts.

It makes ``lowbit_lightning`` known without running its ``__init__``, which imports Lightning and torch: what they do
wrong must not hide what else is wrong. ``BARE`` probes do without torch; for these the kernels' ``__init__``, which
imports it, is left out too.

Results are lines of JSON after ``MARK``; whatever else libraries print is ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

MARK = "\x1elowbit-doctor "
ROOT = Path(__file__).resolve().parents[2]


def tell(value: Any) -> None:
    """Hand a value to the parent."""
    print(MARK + json.dumps(value), flush=True)


def without_init(names: Iterable[str]) -> None:
    """Make packages importable whose ``__init__`` is not to run."""
    for name in names:
        module = ModuleType(name)
        module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = module


def main(arguments: list[str]) -> None:
    module, *told = arguments
    without_init(["lowbit_lightning"])
    found = import_module(f"lowbit_command.doctor.{module}")
    if getattr(found, "BARE", False):
        without_init(["lowbit_lightning.kernels"])
    for value in found.results(*told) if hasattr(found, "results") else [found.gather()]:
        tell(value)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose files would hide libraries of the same names
    main(sys.argv[1:])
