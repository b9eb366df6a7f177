"""The pager keeps some pages resident in near memory, and streams the others through a ring of near buffers.

A step touches every state once, in a fixed order. A cache would miss every page, since LRU evicts the page that comes
next. So the first chunks always stay in near memory, and each other chunk has its slot in a ring of three buffers.
While kernels work on one chunk, the chunk before is stored, and the next two are fetched. The last step tells which
chunk comes next. At the end of a step the first chunks of the next step are fetched, while the last ones are still
being stored. Both overlap the next forward and backward.

Every near buffer has *one chain of events*: each action on the buffer waits for the last action on it. A chunk always
uses the same buffer, so that the chain also orders the accesses to its place in the slab. There are no other rules:

* a fetch into a buffer runs after the last event of the buffer,
* kernels on a buffer run after its last event,
* a store runs after the kernels,
* before the host touches the slab, data that is only in near memory is stored, and the host waits for all chains.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.kernels.formats import Span
from lowbit_lightning.state.pages import layout
from lowbit_lightning.state.pages.layout import RING, Want
from lowbit_lightning.state.pages.statistics import PageStatistics
from lowbit_lightning.state.pages.transport import Event, Moves, Transport

_STALL = 1e-4  # seconds from which a wait counts as a stall


@dataclass(eq=False)
class Slot:
    """A near buffer, the moves of the chunk that it holds, and the last event of its chain."""

    memory: Tensor
    holds: Moves | None = None
    last: Event | None = None
    unsaved: bool = False
    """Whether kernels have changed its content since it was stored."""


@dataclass(eq=False)
class Chunk:
    """Parts that are copied together."""

    index: int
    slot: Slot
    moves: Moves
    resident: bool


class Piece(NamedTuple):
    """A part of a parameter's states by name, as flat tensors. They are valid while the chunk is near."""

    chunk: Chunk
    span: Span
    states: dict[str, Tensor]


class Pager:
    """Keeps states of parameters in the slab of a transport, and brings them into near memory for their step.

    Args:
        transport: owned by the pager; ``close`` closes it.
        wants: what each parameter keeps in the slab, in the order of the step.
        resident: bytes that stay in near memory.
        chunk: most bytes of a chunk, unless a single row of a parameter is larger.

    ``far[i][name]`` are the states of parameter i in the slab, as CPU tensors. They are up to date after ``settle()``
    and until the next ``near()``. ``pieces[i]`` are the same states in chunks.
    """

    def __init__(
        self, transport: Transport, wants: Sequence[Want], resident: int = 0, chunk: int | None = None
    ) -> None:
        self.transport, self.wants, self._process = transport, tuple(wants), os.getpid()
        plan = layout.lay_out(self.wants, resident, layout.CHUNK if chunk is None else chunk)
        self._slab = transport.allocate(plan.nbytes)
        self.far = [
            {
                name: _view(self._slab, first, dtype, want.shape)
                for (name, dtype), first in zip(want.dtypes, firsts, strict=True)
            }
            for want, firsts in zip(self.wants, plan.places, strict=True)
        ]
        self.chunks = self._make_chunks(plan)
        self.pieces = self._make_pieces(plan.chunks)
        streamed = [chunk for chunk in self.chunks if not chunk.resident]
        self.statistics = PageStatistics(
            far_bytes=plan.nbytes,
            resident_bytes=plan.resident,
            near_bytes=plan.near_bytes,
            stalls_on_host=transport.device.type == "cpu",
        )
        self._order, self._visited = streamed, list[Chunk]()  # of the last step, and so far of this one
        self._next = 0  # where in that order this step goes on
        self._open: Chunk | None = None
        self._changes = False  # whether kernels change the open chunk
        self._opened_at = 0.0
        self._stepping = False  # whether anything was near since the last end of a step
        self._settled = True  # nothing is near
        self._written = 0  # bytes, by the host, since the slab was last trimmed
        self._closed = False

    def _make_chunks(self, plan: layout.Layout) -> list[Chunk]:
        ring = [Slot(self.transport.buffer(size)) for size in plan.ring]
        self._slots, chunks, streamed = list(ring), list[Chunk](), 0
        for index, planned in enumerate(plan.chunks):
            if planned.resident:
                slot = Slot(self.transport.buffer(planned.nbytes))
                self._slots.append(slot)
            else:
                slot = ring[streamed % RING]
                streamed += 1
            parts = tuple((slot.memory[near : near + nbytes], far) for far, near, nbytes in planned.moves)
            chunks.append(Chunk(index, slot, Moves(parts), planned.resident))
        return chunks

    def _make_pieces(self, plans: list[layout.ChunkPlan]) -> list[list[Piece]]:
        pieces: list[list[Piece]] = [[] for _ in self.wants]
        for chunk, plan in zip(self.chunks, plans, strict=True):
            for part in plan.placed:
                count = part.span.length
                states = {
                    name: chunk.slot.memory[first : first + count * dtype.itemsize].view(dtype)
                    for (name, dtype), first in zip(self.wants[part.want].dtypes, part.near, strict=True)
                }
                pieces[part.want].append(Piece(chunk, part.span, states))
        return pieces

    # -- a step ------------------------------------------------------------------------------------------------------

    def near(self, chunk: Chunk, changes: bool = True) -> None:
        """Bring ``chunk`` near for the kernels that are launched from now on, until the next call for another chunk.

        ``changes``: whether the kernels change it.
        """
        self._check_process()
        if self._open is not chunk:
            self._leave()
            self._opened_at = perf_counter()
            if self._settled:
                self._settled = False
                self.transport.trim()
                for resident in (c for c in self.chunks if c.resident):
                    self._send_for(resident)
            self._send_for(chunk)
            if not chunk.resident:
                self._follow(chunk)
            self._look_ahead(chunk)
            self._changes = False
        self._wait(chunk.slot)  # an open one too: these kernels may be launched from another stream
        self._open, self._changes, self._stepping = chunk, self._changes or changes, True  # unless waiting failed

    def end_step(self) -> None:
        """End the step: store the open chunk, and start to fetch what the next step needs first. Waits for nothing."""
        self._leave()
        if not self._stepping:
            return
        self._stepping = False
        self.statistics.steps += 1
        if self._visited:
            self._order, self._visited, self._next = self._visited, [], 0
            if not self._settled:  # or the host may be about to change the slab
                self._look_ahead(None)

    def _leave(self) -> None:
        """No more kernels on the open chunk."""
        chunk = self._open
        if chunk is None:
            return
        chunk.slot.unsaved = chunk.slot.unsaved or self._changes  # first: an interrupt after it loses nothing
        self._open = None
        self.statistics.step_seconds += perf_counter() - self._opened_at
        chunk.slot.last = self.transport.computed(chunk.moves)
        if chunk.slot.unsaved and not chunk.resident:
            self._store(chunk.slot)

    def _send_for(self, chunk: Chunk) -> None:
        slot = chunk.slot
        if slot.holds is not chunk.moves:
            slot.last = self.transport.fetch(chunk.moves, after=slot.last)
            slot.holds = chunk.moves
            self.statistics.bytes_in += chunk.moves.nbytes

    def _store(self, slot: Slot) -> None:
        assert slot.holds is not None
        slot.last = self.transport.store(slot.holds, after=slot.last)
        slot.unsaved = False
        self.statistics.bytes_out += slot.holds.nbytes

    def _follow(self, chunk: Chunk) -> None:
        """Note how far this step is in the order of the last step."""
        self._visited.append(chunk)
        if self._order[self._next : self._next + 1] != [chunk]:
            self._next = self._order.index(chunk) if chunk in self._order else len(self._order)
        self._next = min(self._next + 1, len(self._order))

    def _look_ahead(self, opened: Chunk | None) -> None:
        """Start to fetch the next chunks, as far as the ring has room beside the opened chunk."""
        taken = [] if opened is None or opened.resident else [opened.slot]
        for later in self._order[self._next : self._next + RING - len(taken)]:
            if later.slot in taken:  # it waits for a chunk that comes before it
                return
            taken.append(later.slot)
            self._send_for(later)

    def _wait(self, slot: Slot) -> None:
        began = perf_counter()
        self.transport.wait(slot.last)
        waited = perf_counter() - began
        self.statistics.waits += 1
        self.statistics.stall_seconds += waited
        self.statistics.stalls += waited > _STALL

    # -- the slab as memory ------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until all states are in the slab. Then the host may read and change it until the next step."""
        self._check_process()
        if self._settled:
            return
        self._leave()
        for slot in self._slots:
            if slot.unsaved:
                self._store(slot)
        for slot in self._slots:
            if slot.last is not None:
                self.transport.settle(slot.last)
            slot.holds = slot.last = None
        self._settled = True

    def write(self, number: int, states: Mapping[str, Tensor]) -> None:
        """Copy states of parameter ``number`` into the slab, from any device."""
        self.settle()
        for name, value in states.items():
            self.far[number][name].copy_(value)
            self._written += self.far[number][name].nbytes
        if self._written > layout.CHUNK:
            self._written = 0
            self.transport.trim()

    def close(self) -> None:
        """Settle, and give back near memory and the far tier. ``far`` stays readable."""
        if not self._closed:
            self._closed = True
            try:
                if os.getpid() == self._process:
                    self.settle()
            finally:
                self.transport.close()
                self.chunks, self.pieces, self._slots, self._order, self._visited = [], [], [], [], []

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "paged optimizer states cannot be used in a forked process: the parent owns the pager and continues "
                "to change them. Read and step them in the parent, or start the process with spawn"
            )


def _view(slab: Tensor, first: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Part of the slab as a tensor with its own storage: ``torch.save`` writes whole storages, and refuses a storage
    that tensors of different dtypes share."""
    count = 1
    for length in shape:
        count *= length
    part = torch.from_numpy(slab[first : first + count * dtype.itemsize].numpy())
    return part.view(dtype).view(shape)
