"""How long something takes on this device: measured once, by one rank, and kept beside the compiled kernels."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lowbit_lightning.kernels.compile import cache

T = TypeVar("T")


def remembered(kind: str, *described: object, measure: Callable[[], Sequence[float]]) -> list[float]:
    """Numbers for what ``described`` says, which must fit into JSON: kept from an earlier run, or measured now."""
    text = json.dumps([1, torch.__version__, *described])
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    entry = cache.find(name)
    if entry is not None:
        return json.loads(cache.body(entry))
    measured = list(measure())
    cache.store(name, json.dumps(measured).encode())
    return measured


def shortest(
    runs: Sequence[Callable[[], object]], device: torch.device, rounds: int, seconds: float, least: int = 2
) -> list[float]:
    """The shortest time of each run in seconds, over rounds in which they take turns.

    After ``least`` rounds, none begins later than ``seconds`` after the first. One thread is timed on a CPU: if threads
    wait for each other, other programs decide how long a run takes.
    """
    best = [float("inf")] * len(runs)
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        for number in range(rounds):
            if number >= least and time.perf_counter() - start > seconds:
                break
            best = [min(known, _once(run, device)) for known, run in zip(best, runs, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return best


def _once(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def agreed(find: Callable[[], T]) -> T:
    """The result of ``find`` on rank 0, for all ranks. They call this together."""
    ranks = torch.distributed
    if not (ranks.is_available() and ranks.is_initialized()):
        return find()
    answer = [find() if ranks.get_rank() == 0 else None]
    ranks.broadcast_object_list(answer, src=0)
    assert answer[0] is not None
    return answer[0]
