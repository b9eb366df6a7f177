"""Traffic of a kernel, from the addresses that the emulator (``tests/emulator``) sees each thread use.

A warp's lanes access memory together: what they ask for in one instruction is a request. Of global memory it moves
sectors of 32 bytes; of shared memory it takes as many turns as the fullest of 32 banks needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SECTOR, LINE, LANES, WORD = 32, 128, 32, 4


@dataclass(frozen=True)
class Traffic:
    """``sectors``: that requests move; ``needed``: that the bytes they want would fill, side by side. ``turns``: of
    shared memory; ``free``: turns without any conflict. ``bytes``: distinct bytes of global memory."""

    sectors: int = 0
    needed: int = 0
    turns: int = 0
    free: int = 0
    bytes: int = 0

    @property
    def excess(self) -> float:
        """Sectors moved over sectors needed; 1 is the least."""
        return self.sectors / self.needed if self.needed else 1.0

    @property
    def conflicts(self) -> float:
        """Turns of shared memory over those without conflicts; 1 is the least."""
        return self.turns / self.free if self.free else 1.0


def traffic(records: Iterable[np.ndarray]) -> Traffic:
    """Of launches that the emulator recorded (``emulator.module.RECORD``), one array each."""
    parts = [_of_launch(one) for one in records]
    return Traffic(*(sum(getattr(part, name) for part in parts) for name in Traffic.__dataclass_fields__))


def _of_launch(records: np.ndarray) -> Traffic:
    shared = records["shared"]
    sectors, needed = _global(records[~shared])
    turns, free = _shared(records[shared])
    return Traffic(sectors, needed, turns, free, _distinct_bytes(records[~shared]))


def _requests(records: np.ndarray) -> np.ndarray:
    """The number of each access's request: lanes of a warp that execute one instruction for the n-th time."""
    warp = records["thread"].astype(np.int64) // LANES
    place = (records["pc"].astype(np.int64) << 32) | (records["block"].astype(np.int64) << 6) | warp
    _, place = np.unique(place, return_inverse=True)
    mine = place * LANES + records["thread"] % LANES
    order = np.argsort(mine, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(mine[order]) != 0])
    counts = np.diff(np.r_[starts, len(order)])
    turn = np.empty(len(order), np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(starts, counts)
    _, request = np.unique(place * (turn.max() + 1) + turn, return_inverse=True)
    return request


def _pairs(request: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Distinct (request, unit) of units ``first`` to ``last`` of each access; an access spans a few at most."""
    found = [np.stack((request, first), 1)]
    for step in range(1, int((last - first).max(initial=0)) + 1):
        more = first + step <= last
        found.append(np.stack((request[more], first[more] + step), 1))
    return np.unique(np.concatenate(found), axis=0)


def _global(records: np.ndarray) -> tuple[int, int]:
    if not len(records):
        return 0, 0
    request, start = _requests(records), records["address"].astype(np.int64)
    end = start + records["bytes"] - 1
    sectors = len(_pairs(request, start // SECTOR, end // SECTOR))
    distinct = _pairs(request, start, end)
    wanted = np.bincount(distinct[:, 0])
    return sectors, int(np.sum(-(-wanted // SECTOR)))


def _shared(records: np.ndarray) -> tuple[int, int]:
    """Accesses of 8 bytes are served to half a warp at a time, those of 16 to a quarter."""
    if not len(records):
        return 0, 0
    width = np.maximum(records["bytes"].astype(np.int64), WORD)
    share = records["thread"] % LANES // (LINE // width)
    request = _requests(records) * LANES + share
    start = records["address"].astype(np.int64)
    words = _pairs(request, start // WORD, (start + records["bytes"] - 1) // WORD)
    _, number = np.unique(words[:, 0], return_inverse=True)
    banks = np.zeros((number.max() + 1, LANES), np.int64)
    np.add.at(banks, (number, words[:, 1] % LANES), 1)
    return int(banks.max(1).sum()), int(np.sum(-(-banks.sum(1) // LANES)))


def _distinct_bytes(records: np.ndarray) -> int:
    start = records["address"].astype(np.int64)
    return len(np.unique(np.concatenate([start[records["bytes"] > k] + k for k in range(16)]))) if len(start) else 0
