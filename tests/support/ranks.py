"""What the programs here share: they fork ranks, which join a gloo group, run checks, compare states and write down
what each check found wrong."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def fork(main: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """``main(rank, *arguments)`` in each rank. From a process that computes nothing yet this is quick, and no thread of
    OpenMP is lost on the way."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that resolves to nowhere does no harm
    mp.start_processes(main, arguments, nprocs=ranks, start_method="fork")


def join(rank: int, ranks: int, store: Path) -> None:
    """``store``: a file of the group's own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = dist.FileStore(str(store), ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=found, timeout=timedelta(seconds=60))


def write_outcomes(path: Path, checks: Iterable[Callable[..., str | None]], *arguments: Any) -> None:
    """JSON: for each check the first thing that is wrong, or null."""
    results: dict[str, str | None] = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            results[check.__name__] = check(*arguments)
        except Exception:
            results[check.__name__] = traceback.format_exc()
            break  # the ranks are out of step now
    path.write_text(json.dumps(results))


def differences(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> Iterator[str]:
    """Between tensors by two names, to the bit."""
    if a.keys() != b.keys():
        yield f"not in both: {sorted(a.keys() ^ b.keys())}"
    for name in sorted(a.keys() & b.keys()):
        if a[name].keys() != b[name].keys():
            yield f"{name}: not in both: {sorted(a[name].keys() ^ b[name].keys())}"
        for key in sorted(a[name].keys() & b[name].keys()):
            x, y = a[name][key], b[name][key]
            if x.dtype != y.dtype or x.shape != y.shape:
                yield f"{name} {key}: {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
            elif not torch.equal(x, y):
                yield f"{name} {key}: {int((x != y).sum())} of {x.numel()} elements differ"


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> str | None:
    return next(differences(a, b), None)
