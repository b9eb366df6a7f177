"""How long something takes on this device: measured once, by one rank, and kept beside the compiled kernels."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
    """The result of ``find`` on rank 0, for all ranks. They call this together. If it raises, all of them raise."""
    ranks = torch.distributed
    if not (ranks.is_available() and ranks.is_initialized()):
        return find()
    answer: list[Any] = [None, None]  # the result, and what it failed with
    failure: Exception | None = None
    if ranks.get_rank() == 0:
        try:
            answer[0] = find()
        except Exception as error:
            failure, answer[1] = error, f"{type(error).__name__}: {error}"
    ranks.broadcast_object_list(answer, src=0)  # in any case: the others wait for it
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise RuntimeError(f"rank 0 failed: {answer[1]}")
    return answer[0]
