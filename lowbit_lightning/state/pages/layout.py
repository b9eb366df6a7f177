"""The place of every state in the slab, and which states are copied together.

Parameters lie one after another in the order of the step, each with all its states. A *chunk* holds as many consecutive
parameters as fit. A parameter that is larger than a chunk is cut into *spans* of elements. Each span is a chunk of its
own, so that all states of an element are copied together. In the slab every state is contiguous, also that of a cut
parameter. The first chunks, up to the budget, are *resident*: they stay in near memory.

Each part has the same offset modulo 4096 in near memory and in the slab, because direct I/O requires that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm, prod
from typing import NamedTuple

import torch

from lowbit_lightning.kernels.formats import Span

CHUNK = 32 << 20
"""Bytes of a chunk if states are large. Copies of this size reach the link's speed."""
RING = 3
SMALLEST = 64 << 10
"""Chunks are not made smaller than this, in bytes, to get enough of them for the ring."""
_SHARE = 8
"""Streamed states make at least this many chunks, unless chunks would become smaller than ``SMALLEST``."""
_PAGE, _ALIGNED = 4096, 256
_FINE = 8
"""A parameter is cut at pages of the slab if a chunk then has at least this many places for a cut."""


class Want(NamedTuple):
    """What a parameter needs in the slab: its ``shape``, and the name and dtype of each state. It may be cut before
    elements whose index is a multiple of ``unit``."""

    shape: tuple[int, ...]
    dtypes: tuple[tuple[str, torch.dtype], ...]
    unit: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def nbytes(self, numel: int) -> int:
        """Bytes of ``numel`` elements of all states, with each state aligned."""
        return sum(_up(numel * dtype.itemsize) for _, dtype in self.dtypes)


class Placed(NamedTuple):
    """A part of a parameter in a chunk.

    ``want``: the parameter's number. ``far``, ``near``: the first byte of each state in the slab and in the chunk's
    near memory.
    """

    want: int
    span: Span
    far: tuple[int, ...]
    near: tuple[int, ...]


@dataclass
class ChunkPlan:
    resident: bool
    placed: list[Placed] = field(default_factory=list)
    nbytes: int = 0
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    """Far offset, near offset and bytes of each run that is contiguous in both."""

    def add(self, want: int, span: Span, far: list[int], sizes: list[int], padded: bool) -> None:
        """``sizes``: bytes of each state. ``padded``: the bytes up to the next state are copied too."""
        near = []
        for offset, size in zip(far, sizes, strict=True):
            first = self.nbytes + (offset - self.nbytes) % _PAGE
            length = _up(size) if padded else size
            near.append(first)
            if self.moves and _end(self.moves[-1]) == (offset, first):
                first_far, first_near, before = self.moves.pop()
                self.moves.append((first_far, first_near, before + length))
            else:
                self.moves.append((offset, first, length))
            self.nbytes = first + _up(size)
        self.placed.append(Placed(want, span, tuple(far), tuple(near)))


class Layout(NamedTuple):
    chunks: list[ChunkPlan]
    places: list[tuple[int, ...]]
    """The first byte of each state in the slab, for each parameter."""
    nbytes: int

    @property
    def ring(self) -> list[int]:
        """Bytes of the buffers that streamed chunks use in turn."""
        streamed = [chunk.nbytes for chunk in self.chunks if not chunk.resident]
        return [max(streamed[slot::RING]) for slot in range(min(RING, len(streamed)))]

    @property
    def resident(self) -> int:
        """Bytes of the chunks that stay in near memory."""
        return sum(chunk.nbytes for chunk in self.chunks if chunk.resident)

    @property
    def near_bytes(self) -> int:
        return sum(self.ring) + self.resident


def lay_out(wants: Sequence[Want], resident: int, limit: int = CHUNK) -> Layout:
    """A layout with chunks of at most ``limit`` bytes, unless a single unit is larger. At most ``resident`` bytes are
    resident. Streamed chunks are made smaller if there would be few of them."""
    streamed = max(0, sum(want.nbytes(want.numel) for want in wants) - resident)
    return _Builder(limit, min(limit, max(SMALLEST, -(-streamed // _SHARE))), resident).build(wants)


class _Builder:
    """``ring``: most bytes of a streamed chunk. ``limit``: most bytes of a resident one. ``left``: unused bytes of the
    budget."""

    def __init__(self, limit: int, ring: int, resident: int) -> None:
        self.limit, self.ring, self.left, self.far = limit, ring, resident, 0
        self.chunks: list[ChunkPlan] = []
        self.full = True  # whether the last chunk takes no more

    def build(self, wants: Sequence[Want]) -> Layout:
        places = [self._place(number, want) for number, want in enumerate(wants)]
        return Layout(self.chunks, places, _up(self.far, _PAGE))

    def _place(self, number: int, want: Want) -> tuple[int, ...]:
        total, uncut = want.nbytes(want.numel), want.unit >= want.numel
        if total > self.left and (uncut or not self._elements(want, self._room())):
            self.left = 0
        return self._whole(number, want) if uncut or total <= self._room() else self._cut(number, want)

    def _room(self) -> int:
        """Bytes of a new chunk."""
        return min(self.limit, self.left) if self.left else self.ring

    def _whole(self, number: int, want: Want) -> tuple[int, ...]:
        total = want.nbytes(want.numel)
        same = bool(self.chunks) and self.chunks[-1].resident == (self.left > 0)
        limit = self.limit if self.left else self.ring
        if self.full or not same or self.chunks[-1].nbytes + total > limit:
            self._next_chunk()
        far = self._far_of(want)
        self._add(number, want, Span(0, want.numel), far)
        return far

    def _cut(self, number: int, want: Want) -> tuple[int, ...]:
        far: tuple[int, ...] = ()
        start, aligned = 0, want._replace(unit=lcm(want.unit, _PAGE))
        if self._elements(aligned, self.ring) >= _FINE * aligned.unit:
            want = aligned  # all pieces are whole pages of the slab: a disk has no ragged ends to read and write
        while start < want.numel:
            if not self._elements(want, self._room()):
                self.left = 0
            self._next_chunk()
            far = far or self._far_of(want, _PAGE)
            most = max(want.unit, self._elements(want, self._room()))
            if not self.left:  # pieces of equal size
                count = -(-(want.numel - start) // most)
                most = _up(-(-(want.numel - start) // count), want.unit)
            stop = min(want.numel, start + most)
            self._add(number, want, Span(start, stop), far)
            start = stop
        self.full = True
        return far

    def _next_chunk(self) -> None:
        self.far = _up(self.far, _PAGE)
        self.chunks.append(ChunkPlan(resident=self.left > 0))
        self.full = False

    def _elements(self, want: Want, room: int) -> int:
        """How many elements fit into ``room`` bytes: a multiple of the unit."""
        each = sum(dtype.itemsize for _, dtype in want.dtypes)
        return max(0, room - _PAGE * (1 + len(want.dtypes))) // each // want.unit * want.unit

    def _far_of(self, want: Want, to: int = _ALIGNED) -> tuple[int, ...]:
        """A place in the slab for the whole parameter, with each state at a multiple of ``to``."""
        offsets = []
        for _, dtype in want.dtypes:
            offsets.append(self.far)
            self.far += _up(want.numel * dtype.itemsize, to)
        return tuple(offsets)

    def _add(self, number: int, want: Want, span: Span, far: tuple[int, ...]) -> None:
        sizes = [dtype.itemsize for _, dtype in want.dtypes]
        chunk, before = self.chunks[-1], self.chunks[-1].nbytes
        first = [offset + span.start * size for offset, size in zip(far, sizes, strict=True)]
        length = span.length
        chunk.add(number, span, first, [length * size for size in sizes], padded=length == want.numel)
        if chunk.resident:
            self.left = max(0, self.left - (chunk.nbytes - before))


def _up(nbytes: int, to: int = _ALIGNED) -> int:
    return -(-nbytes // to) * to


def _end(move: tuple[int, int, int]) -> tuple[int, int]:
    far, near, nbytes = move
    return far + nbytes, near + nbytes
